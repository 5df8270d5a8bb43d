"""Fused linear layer and cross-entropy against both of torch: every option, gradient and number of chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import colrow
from colrow.collectives import Enter, communicator
from colrow.layers import cross_entropy, linear_cross_entropy, linear_functions, loss_chunks
from colrow.layers.linear_cross_entropy import column_cross_entropy
from colrow.layers.linear_functions import ColumnWeights
from colrow.layers.loss_chunks import tokens_per_chunk
from colrow.layers.products import Products
from colrow.layout import Cut
from tests.pool import Pool, worker_mesh

SIZES = [1, 2, 3, 4]
FEATURES = 5


@contextmanager
def _chunks_of(tokens: int) -> Iterator[None]:
    """Few tokens at a time, and few ids where gradients of the weight are added up."""
    with (
        patch.object(loss_chunks, "TOKENS_AT_LEAST", tokens),
        patch.object(linear_functions, "FEATURES_PER_BLOCK", 4),
    ):
        yield


class Problem:
    """Operands of the whole, this rank's parts of them, and targets of which some are ignored."""

    def __init__(
        self, size: int, vocabulary: int, dtype: torch.dtype = torch.float64, tokens: int = 18
    ) -> None:
        self.mesh = worker_mesh(size)
        self.ranks = communicator(self.mesh)
        self.cut = Cut.balanced(vocabulary, size)
        generator = torch.Generator().manual_seed(vocabulary)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        shape = (2, tokens // 2)
        self.x = random(*shape, FEATURES)
        self.weight, self.bias = random(vocabulary, FEATURES), random(vocabulary)
        self.target = torch.randint(vocabulary, shape, generator=generator)
        self.target[0, 3] = self.target[1, 0] = -100
        self.class_weight = torch.rand(vocabulary, dtype=torch.float64, generator=generator)
        self.cotangent = random(*shape)

    def whole(self) -> list[Tensor]:
        return [one.clone().requires_grad_() for one in (self.x, self.weight, self.bias)]

    def part(self) -> list[Tensor]:
        own = slice(self.cut.start(self.ranks.rank), self.cut.stop(self.ranks.rank))
        return [one.clone().requires_grad_() for one in (self.x, self.weight[own], self.bias[own])]

    def compare(self, whole: list[Tensor], part: list[Tensor], tolerance: float = 1e-11) -> None:
        own = slice(self.cut.start(self.ranks.rank), self.cut.stop(self.ranks.rank))
        for index, (ours, theirs) in enumerate(zip(part, whole, strict=True)):
            assert (ours.grad is None) == (theirs.grad is None)
            if theirs.grad is not None:
                expected = theirs.grad if index == 0 else theirs.grad[own]
                assert ours.grad is not None
                torch.testing.assert_close(ours.grad.to(expected), expected, rtol=tolerance, atol=tolerance)


def _softcap(logits: Tensor) -> Tensor:
    return 3 * torch.tanh(logits / 3) - 0.1


def _options(size: int, vocabulary: int) -> None:
    problem = Problem(size, vocabulary)
    weights = (None, problem.class_weight)
    reductions = ("mean", "sum", "none")
    options = product((0.0, 0.1), weights, reductions, (None, _softcap), (0.0, 1e-2), (3, 18))
    for smoothing, class_weight, reduction, change, z_loss, chunk in options:
        common: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
        whole, part = problem.whole(), problem.part()
        logits = F.linear(*whole)
        logits = logits if change is None else change(logits)
        flat, target = logits.flatten(0, 1), problem.target.flatten()
        expected = F.cross_entropy(flat, target, weight=class_weight, **common)
        squares = torch.where(target == -100, 0, torch.logsumexp(flat, 1) ** 2)
        counted = torch.ones(vocabulary) if class_weight is None else class_weight
        kept = counted[target[target >= 0]].sum()
        total = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / kept}
        expected = expected + z_loss * total[reduction]
        with _chunks_of(chunk):
            found = linear_cross_entropy(
                *part,
                problem.target,
                problem.mesh,
                vocabulary=problem.cut,
                class_weight=class_weight,
                change=change,
                z_loss=z_loss,
                **common,
            )
        torch.testing.assert_close(found.flatten(), expected.flatten(), rtol=1e-12, atol=1e-12)
        factor = problem.cotangent if reduction == "none" else problem.cotangent[0, 0]
        (expected.view(found.shape) * factor).sum().backward()
        (found * factor).sum().backward()
        problem.compare(whole, part)
        with torch.no_grad(), _chunks_of(chunk):
            again = linear_cross_entropy(
                *part,
                problem.target,
                problem.mesh,
                vocabulary=problem.cut,
                class_weight=class_weight,
                change=change,
                z_loss=z_loss,
                **common,
            )
        torch.testing.assert_close(again, found.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", SIZES)
def test_all_options(ranks: Callable[[int], Pool], size: int) -> None:
    for vocabulary in (31, 3):  # with 3 ids, one of 4 ranks holds none
        ranks(size).run(_options, size, vocabulary)


def _operands(size: int) -> None:
    """Operands that get no gradient, in every combination; no bias; a weight that lies as Conv1D's."""
    problem = Problem(size, 11)
    for wanted, biased, out_first, entered in product(
        product((True, False), repeat=3), (True, False), (True, False), (True, False)
    ):
        whole, part = problem.whole(), problem.part()
        for one, other, is_wanted in zip(whole, part, wanted, strict=True):
            one.requires_grad_(is_wanted)
            other.requires_grad_(is_wanted)
        x, weight, bias = part
        layer = ColumnWeights(problem.ranks, "enter", out_first, Products(), entered)
        expected = F.cross_entropy(
            F.linear(whole[0], whole[1], whole[2] if biased else None).flatten(0, 1), problem.target.flatten()
        )
        with _chunks_of(4):
            found = column_cross_entropy(
                Enter(problem.ranks, "entered")(x) if entered else x,
                weight if out_first else weight.t(),
                bias if biased else None,
                problem.target,
                layer,
                vocabulary=problem.cut,
            )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert found.requires_grad == expected.requires_grad
        if found.requires_grad:
            (expected * 0.3).backward()
            (found * 0.3).backward()
            problem.compare(whole, part)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_operands(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_operands, size)


def _backwards() -> None:
    """Several backward passes of one loss, and gradients that are added to others."""
    problem = Problem(2, 11)
    whole, part = problem.whole(), problem.part()
    expected = F.cross_entropy(F.linear(*whole).flatten(0, 1), problem.target.flatten())
    with _chunks_of(4):
        found = linear_cross_entropy(*part, problem.target, problem.mesh, vocabulary=11)

    def again(*operands: Tensor) -> Tensor:
        return linear_cross_entropy(*operands, problem.target, problem.mesh, vocabulary=11)

    for factor, retain in ((1.0, True), (0.3, True), (1.0, True), (-2.0, False)):
        for loss in (expected, found):
            (loss * factor).backward(retain_graph=retain)
        problem.compare(whole, part)
    with pytest.raises(RuntimeError, match="second time"):
        (found * 2).backward()
    with _chunks_of(4):
        found = linear_cross_entropy(*part, problem.target, problem.mesh, vocabulary=11)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(found, part, create_graph=True)
        expected = F.cross_entropy(F.linear(*whole).flatten(0, 1), problem.target.flatten())
        # recomputed by activation checkpointing
        for reentrant in (True, False):
            recomputed = checkpoint(again, *part, use_reentrant=reentrant)
            (expected * 0.7).backward(retain_graph=True)
            (recomputed * 0.7).backward()
            problem.compare(whole, part)


def test_backwards(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_backwards)


def _extremes() -> None:
    """Infinite logits, of ignored tokens too; one rank with nothing but minus infinity; nothing counted."""
    mesh = worker_mesh(2)
    rank = communicator(mesh).rank
    inf = torch.inf
    rows = torch.tensor(
        [
            [1e4, -1e4, 0, 0, 0, 1e4],
            [-inf, -inf, -inf, 5, 5, 5],
            [-inf, 1, 2, -inf, 3, 4],
            [inf, inf, inf, inf, -inf, 0],
        ],
        dtype=torch.float64,
    ).repeat(3, 1)
    target = torch.tensor([0, 4, 2, -100]).repeat(3)
    # logits that no product of finite numbers gives come by the change
    whole = rows[:, 3 * rank : 3 * rank + 3]
    x = torch.randn(12, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for chunk in (4, 12):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        weight = torch.full((6, FEATURES), 0.1, dtype=torch.float64)
        expected = F.cross_entropy((F.linear(a, weight) + rows)[target >= 0], target[target >= 0])
        seen: list[int] = []

        def change(logits: Tensor, seen: list[int] = seen) -> Tensor:
            begin = sum(seen) % 12
            seen.append(len(logits))
            return logits + whole[begin : begin + len(logits)]

        with _chunks_of(chunk):
            found = linear_cross_entropy(b, weight[:3], None, target, mesh, vocabulary=6, change=change)
            with torch.no_grad():
                again = linear_cross_entropy(b, weight[:3], None, target, mesh, vocabulary=6, change=change)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(again, expected.detach(), rtol=1e-12, atol=1e-12)
        expected.backward()
        found.backward()
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-11, atol=1e-15)
    b = x.clone().requires_grad_()
    ignored = linear_cross_entropy(b, weight[:3], None, torch.full((12,), -100), mesh, vocabulary=6)
    assert ignored.isnan()
    ignored.backward()
    assert b.grad is not None
    assert b.grad.abs().max() == 0
    nothing = linear_cross_entropy(x[:0], weight[:3], None, target[:0], mesh, vocabulary=6, reduction="sum")
    assert nothing == 0


def test_extremes(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_extremes)


def _half_precision(factor: float) -> list[float]:
    """Errors of the gradients against double precision: as small as where all logits are computed at once."""
    problem = Problem(2, 31, torch.bfloat16, 512)
    whole = [one.double().detach().requires_grad_() for one in problem.whole()]
    (F.cross_entropy(F.linear(*whole).flatten(0, 1), problem.target.flatten()) * factor).backward()
    own = slice(problem.cut.start(problem.ranks.rank), problem.cut.stop(problem.ranks.rank))
    errors = []
    fused, plain = problem.part(), problem.part()
    with _chunks_of(64):
        found = linear_cross_entropy(*fused, problem.target, problem.mesh, vocabulary=31)
    entered = Enter(problem.ranks, "entered")(plain[0])
    unfused = cross_entropy(F.linear(entered, *plain[1:]), problem.target, problem.mesh, vocabulary=31)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, unfused, rtol=1e-6, atol=1e-6)
    for loss in (found, unfused):
        (loss * factor).backward()
    for index, (theirs, ours, others) in enumerate(zip(whole, fused, plain, strict=True)):
        assert theirs.grad is not None
        exact = theirs.grad if index == 0 else theirs.grad[own]
        assert ours.grad is not None
        assert others.grad is not None
        assert ours.grad.dtype == torch.bfloat16
        errors.append(float((ours.grad - exact).norm() / (others.grad - exact).norm()))
    return errors


# where it is multiplied with, the gradient is rounded once more
@pytest.mark.parametrize(("factor", "most"), [(1.0, 1.1), (0.3, 1.5)])
def test_half_precision(ranks: Callable[[int], Pool], factor: float, most: float) -> None:
    for errors in ranks(2).run(_half_precision, factor):
        assert max(errors) < most


def _autocast() -> None:
    problem = Problem(2, 31, torch.float32)
    results = []
    for fused in (True, False):
        part = problem.part()
        with torch.autocast("cpu", torch.bfloat16), _chunks_of(4):
            if fused:
                loss = linear_cross_entropy(*part, problem.target, problem.mesh, vocabulary=31)
            else:
                entered = Enter(problem.ranks, "entered")(part[0])
                logits = F.linear(entered, *part[1:])
                loss = cross_entropy(logits, problem.target, problem.mesh, vocabulary=31)
        loss.backward()
        results.append((loss, *(one.grad for one in part)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)


def test_autocast(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_autocast)


def _not_fused() -> None:
    """What computes all logits: torch.compile, float16."""
    problem = Problem(2, 31)
    whole, part = problem.whole(), problem.part()
    expected = F.cross_entropy(F.linear(*whole).flatten(0, 1), problem.target.flatten())

    def loss(*operands: Tensor) -> Tensor:
        return linear_cross_entropy(*operands, problem.target, problem.mesh, vocabulary=31)

    torch._dynamo.reset()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(*part)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    (expected * 0.3).backward()
    (found * 0.3).backward()
    problem.compare(whole, part)
    half = Problem(2, 31, torch.float16)
    whole, part = half.whole(), half.part()
    # a scale that keeps small gradients from vanishing is multiplied in before they are rounded
    found = linear_cross_entropy(*part, half.target, half.mesh, vocabulary=31)
    (found * 1e-3).backward()
    expected = F.cross_entropy(F.linear(*whole).float().flatten(0, 1), half.target.flatten())
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


def test_not_fused(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_not_fused)


class _Largest(TorchDispatchMode):
    """The largest number of elements that an operator gave."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def _memory_and_counts() -> dict[str, tuple[int, int]]:
    mesh = worker_mesh(2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4096, FEATURES, generator=generator).requires_grad_()
    weight = torch.randn(100, FEATURES, generator=generator).requires_grad_()
    target = torch.randint(200, (4096,), generator=generator)
    colrow.reset_comm_stats()
    with _Largest() as largest:
        linear_cross_entropy(x, weight, None, target, mesh, vocabulary=200).backward()
    # logits of an eighth of the tokens
    assert largest.elements == 512 * 100
    counted = {
        "/".join(key): (tally.count, tally.bytes) for key, tally in colrow.comm_stats(mesh).tallies.items()
    }
    with _Largest() as largest, torch.no_grad():
        linear_cross_entropy(x, weight, None, target, mesh, vocabulary=200)
    assert largest.elements == 512 * 100
    return counted


def test_memory_and_counts(ranks: Callable[[int], Pool]) -> None:
    for counted in ranks(2).run(_memory_and_counts):
        assert counted == {
            "all_reduce/linear cross-entropy max/forward": (8, 4096 * 4),
            "all_reduce/linear cross-entropy sum/forward": (8, 2 * 4096 * 4),
            "all_reduce/enter linear cross-entropy/backward": (1, 4096 * FEATURES * 4),
        }


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 1), (1, 1), (511, 511), (512, 256), (1024, 256), (2047, 293), (10**5, 12500)]
)
def test_tokens_per_chunk(tokens: int, expected: int) -> None:
    assert tokens_per_chunk(tokens) == expected


def _refused() -> None:
    mesh = worker_mesh(2)
    x, weight = torch.randn(4, FEATURES), torch.randn(4, FEATURES)
    target = torch.tensor([0, 7, 3, 4])
    with pytest.raises(IndexError, match=r"must be in \[0, 8\)"):
        linear_cross_entropy(x, weight, None, target + 1, mesh, vocabulary=8)
    with pytest.raises(ValueError, match="should hold the logits of 8 of 16 ids, got 4"):
        linear_cross_entropy(x, weight, None, target, mesh, vocabulary=16)
    with pytest.raises(ValueError, match=r"logits \[4, 4\] do not fit the target \[3\]"):
        linear_cross_entropy(x, weight, None, target[:3], mesh, vocabulary=8)
    with pytest.raises(ValueError, match="label_smoothing"):
        linear_cross_entropy(x, weight, None, target, mesh, vocabulary=8, label_smoothing=1.0)


def test_refused(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_refused)


def _onednn() -> None:
    """The other library for products, in single precision."""
    problem = Problem(2, 31, torch.float32, 64)
    products = Products(1, 1)
    whole = [one.double().detach().requires_grad_() for one in problem.whole()]
    expected = F.cross_entropy(F.linear(*whole).flatten(0, 1), problem.target.flatten())
    expected.backward()
    for out_first in (True, False):
        x, weight, bias = part = problem.part()
        layer = ColumnWeights(problem.ranks, "enter", out_first, products, False)
        with _chunks_of(16):
            found = column_cross_entropy(
                x, weight if out_first else weight.t(), bias, problem.target, layer, vocabulary=problem.cut
            )
        torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)
        found.backward()
        problem.compare(whole, part, 1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_onednn(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_onednn)
