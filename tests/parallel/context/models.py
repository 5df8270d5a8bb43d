"""Models whose sequences are cut over ranks, and what one process computes with the same batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import colrow
from colrow.mesh import data_part
from tests.apply.comparison import largest_error
from tests.apply.double import in_double
from tests.parallel.experts import models as experts
from tests.parallel.experts.training import gradient_of, whole

VOCABULARY = 61
IGNORED = -100

Batch = dict[str, Tensor]
_meshes: dict[tuple[tuple[str, int], ...], DeviceMesh] = {}


def mesh_of(**sizes: int) -> DeviceMesh:
    """In a worker: the mesh of this shape, made once per pool."""
    key = tuple(sorted(sizes.items()))
    if key not in _meshes:
        _meshes[key] = colrow.init_mesh(device="cpu", timeout=60.0, **sizes)
    return _meshes[key]


def llama(heads: int, groups: int) -> nn.Module:
    """A Llama of two layers with heads of 4."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4 * heads,
        intermediate_size=33,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=4,
        tie_word_embeddings=True,
    )
    return in_double(LlamaForCausalLM(config))


def llama_ring() -> nn.Module:
    """5 heads that read one key-value head."""
    return llama(5, 1)


def llama_ulysses() -> nn.Module:
    """4 heads that read two."""
    return llama(4, 2)


def llama_three() -> nn.Module:
    """As many key-value heads as three ranks need."""
    return llama(6, 3)


def gpt2() -> nn.Module:
    """Learned positions, dropout off."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=40,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return in_double(GPT2LMHeadModel(config))


def mixtral() -> nn.Module:
    """5 experts, and a loss of their routers over all tokens."""
    model: Any = experts.mixtral(5)
    model.config.output_router_logits, model.router_aux_loss_coef = True, 0.5
    return model


class Layer(nn.Module):
    """Attention and a feed-forward layer, as many write them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_features = nn.LayerNorm(width), nn.LayerNorm(width)
        self.packed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width]."""
        rows, tokens, width = x.shape
        packed = self.packed(self.before_attention(x))
        query, key, value = (
            one.view(rows, tokens, self.heads, width // self.heads).transpose(1, 2)
            for one in packed.split(width, dim=2)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).contiguous().view(rows, tokens, width))
        return x + self.down(F.gelu(self.up(self.before_features(x))))


def error_of_gradients(model: nn.Module, original: nn.Module) -> float:
    """The largest error of a gradient: of the mean over all ranks, which hold all parameters whole."""
    errors = []
    for one, other in zip(model.parameters(), original.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        total = one.grad.clone()
        torch.distributed.all_reduce(total)
        errors.append(largest_error(total / torch.distributed.get_world_size(), other.grad, floor=1e-6))
    return max(errors)


class Nano(nn.Module):
    """A small GPT of its own making: a table of positions that is sliced, targets that are moved already.

    Args:
        flat: flatten logits and targets by the sizes of the ids.
        heads: of attention.
        moves: compare each token's logits with the next token.
    """

    def __init__(self, flat: bool = False, heads: int = 4, moves: bool = False) -> None:
        super().__init__()
        width = 24
        self.flat, self.moves = flat, moves
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.randn(1, 40, width) / 10)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits and, with targets, the loss."""
        rows, length = ids.shape
        assert length <= 40, "too long"
        x = self.tokens(ids) + self.positions[:, :length]
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits, None
        if self.moves:
            here, following = logits[..., :-1, :].contiguous(), targets[..., 1:].contiguous()
            return logits, F.cross_entropy(here.view(-1, VOCABULARY), following.view(-1))
        if self.flat:
            logits, targets = logits.view(rows * length, -1), targets.view(rows * length)
            return logits, F.cross_entropy(logits, targets, ignore_index=IGNORED)
        flat = logits.view(-1, logits.size(-1))
        return logits, F.cross_entropy(flat, targets.view(-1), ignore_index=IGNORED)


def nano() -> nn.Module:
    """Flattened with -1."""
    torch.manual_seed(0)
    return Nano().double()


def nano_flat() -> nn.Module:
    """Flattened by sizes."""
    torch.manual_seed(0)
    return Nano(flat=True).double()


def nano_moves() -> nn.Module:
    """Compares logits without the last token with ids without the first; two heads."""
    torch.manual_seed(0)
    return Nano(heads=2, moves=True).double()


def batch_of(step: int, length: int, replica: int = 0) -> Batch:
    """Ids and labels [2, length]; how many labels count differs between parts of the sequence."""
    generator = torch.Generator().manual_seed(100 * step + replica)
    ids = torch.randint(VOCABULARY, (2, length), generator=generator)
    labels = ids.clone()
    labels[0, : length // 2 + step] = IGNORED
    labels[1, 3:5] = IGNORED
    return {"input_ids": ids, "labels": labels}


def named(model: nn.Module, batch: Batch) -> Batch:
    """The batch as the model names its arguments."""
    if not isinstance(model, Nano):
        vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
        return {name: ids.where(ids == IGNORED, ids % vocabulary) for name, ids in batch.items()}
    targets = batch["labels"]
    return {"ids": batch["input_ids"], "targets": targets if model.moves else targets.roll(-1, 1)}


def loss_of(output: Any) -> Tensor:
    """The loss in a model's result."""
    loss: Tensor = output[1] if isinstance(output, tuple) else output.loss
    return loss


def differences(
    build: Callable[[], nn.Module],
    lengths: list[int],
    sizes: dict[str, int],
    data: str = "ddp",
    **options: Any,
) -> dict[str, float]:
    """On a rank: how far losses, gradients, logits and parameters after steps are from one process's."""
    mesh = mesh_of(**sizes)
    replica, replicas = data_part(mesh)
    original, model = build(), build()
    example = named(model, batch_of(0, 9))
    model = colrow.parallelize(model, mesh, example, **options)
    trained = colrow.data_parallel(model, mesh, data)  # type: ignore[arg-type]
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.3) for one in (original, trained)]
    found: dict[str, float] = {}

    def note(name: str, one: Tensor, other: Tensor) -> None:
        found[name] = max(found.get(name, 0.0), largest_error(one, other, floor=1e-6))

    for step, length in enumerate(lengths):
        batches = [named(original, batch_of(step, length, each)) for each in range(replicas)]
        expected = sum(loss_of(original(**each)) for each in batches) / replicas
        assert isinstance(expected, Tensor)
        expected.backward()
        own = loss_of(trained(**batches[replica]))
        note("loss", own.detach(), loss_of(original(**batches[replica])).detach())
        own.backward()
        if data == "ddp":
            gradients = whole(trained, gradient_of)
            for name, parameter in original.named_parameters():
                assert parameter.grad is not None
                note(f"gradient {name}", gradients[name], parameter.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if data == "ddp":
        parameters = whole(trained, lambda one: one)
        for name, parameter in original.named_parameters():
            note(f"parameter {name}", parameters[name], parameter.detach())
    original.eval(), trained.eval()
    with torch.no_grad():
        ids = {name: one for name, one in batches[replica].items() if name in ("ids", "input_ids")}
        one, other = trained(**ids), original(**ids)
    logits = (one[0], other[0]) if isinstance(other, tuple) else (one.logits, other.logits)
    note("logits", *logits)
    return found
