"""What is measured on one device: overhead, one rank's share of large layers, and the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

import colrow
from colrow.apply.actions import Applier
from colrow.apply.dry_run import DryRanks
from colrow.checkpoint.meta import parameters_on_meta
from colrow.collectives import Pending, communicator
from colrow.layers import cross_entropy
from colrow.layers.linear_cross_entropy import column_cross_entropy
from colrow.layers.linear_functions import ColumnWeights, column_linear
from colrow.layers.products import BY_TORCH
from colrow.layout import Cut
from colrow.plan import derive_plan
from colrow.trace import Example

from .device import Timed, fill, in_turns


@dataclass(frozen=True)
class Sizes:
    """Of a Llama, and of the batch that it is measured with."""

    hidden: int
    feed_forward: int
    heads: int
    key_value_heads: int
    vocabulary: int
    layers: int
    batch: int
    sequence: int

    def configuration(self) -> LlamaConfig:
        """As transformers describes it."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.feed_forward,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            vocab_size=self.vocabulary,
            num_hidden_layers=self.layers,
            max_position_embeddings=self.sequence,
            tie_word_embeddings=False,
            use_cache=False,
        )


LARGE = {
    "Llama-3-8B": Sizes(4096, 14336, 32, 8, 128256, 4, 1, 4096),
    "Llama-3-70B": Sizes(8192, 28672, 64, 8, 128256, 2, 1, 4096),
}
SMALL = {"small Llama": Sizes(64, 96, 8, 4, 512, 2, 2, 16)}
"""To try the programs on a CPU."""


class SilentRanks(DryRanks):
    """One of several ranks that are not there: collectives give back its own values, in the right shape."""

    def start_all_reduce(
        self, tensor: Tensor, reduction: str = "sum", *, label: str = "", owned: bool = False
    ) -> Pending:
        return Pending.completed(tensor)

    def start_all_gather(
        self, shard: Tensor, dimension: int, sizes: Sequence[int] | None = None, *, label: str = ""
    ) -> Pending:
        shape = list(shard.shape)
        shape[dimension] = shard.shape[dimension] * self.size if sizes is None else sum(sizes)
        return Pending.completed(shard.new_zeros(shape))


def overhead(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, rounds: int, calls: int
) -> dict[str, Timed]:
    """A training step of the model as it is, and parallelized over one rank."""
    torch.manual_seed(0)
    plain = nn.Module.to(LlamaForCausalLM(sizes.configuration()), device, dtype)
    ids = _ids(sizes, device)
    mesh = colrow.init_mesh(device=device.type)
    cut = colrow.parallelize(copy.deepcopy(plain), mesh, {"input_ids": ids[:, :8], "labels": ids[:, :8]})
    return in_turns({"plain": _step(plain, ids), "colrow, tp=1": _step(cut, ids)}, device, rounds, calls)


def share(
    ranks: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, rounds: int, calls: int
) -> dict[str, Timed]:
    """Forward and backward of the layers: all of them, and what one of several ranks computes of them.

    Nothing is communicated. ``whole`` / ``share`` would be the number of ranks, if small products were as
    fast as large ones.
    """
    x = torch.randn(sizes.batch, sizes.sequence, sizes.hidden, device=device, dtype=dtype)
    forms: dict[str, Callable[[], object]] = {}
    for name, count in (("whole", 1), ("share", ranks)):
        with parameters_on_meta():
            model = LlamaModel(sizes.configuration())
        model.set_input_embeddings(nn.Identity())  # the layers alone
        if count > 1:
            few = torch.empty(1, 8, sizes.hidden, device="meta")
            examples = {"training": Example(keywords={"inputs_embeds": few})}
            plan = derive_plan(model, examples, count)
            Applier(model, SilentRanks(0, count), plan).apply(True)
        forms[name] = _layers(fill(model, device, dtype).train(), x)
    return in_turns(forms, device, rounds, calls)


def loss(
    ranks: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, rounds: int, calls: int
) -> dict[str, Timed]:
    """The last layer and its loss, forward and backward, of one of several ranks: all logits, and fused."""
    tokens = sizes.batch * sizes.sequence
    silent = SilentRanks(0, ranks) if ranks > 1 else communicator(colrow.init_mesh(device=device.type))
    cut = Cut.balanced(sizes.vocabulary, ranks)
    x = torch.randn(tokens, sizes.hidden, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(cut.count(0), sizes.hidden, device=device, dtype=dtype) * 0.02
    weight.requires_grad_()
    target = torch.randint(cut.count(0), (tokens,), device=device)
    layer = ColumnWeights(silent, "enter", True, BY_TORCH, False)

    def plain() -> None:
        x.grad = weight.grad = None
        logits = column_linear(x, weight, None, silent, "enter", True, BY_TORCH, False)
        cross_entropy(logits.float(), target, silent, vocabulary=cut).backward()

    def fused() -> None:
        x.grad = weight.grad = None
        column_cross_entropy(x, weight, None, target, layer, vocabulary=cut).backward()

    return in_turns({"plain": plain, "fused": fused}, device, rounds, calls)


def _ids(sizes: Sizes, device: torch.device) -> Tensor:
    return torch.randint(sizes.vocabulary, (sizes.batch, sizes.sequence), device=device)


def _step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _layers(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad()
        model(inputs_embeds=x).last_hidden_state.float().pow(2).mean().backward()

    return run
