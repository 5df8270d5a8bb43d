"""Losses of models that never compute all their logits, and what makes them compute these after all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import colrow
from colrow.apply.loss_late import Origin
from colrow.layers import loss_chunks
from colrow.plan import AxisSpec, HandPlan, LossSpec, Plan, column, derive_plan, vocab
from colrow.trace import Example
from tests.apply.comparison import assemble, largest_error
from tests.pool import Pool, worker_mesh

IDS, HIDDEN = 31, 6
SPEC = LossSpec("head", axis="words")
PLAN = HandPlan(
    {"words": AxisSpec()},
    {"embedding": vocab("words"), "head": column("words")},
    loss=SPEC,
)
Loss = Callable[["Reader", Tensor, Tensor], Any]


def _mean(model: Reader, logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers computes it."""
    return F.cross_entropy(logits.float().view(-1, IDS), labels.view(-1), ignore_index=-100)


class Reader(nn.Module):
    """An embedding, a layer, logits and a loss that is given."""

    def __init__(self, loss: Loss = _mean, *, kind: str = "") -> None:
        super().__init__()
        self.loss = loss
        self.embedding = nn.Embedding(IDS, HIDDEN)
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.head: nn.Module = (
            Conv1D(IDS, HIDDEN) if kind == "Conv1D" else nn.Linear(HIDDEN, IDS, kind == "bias")
        )
        if kind == "tied":
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.body(self.embedding(ids)).tanh())
        return logits if labels is None else self.loss(self, logits, labels)


def _pair(
    model: nn.Module, plan: HandPlan | Plan = PLAN, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, nn.Module]:
    """The original, with random weights, and the same on two ranks."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model = model.to(dtype)
    cut = copy.deepcopy(model)
    colrow.parallelize(cut, worker_mesh(2), plan)
    return model, cut


def _batch(tokens: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids, labels = (torch.randint(IDS, (3, tokens), generator=generator) for _ in range(2))
    labels[0, 1] = -100
    return ids, labels


def _compare(original: nn.Module, model: nn.Module, tolerance: float = 1e-10) -> None:
    gradients = assemble(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, parameter in original.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        if parameter.grad is not None:
            assert largest_error(gradients[name], parameter.grad) < tolerance, name


class _Memory(TorchDispatchMode):
    """The most bytes that any operator's result takes."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_meta:
            self.most = max(self.most, result.untyped_storage().nbytes())
        return result


def _shifted(model: Reader, logits: Tensor, labels: Tensor) -> Tensor:
    logits = 30 * torch.tanh(logits / 30)
    shifted = logits[..., :-1, :].contiguous().float()
    return nn.CrossEntropyLoss(reduction="sum")(shifted.view(-1, IDS), labels[..., 1:].reshape(-1)) / 7


def _never_all() -> None:
    for loss in (_mean, _shifted):
        _, model = _pair(Reader(loss), dtype=torch.bfloat16)
        ids, labels = _batch(64)
        with patch.object(loss_chunks, "TOKENS_AT_LEAST", 4), _Memory() as memory:
            model(ids, labels).backward()
            with torch.no_grad():
                model(ids, labels)
        # the hidden states, or an eighth of the tokens, each with 16 logits in single precision
        assert memory.most == max(192 * HIDDEN * 2, 24 * 16 * 4)
        with _Memory() as memory, patch.object(loss_chunks, "TOKENS_AT_LEAST", 1000):
            model(ids, labels)
        assert memory.most >= 189 * 15 * 4  # as many as there are tokens


def test_there_are_never_all_logits(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_never_all)


def _kinds() -> None:
    """Heads of every kind, frozen parts, several backward passes added up, evaluations in between."""
    for kind in ("", "bias", "Conv1D", "tied"):
        for frozen in ((), ("body",), ("head",), ("embedding", "body")):
            if kind == "tied" and len(frozen) == 2:
                continue  # nothing is left to be trained
            original, model = _pair(Reader(kind=kind))
            for one in (original, model):
                for name in frozen:
                    one.get_submodule(name).requires_grad_(False)
                for tokens in (8, 5):
                    ids, labels = _batch(tokens)
                    (one(ids, labels) / 3).backward()
                    with torch.no_grad():
                        one.value = one(ids, labels)
                with torch.inference_mode():
                    one.again = one(ids, labels)
                one.halves = one(ids, labels)
                one.halves.backward(retain_graph=True)
                (0.3 * one.halves).backward()
            for name in ("value", "again", "halves"):
                torch.testing.assert_close(getattr(model, name), getattr(original, name), rtol=1e-6, atol=0)
            # the logits are rounded to single precision, and so are their gradients
            _compare(original, model, 1e-5)


def test_kinds_of_heads(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_kinds)


def _with_logits(model: Reader, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits.view(-1, IDS), labels.view(-1)), logits * 2


def _read_afterwards() -> None:
    """Logits of the output, read before or after the backward pass, with gradients of their own."""
    original, model = _pair(Reader(_with_logits))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, labels = _batch()
    expected_loss, expected = original(ids, labels)
    loss, logits = model(ids, labels)
    assert repr(logits).startswith("ShardedLogits(local=[3, 8, 1")
    assert largest_error(logits.gather(), expected) < 1e-11
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=expected.dtype)
    ((expected * cotangent).sum() + expected_loss).backward()
    ((logits.gather() * cotangent).sum() + loss).backward()
    _compare(original, model)
    # after the backward pass; without recording
    loss, logits = model(ids, labels)
    loss.backward()
    with torch.no_grad():
        assert largest_error(logits.gather(), expected) < 1e-11
        assert logits.local.requires_grad
        loss, logits = model(ids, labels)
    assert largest_error(logits.gather(), expected) < 1e-11
    assert not logits.local.requires_grad
    # the weights that they would be computed from are gone
    kept, late = model(ids, labels)[1], model(ids, labels)[1]
    assert kept.local.shape[:2] == (3, 8)
    optimizer.step()
    assert largest_error(kept.gather(), expected) < 1e-11
    with pytest.raises(colrow.PlanError, match="before the optimizer's step"):
        late.gather()
    late = model(ids, labels)[1]
    colrow.unshard(model)
    with pytest.raises(colrow.PlanError, match="weights have changed"):
        late.local  # noqa: B018


def test_logits_that_are_read_afterwards(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_read_afterwards)


class Halved(torch.autograd.Function):
    """A function of somebody else's, which sees the tensor itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


def _reduced(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def _written(model: Reader, logits: Tensor, labels: Tensor) -> Tensor:
    """Parts share memory with the whole; copies do not."""
    part, other, copied = logits[:, 1:], logits.transpose(0, 1), logits[:, :2].clone()
    scaled = logits * 2
    first = _reduced(logits, labels)
    logits.mul_(0.5)
    later = logits[:1]
    return (
        first
        + 2 * _reduced(part, labels[:, 1:])
        + 3 * _reduced(other, labels.T)
        + 4 * _reduced(copied, labels[:, :2])
        + 5 * _reduced(scaled, labels)
        + 6 * _reduced(later, labels[:1])
        + 7 * _reduced(logits, labels)
    )


def _hooked(model: Reader, logits: Tensor, labels: Tensor) -> Tensor:
    scaled = logits * 2
    if not torch.is_grad_enabled():
        return _reduced(scaled, labels)
    scaled.register_hook(lambda gradient: gradient * 3)
    scaled.retain_grad()
    loss = _reduced(scaled, labels)
    model.kept = scaled  # type: ignore[assignment]
    return loss


def _written_after_cast(model: Reader, logits: Tensor, labels: Tensor) -> Tensor:
    """A cast to what they are gives the logits themselves."""
    cast = logits.double()
    cast.mul_(0.5)
    return _reduced(cast, labels) + 2 * _reduced(logits, labels)


def _partly_without_gradient(model: Reader, logits: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        constant = _reduced(logits * 2, labels)
        part = logits[:, 1:]
    return _reduced(logits, labels) * constant + _reduced(part, labels[:, 1:]) * _reduced(
        logits.detach(), labels
    )


def _selected(model: Reader, logits: Tensor, labels: Tensor) -> Tensor:
    """What selects rows is read when it is given."""
    mask = labels != -100
    rows, wanted = logits[mask], labels[mask]
    if not torch.is_grad_enabled():
        mask.zero_()
    return F.cross_entropy(rows, wanted) + F.cross_entropy(rows + torch.ones(IDS, dtype=rows.dtype), wanted)


USES: dict[str, Loss] = {
    "another's function": lambda m, x, y: _reduced(Halved.apply(x), y) + _reduced(x, y),
    "another's function later": lambda m, x, y: _reduced(Halved.apply((x[:, 1:] * 2).mT.mT), y[:, 1:]),
    "another's function between shapes": lambda m, x, y: _reduced(
        Halved.apply(x.reshape((-1, 2, IDS))).view([*y.shape, -1]).unsqueeze(0), y[None]
    ),
    "written into": _written,
    "written into after a cast": _written_after_cast,
    "hooks": _hooked,
    "selected": _selected,
    "partly without gradient": _partly_without_gradient,
    "several losses": lambda m, x, y: _reduced(x, y) + _reduced(x[:, 2:], y[:, 2:]) + 0.1 * _reduced(-x, y),
    "asked": lambda m, x, y: _reduced(x if x.requires_grad and not x.is_leaf and x.grad is None else -x, y),
    "one token": lambda m, x, y: F.cross_entropy(x[1, 2], y[1, 2]),
    "no token": lambda m, x, y: F.cross_entropy(x[:0].flatten(0, 1), y[:0].flatten(), reduction="sum"),
    "repeated": lambda m, x, y: _reduced(x[[0, 1, 1]], y[[0, 1, 1]]),
    "double": lambda m, x, y: F.cross_entropy(
        x.view(-1, IDS).half().float(), y.view(-1), label_smoothing=0.1, weight=torch.linspace(0, 1, IDS)
    ),
}  # fmt: skip


def _uses() -> None:
    for name, loss in USES.items():
        original, model = _pair(Reader(loss))
        ids, labels = _batch()
        expected, found = original(ids, labels), model(ids, labels)
        tolerance = 1e-2 if name == "double" else 1e-10
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            torch.testing.assert_close(
                model(ids, labels), original(ids, labels), rtol=tolerance, atol=tolerance
            )
        for result in (expected, found):
            (result * 0.7).backward()
        _compare(original, model, tolerance)
        if name == "hooks":
            whole = original.kept.grad
            found = model.kept.plain.grad
            assert found is not None
            start = 16 * worker_mesh(2).get_local_rank("tp")
            assert largest_error(found, whole[..., start : start + 16]) < 1e-12


def test_uses_of_logits(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_uses)


def _watched() -> None:
    """Hooks of others on the logits layer see logits; a forward that somebody has replaced is called."""
    ids, labels = _batch()

    def losses_without_logits(change: Callable[[nn.Module], Any], *, is_before: bool) -> int:
        original, model = _pair(Reader())
        if is_before:
            model = copy.deepcopy(original)
            change(model)
            colrow.parallelize(model, worker_mesh(2), PLAN)
        else:
            change(model)
        with patch.object(Origin, "loss", autospec=True, side_effect=Origin.loss) as loss:
            torch.testing.assert_close(model(ids, labels), original(ids, labels), rtol=1e-6, atol=0)
        return loss.call_count

    seen: list[Any] = []

    def hook(model: Any) -> Any:
        return model.head.register_forward_hook(lambda module, given, logits: seen.append(logits + 0))

    def backward_hook(model: Any) -> Any:
        return model.head.register_full_backward_hook(lambda module, given, gradients: None)

    def replaced(model: Any) -> None:
        forward = model.head.forward
        model.head.forward = lambda x: (seen.append(x), forward(x))[1]

    def nothing(model: nn.Module) -> None:
        pass

    assert losses_without_logits(nothing, is_before=False) == 1
    for change in (hook, backward_hook, replaced):
        assert losses_without_logits(change, is_before=False) == 0
    assert len(seen) == 2
    assert losses_without_logits(hook, is_before=True) == 0
    assert len(seen[2][0, 0]) < IDS
    with torch.nn.modules.module.register_module_forward_hook(lambda module, given, result: None):
        assert losses_without_logits(nothing, is_before=False) == 0


def test_others_on_the_logits_layer(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_watched)


class Nested(nn.Module):
    """The logits layer within a module that others may watch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Embedding(IDS, HIDDEN), nn.Linear(HIDDEN, IDS))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return _reduced(self.inner(ids), labels)


def _watched_around() -> None:
    """Who sees what the module around the logits layer gives sees numbers."""
    spec = LossSpec("inner.1", axis="words")
    plan = HandPlan({"words": AxisSpec()}, {"inner.1": column("words")}, loss=spec)
    ids, labels = _batch()
    for is_watched in (False, True):
        original, model = _pair(Nested(), plan)
        if is_watched:
            model.inner.register_forward_hook(lambda module, given, logits: logits.mul_(2))
            original.inner.register_forward_hook(lambda module, given, logits: logits * 2)
        with patch.object(Origin, "loss", autospec=True, side_effect=Origin.loss) as loss:
            for one in (original, model):
                one(ids, labels).backward()
        assert loss.call_count == (0 if is_watched else 1)
        _compare(original, model)


def test_others_on_the_module_around(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_watched_around)


def _half() -> None:
    """Gradients in half precision are as close to exact ones as those of all logits, whatever their scale."""
    ids, labels = _batch(64)
    for dtype, is_fused in ((torch.float16, False), (torch.bfloat16, True)):
        exact, _ = _pair(Reader(_shifted))
        with torch.no_grad():
            for parameter in exact.parameters():
                parameter.copy_(parameter.to(dtype))
        exact(ids, labels).backward()
        errors = []
        for fused in (True, False):
            _, model = _pair(Reader(_shifted), replace(PLAN, loss=replace(SPEC, fused=fused)), dtype)
            with patch.object(Origin, "loss", autospec=True, side_effect=Origin.loss) as loss:
                (model(ids, labels) * 64).backward()
            assert loss.call_count == (fused and is_fused)
            found = assemble(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            errors.append(
                [float((found[n] / 64 - p.grad).norm() / p.grad.norm()) for n, p in exact.named_parameters()]
            )
        assert sum(errors[0]) < 1.5 * sum(errors[1]) < 0.06, (dtype, errors)


def test_half_precision(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_half)


def _autocast() -> None:
    original, model = _pair(Reader(lambda m, x, y: _reduced(x, y)), dtype=torch.float32)
    ids, labels = _batch()
    for one in (original, model):
        with torch.autocast("cpu", torch.bfloat16):
            one.value = one(ids, labels)
            one.outside = one.head(one.body(one.embedding(ids)).tanh())
        one.value.backward()
    torch.testing.assert_close(model.value, original.value, rtol=1e-2, atol=0)
    _compare(original, model, 5e-2)


def test_autocast(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_autocast)


class TwoHeads(nn.Module):
    """Another layer reads the value from which the logits are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(IDS, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, IDS)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 1)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.norm(self.embedding(ids))
        logits = self.head(hidden)
        value = self.down(torch.relu(self.up(hidden)))
        return F.cross_entropy(logits.view(-1, IDS), labels.view(-1)), value, logits


def _two_heads() -> None:
    ids, labels = _batch()
    model = TwoHeads()
    example = Example((), {"ids": ids, "labels": labels})
    plan = derive_plan(model, {"training": example}, 2)
    assert plan.loss is not None
    # the gradient is reduced once for both
    assert [tuple(map(str, entry.places)) for entry in plan.entries] == [("input 0 of head", "input 0 of up")]
    original, model = _pair(model, plan)
    for _ in range(2):
        with patch.object(Origin, "get", autospec=True, side_effect=Origin.get) as get:
            for one in (original, model):
                loss, value, _ = one(ids=ids, labels=labels)
                (loss + (value * torch.arange(24.0).view(3, 8, 1)).sum()).backward()
        assert get.call_count == 0
        _compare(original, model)


def test_another_layer_reads_the_same(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_two_heads)
