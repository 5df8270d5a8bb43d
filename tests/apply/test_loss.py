"""The model's own loss on cut logits: what it may do to them, what it returns, what is left behind."""

from __future__ import annotations

import contextvars
import copy
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

import colrow
from colrow.apply.loss_late import Origin
from colrow.apply.loss_tensor import LocalLogits
from colrow.plan import LLAMA, AxisSpec, HandPlan, LossSpec, column, vocab
from tests.apply.comparison import assemble, largest_error
from tests.pool import Pool, worker_mesh

IDS = 7  # odd, so that ranks hold different numbers of ids
TOKENS = 4  # as many as rank 0 of 2 has ids
PLAN = HandPlan(
    {"words": AxisSpec()},
    {"embedding": vocab("words"), "head": column("words")},
    loss=LossSpec("head", axis="words"),
)


class Reader(nn.Module):
    """An embedding, a layer, logits; what follows is given."""

    def __init__(self, loss: Callable[[Reader, Tensor, Tensor], Any], ids: int = IDS) -> None:
        super().__init__()
        self.loss, self.ids = loss, ids
        self.embedding = nn.Embedding(ids, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, ids, bias=False)
        self.offset = nn.Parameter(torch.randn(ids))

    def hidden(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.embedding(ids)).tanh()
        return hidden

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.hidden(ids))
        return logits if labels is None else self.loss(self, logits, labels)


def _pair(model: nn.Module, size: int, plan: HandPlan = PLAN) -> tuple[nn.Module, nn.Module]:
    """The original, with random weights, and the same parallelized, in float64."""
    original = model.double()
    torch.manual_seed(3)
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    model = copy.deepcopy(original)
    colrow.parallelize(model, worker_mesh(size), plan)
    return original, model


def _batch(ids: int = IDS, rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens, labels = (torch.randint(ids, (rows, TOKENS), generator=generator) for _ in range(2))
    labels[0, 1] = -100
    return tokens, labels


def _compare_gradients(original: nn.Module, model: nn.Module, expected: Tensor, found: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=expected.dtype)
    for one, value in ((original, expected), (model, found)):
        one.zero_grad()
        (value * cotangent).sum().backward()
    gradients = assemble(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, parameter in original.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        if parameter.grad is not None:
            assert largest_error(gradients[name], parameter.grad) < 1e-10, name


_reduction = contextvars.ContextVar("_reduction", default="none")


@contextmanager
def _reduced(reduction: str) -> Iterator[None]:
    """Losses of flat logits are reduced so; without reduction they need all logits."""
    token = _reduction.set(reduction)
    yield
    _reduction.reset(token)


def _flat(logits: Tensor, labels: Tensor, reduction: str = "", **options: Any) -> Tensor:
    reduction = reduction or _reduction.get()
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction, **options)


def _softcap_in_place(model: Reader, logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits / 3
    logits /= 2
    logits.mul_(3).sub_(0.1).tanh_()
    return _flat(-(1 - logits.clamp(-0.9, 0.9)), labels)


def _through_dimensions(model: Reader, logits: Tensor, labels: Tensor) -> Tensor:
    moved = logits.permute(2, 0, 1).movedim(0, 1).transpose(0, 1).mT
    assert moved.shape == (model.ids, TOKENS, len(labels))
    return F.cross_entropy(moved.T.mT, labels, reduction=_reduction.get())


def _squeezed(model: Reader, logits: Tensor, labels: Tensor) -> Tensor:
    # where this rank has one id or none, only the whole's sizes tell what squeeze and -1 mean
    one = logits[1, 2].unsqueeze(0).unsqueeze(2).squeeze()
    rows = logits.unflatten(1, (2, -1)).expand(2, -1, -1, -1, model.ids).contiguous()
    rows = rows.view(-1, model.ids).view_as(rows).detach().clone() + rows
    repeated = labels.expand(2, *labels.shape)
    return F.cross_entropy(one, labels[1, 2]) + _flat(rows.flatten(2, 3), repeated)


def _per_id(model: Reader, logits: Tensor, labels: Tensor) -> Tensor:
    masked = torch.arange(model.ids) == 1
    logits = (logits + model.offset).masked_fill(masked, -0.5)
    logits += torch.linspace(0, 1, model.ids, dtype=logits.dtype)
    return _flat(logits * model.offset.detach() + logits, labels)


LOSSES: dict[str, Callable[[Reader, Tensor, Tensor], Tensor]] = {
    "size from the model": lambda m, x, y: F.cross_entropy(x.double().view(-1, m.ids), y.view(-1)),
    "size from the logits": lambda m, x, y: _flat(x.reshape(-1, x.size(-1)), y, label_smoothing=0.2),
    "size -1": lambda m, x, y: _flat(x.reshape(y.numel(), -1), y, "sum"),
    "shifted": lambda m, x, y: _flat(x[..., :-1, :].contiguous(), y[..., 1:]),
    "all ids": lambda m, x, y: _flat(x[:, 1:, : m.ids].narrow(1, 0, 2), y[:, 1:3]),
    "mask": lambda m, x, y: _flat(x[y != -100].view(-1, m.ids), y[y != -100]),
    "index": lambda m, x, y: _flat(x[:, torch.tensor([0, 2])].select(0, 1), y[1, [0, 2]]),
    "each row": lambda m, x, y: torch.stack([F.cross_entropy(a, b) for a, b in zip(x, y, strict=True)]),
    "parts": lambda m, x, y: _flat(x.split([1, 3], 1)[1], y[:, 1:]) * _flat(x.chunk(2, 1)[0], y[:, :2]).sum(),
    "scaled": lambda m, x, y: _flat(2 * torch.tanh(x / 30).mul(30).clamp(max=3) - 1, y),
    "likelihood": lambda m, x, y: F.nll_loss(F.log_softmax(-x[:, :2].flatten(0, 1), -1), y[:, :2].flatten()),
    "softcap": lambda m, x, y: _flat(torch.tanh(x.data.detach().real + x / 3) * 3 - 1, y),
    "softcap in place": _softcap_in_place,
    "dimensions": _through_dimensions,
    "squeezed": _squeezed,
    "per id": _per_id,
}  # fmt: skip


ALWAYS_REDUCED = {"size from the model", "size -1", "likelihood", "each row"}
# what these do, other than to move logits about, needs their numbers
WITH_NUMBERS = {"softcap", "softcap in place", "squeezed", "per id"}


def _followed(size: int, ids: int) -> None:
    for (name, loss), reduction in product(LOSSES.items(), ("none", "sum", "mean")):
        original, model = _pair(Reader(loss, ids), size)
        tokens, labels = _batch(ids)
        with _reduced(reduction), patch.object(Origin, "get", autospec=True, side_effect=Origin.get) as get:
            expected, found = original(tokens, labels), model(tokens, labels)
        assert type(found) is Tensor, name
        _compare_gradients(original, model, expected, found)
        needs = name in WITH_NUMBERS or (reduction == "none" and name not in ALWAYS_REDUCED)
        assert (get.call_count > 0) == needs, (name, reduction)


@pytest.mark.parametrize(("size", "ids"), [(1, 7), (2, 7), (2, 4), (3, 7), (3, 2), (4, 7)])
def test_what_a_model_may_do_to_its_logits(ranks: Callable[[int], Pool], size: int, ids: int) -> None:
    # 4 ids of 4 tokens; over 3 ranks, 2 ids leave one rank without
    ranks(size).run(_followed, size, ids)


REFUSED: dict[str, tuple[str, Callable[[Reader, Tensor, Tensor], Any]]] = {
    "argmax": ("calls argmax", lambda m, x, y: x.argmax(-1)),
    "data": ("calls argmax", lambda m, x, y: x.data.argmax(-1)),
    "T": ("calls sum", lambda m, x, y: x.mT.sum(1)),
    "H": ("calls amax", lambda m, x, y: x[0].H.amax(0)),
    "real": ("calls softmax", lambda m, x, y: x.real.softmax(-1)),
    "detach": ("calls max", lambda m, x, y: x.detach().max()),
    "parts": ("calls logsumexp", lambda m, x, y: x.split(1)[0].logsumexp(-1)),
    "item": ("calls tolist", lambda m, x, y: x.tolist()),
    "one id": ("__getitem__ cuts the vocabulary", lambda m, x, y: x[..., 0]),
    "last id": ("__getitem__ cuts the vocabulary", lambda m, x, y: x[..., m.ids - 1]),
    "fewer ids": ("__getitem__ cuts the vocabulary", lambda m, x, y: x[..., :-1]),
    "as many ids as on rank 0": ("__getitem__ cuts the vocabulary", lambda m, x, y: x[..., :4]),
    "order of ids": ("__getitem__ cuts", lambda m, x, y: x[..., torch.arange(m.ids)]),
    "split": ("split cuts the vocabulary", lambda m, x, y: x.split(4, -1)),
    "chunk": ("chunk cuts the vocabulary", lambda m, x, y: x.chunk(2, -1)),
    "select": ("select cuts the vocabulary", lambda m, x, y: x.select(2, 0)),
    "flatten": ("flatten cuts the vocabulary", lambda m, x, y: x.flatten(1)),
    "view": ("view cuts the vocabulary", lambda m, x, y: x.view(3, m.ids, TOKENS)),
    "other elements": ("calls view", lambda m, x, y: x.view(torch.int64)),
    "other classes": ("classes that are not the vocabulary", lambda m, x, y: F.cross_entropy(x, y)),
    "target": ("classes that are not", lambda m, x, y: F.cross_entropy(torch.zeros(3, 4, m.ids), x)),
    "two places": ("calls add", lambda m, x, y: x[:, :1] + x[:, :1].mT),
    "into another": ("calls add_", lambda m, x, y: torch.zeros(x.shape).double().add_(x)),
    "out": ("calls mul", lambda m, x, y: torch.mul(x, 2, out=torch.zeros(x.shape).double())),
    "no loss": ("did not pass its logits to F.cross_entropy", lambda m, x, y: x * 2),
}  # fmt: skip


def _refusals() -> list[str]:
    """Every rank raises the same, and goes on."""
    causes = []
    for name, (cause, loss) in REFUSED.items():
        _, model = _pair(Reader(loss), 2)
        tokens, labels = _batch()
        with pytest.raises(colrow.PlanError) as caught:
            model(tokens, labels)
        assert cause in caught.value.cause, (name, caught.value.cause)
        assert model(tokens).shape[-1] == IDS, name
        causes.append(caught.value.cause)
    return causes


def test_what_would_mix_the_vocabulary_is_refused_on_all_ranks(ranks: Callable[[int], Pool]) -> None:
    first, second = ranks(2).run(_refusals)
    assert first == second


Pair = namedtuple("Pair", ["loss", "logits"])


@dataclass
class Result:
    loss: Tensor
    logits: Any


@dataclass(frozen=True)
class Fixed:
    loss: Tensor
    logits: Any


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Any, Any]]]] = {
    "tuple": (lambda a, b: (a, b), lambda out: out),
    "named tuple": (Pair, lambda out: (out.loss, out.logits)),
    "list": (lambda a, b: [a, [b, None]], lambda out: (out[0], out[1][0])),
    "nested": (lambda a, b: {"loss": a, "x": {"y": (b, "z")}}, lambda out: (out["loss"], out["x"]["y"][0])),
    "user's mapping": (lambda a, b: UserDict(loss=a, logits=b), lambda out: (out["loss"], out["logits"])),
    "dataclass": (lambda a, b: Result(a, [b]), lambda out: (out.loss, out.logits[0])),
    "frozen dataclass": (Fixed, lambda out: (out.loss, out.logits)),
    "transformers": (
        lambda a, b: CausalLMOutput(loss=a, logits=b, hidden_states=(a, b)),
        lambda out: (out["loss"], out.logits if out[1] is out.logits is out.hidden_states[1] else None),
    ),
    "moved": (lambda a, b: (a, b.transpose(1, 2)), lambda out: (out[0], out[1])),
}  # fmt: skip


def _outputs() -> None:
    for name, (pack, unpack) in OUTPUTS.items():
        original, model = _pair(Reader(lambda m, x, y, pack=pack: pack(_flat(x, y), x)), 2)  # type: ignore[misc]
        seen: list[Any] = []
        model.register_forward_hook(lambda module, arguments, output, seen=seen: seen.append(output))
        whole, result = original(*_batch()), model(*_batch())
        assert type(result) is type(whole), name
        assert seen[0] is result, name  # hooks of others see what the caller sees
        (_, expected), (loss, logits) = unpack(whole), unpack(result)
        assert isinstance(logits, colrow.ShardedLogits), name
        assert type(logits.local) is Tensor, name
        assert torch.equal(logits.gather(), logits.gather())
        assert largest_error(logits.gather(), expected) < 1e-11, name
        assert type(loss) is Tensor
        # gradients flow through what was gathered
        _compare_gradients(original, model, expected, logits.gather())


def _with_and_without_logits(function: Callable[[], None]) -> None:
    """Losses that need all logits and those that do not."""
    for reduction in ("none", "mean"):
        with _reduced(reduction):
            function()


def test_outputs_of_every_structure(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_with_and_without_logits, _outputs)


class Keeper(Reader):
    """Returns bare logits, and keeps them and its loss in attributes."""

    kept: Any = None

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(ids)
        if labels is not None:
            self.kept = (_flat(logits, labels), logits)
        return logits


def _bare() -> None:
    original, model = _pair(Keeper(lambda *_: None), 2)
    logits = model(*_batch())
    assert isinstance(logits, colrow.ShardedLogits)
    assert largest_error(logits.gather(), original(*_batch())) < 1e-11
    loss, kept = model.kept
    torch.testing.assert_close(loss, original.kept[0], rtol=1e-12, atol=1e-12)
    assert isinstance(kept, LocalLogits)
    with pytest.raises(colrow.PlanError, match="calls argmax"):  # what the model keeps stays protected
        kept.argmax(-1)


def test_bare_and_kept_logits(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_with_and_without_logits, _bare)


class Twice(Reader):
    """Calls its logits layer twice, each time with a loss, as models that predict several tokens do."""

    def __init__(self) -> None:
        super().__init__(lambda *_: None)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.hidden(ids)
        first = self.head(hidden)
        loss = 0 if labels is None else _flat(first, labels)
        second = self.head(hidden * hidden)
        if labels is not None:
            loss = loss + _flat(second, labels) + _flat(first + second, labels)
        return {"loss": loss, "logits": (first, second)}


def _twice() -> None:
    original, model = _pair(Twice(), 2)
    for _ in range(2):
        expected, found = original(*_batch()), model(*_batch())
        assert torch._C._len_torch_function_stack() == 0
        for ours, theirs in zip(found["logits"], expected["logits"], strict=True):
            assert isinstance(ours, colrow.ShardedLogits)
            assert largest_error(ours.gather(), theirs) < 1e-11
        _compare_gradients(original, model, expected["loss"], found["loss"])


def test_a_logits_layer_called_twice(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_with_and_without_logits, _twice)


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).double()


def _interrupted() -> None:
    """Ctrl-C, which torch's hooks do not hear of."""
    original, model = _llama(), _llama()
    config = model.config
    colrow.parallelize(model, worker_mesh(2), LLAMA)
    ids = torch.randint(61, (2, 5), generator=torch.Generator().manual_seed(1))
    loss = model.loss_function

    def interrupt(*arguments: Any, **options: Any) -> None:
        # nothing is changed even while the model runs
        assert model.config is config
        assert config.vocab_size == 61
        assert torch._C._len_torch_function_stack() == 0
        raise KeyboardInterrupt

    for _ in range(2):
        model.loss_function = interrupt
        with pytest.raises(KeyboardInterrupt):
            model(ids, labels=ids)
        model.loss_function = loss
        assert model.config is config
        assert config.vocab_size == 61
        assert torch._C._len_torch_function_stack() == 0
        assert largest_error(model(ids).logits, original(ids).logits) < 1e-6
        expected, found = original(ids, labels=ids).loss, model(ids, labels=ids).loss
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_an_interrupt_leaves_nothing_behind(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_interrupted)


class Checkpointed(Reader):
    """Recomputes a part in the backward pass: the loss with the logits, or the logits alone."""

    def __init__(self, part: str, reentrant: bool | None) -> None:
        super().__init__(lambda *_: None)
        self.part, self.reentrant = part, reentrant

    def tail(self, hidden: Tensor, labels: Tensor | None) -> Tensor:
        logits: Tensor = self.head(hidden) * 2
        return logits.softmax(-1) if labels is None else _flat(logits, labels)

    def again(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if self.reentrant is None:
            return function(*arguments)
        result: Tensor = checkpoint(function, *arguments, use_reentrant=self.reentrant)
        return result

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        hidden = self.hidden(ids)
        if self.part == "loss":
            return self.again(self.tail, hidden, labels)
        logits = self.again(self.head, hidden) * 2
        return logits.softmax(-1) if labels is None else _flat(logits, labels)


def _checkpointed_both(part: str, reentrant: bool) -> None:
    for reduction in ("none", "sum"):
        with _reduced(reduction):
            _checkpointed(part, reentrant)


def _checkpointed(part: str, reentrant: bool) -> None:
    original, model = _pair(Checkpointed(part, None), 2)
    model.reentrant = reentrant
    tokens, labels = _batch()
    _compare_gradients(original, model, original(tokens, labels), model(tokens, labels))
    _compare_gradients(original, model, original(tokens), model(tokens))
    with torch.no_grad():  # an evaluation between a forward and its backward pass
        value = model(tokens, labels)
        assert largest_error(model(tokens), original(tokens)) < 1e-11
    assert value.numel() == (tokens.numel() if _reduction.get() == "none" else 1)

    def both(one: nn.Module, order: int) -> Tensor:
        """With labels and without, in one backward pass: each is recomputed as it was computed."""
        forwards = [lambda: one(tokens, labels), lambda: one(tokens + order & 3)]
        results = [forward() for forward in forwards[::order]]
        with torch.no_grad():
            one(tokens, labels)
        return torch.cat([result.flatten() for result in results])

    for order in (1, -1):
        _compare_gradients(original, model, both(original, order), both(model, order))
    # the whole model inside a checkpoint
    loss = checkpoint(model, tokens, labels, use_reentrant=False)
    _compare_gradients(original, model, original(tokens, labels), loss)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", ["loss", "logits"])
def test_activation_checkpointing(ranks: Callable[[int], Pool], part: str, reentrant: bool) -> None:
    ranks(2).run(_checkpointed_both, part, reentrant)
