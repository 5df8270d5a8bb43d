"""What the backward of a program's own function does, found out by trying it on small random tensors.

Three questions, asked of numbers: is it the derivative of the forward, is it linear in the gradient, and
along which dimensions is each index on its own. Gradients and inputs of very different magnitudes are tried:
what clips at some value does nothing far below it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import gcd, prod
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor

from colrow.trace.tree import map_leaves
from colrow.trace.trial import Finding, Given, Gradients, Runs, Trial, givens_of, is_number

LARGEST = 1 << 18
"""Elements, of all tensors together, up to which a function is tried as it was called."""

_LEAST = 8
"""Extents are made smaller, but not smaller than this, where a function is called with larger tensors."""

_MAGNITUDES = (1.0, 30.0, 0.03)
_GRADIENTS = (1.0, 1e-6, 1e-3, 1e3, 1e6)
_PLAIN = (str, bytes, bool, int, float, complex, type(None), type, BuiltinFunctionType)


def examine(trial: Trial) -> Finding:
    """Find out. Nothing is left behind: generators of random numbers are as they were."""
    strange = _strange(trial)
    if strange:
        return Finding(False, False, None, strange)
    why = ""
    with _undisturbed():
        for dtype in (torch.float64, torch.float32):
            shrink = _shrinking(trial)
            if shrink is None:
                return Finding(False, False, None, "its tensors are too large to try it")
            try:
                examination = _Examination(Runs(trial, dtype, shrink))
                finding = examination.run()
                if finding.is_derivative and not _is_derivative_when_smaller(trial, dtype, shrink):
                    return examination.without_derivative()
                return finding
            except Exception as error:  # whatever a function does with tensors that are not those it is for
                first = (str(error).splitlines() or [""])[0]
                why = f"it could not be tried on the CPU ({type(error).__name__}: {first})"
    return Finding(False, False, None, why)


def _strange(trial: Trial) -> str:
    """What among the arguments is neither a tensor nor plain data, and might be changed by a call."""
    found: list[str] = []

    def look(leaf: Any) -> Any:
        bare = isinstance(leaf, FunctionType) and not leaf.__closure__
        plain = isinstance(
            leaf, (Given, torch.dtype, torch.device, torch.layout, torch.memory_format, *_PLAIN)
        )
        if not plain and not bare:
            found.append(f"it is given a {type(leaf).__name__}, so it cannot be tried without it")
        return leaf

    map_leaves((trial.arguments, trial.keywords), look)
    return found[0] if found else ""


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Real tensors with gradients on the CPU in this context, and random numbers as before after it."""
    drawn = random.getstate()
    generator = torch.default_generator
    state = generator.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        try:
            yield
        finally:
            generator.set_state(state)
            random.setstate(drawn)


def _shrinking(trial: Trial) -> Callable[[int], int] | None:
    """How to make extents smaller, all by the same divisor; ``None`` if that is not enough."""
    shapes = [one.shape for one in givens_of(trial)]
    if sum(map(prod, shapes)) <= LARGEST:
        return lambda extent: extent
    large = {extent for shape in shapes for extent in shape if extent >= 8 * _LEAST}
    common = gcd(*large)
    for divisor in range(2, common + 1):
        if common % divisor == 0 and min(large) // divisor >= _LEAST:
            total = sum(
                prod(extent // divisor if extent in large else extent for extent in shape) for shape in shapes
            )
            if total <= LARGEST:
                return lambda extent: extent // divisor if extent in large else extent
    return None


def _is_derivative_when_smaller(trial: Trial, dtype: torch.dtype, shrink: Callable[[int], int]) -> bool:
    """Whether the backward is the derivative with each extent halved too, where it can be.

    One that divides by an extent, in place of a number that its forward was given, is that only as long as
    the extent is not cut.
    """
    extents = {shrink(extent) for given in givens_of(trial) for extent in given.shape}
    for halved in sorted(extent for extent in extents if extent > 1):

        def smaller(extent: int, halved: int = halved) -> int:
            return halved // 2 if shrink(extent) == halved else shrink(extent)

        try:
            if not _Examination(Runs(trial, dtype, smaller)).run().is_derivative:
                return False
        except Exception:  # a function that is only for what it is given: this cannot be cut without an error
            continue
    return True


class _Examination:
    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._exact = 1e-9 if runs.dtype == torch.float64 else 1e-5
        self._rough = 1e-4 if runs.dtype == torch.float64 else 1e-3

    def run(self) -> Finding:
        if not self._runs.is_finite():
            self._runs.is_positive = True
            if not self._runs.is_finite():
                raise ValueError("it gives no finite numbers for random ones")
        if self._is_derivative():
            return Finding(True, True, None)
        return self.without_derivative()

    def without_derivative(self) -> Finding:
        """What there is to know of a backward that is no derivative."""
        return Finding(False, self._is_linear(), self._free())

    # ---------------------------------------------------------------- calling

    def _is_derivative(self) -> bool:
        forward = self._runs.trial.forward
        if forward is not None:
            try:
                if self._agrees(lambda inputs, given: self._runs.gradients(forward, inputs, given), forward):
                    return True
            except Exception:  # the forward alone may do what autograd cannot follow
                pass
        return self._agrees_with_differences()

    def _agrees(
        self,
        derivative: Callable[[list[Tensor], list[Tensor]], Gradients],
        forward: Callable[..., Any],
    ) -> bool:
        for number, magnitude in enumerate(_MAGNITUDES):
            inputs = self._runs.inputs(magnitude, number)
            results = self._runs.results(inputs)
            if not self._runs.are_finite([*filter(is_number, results)]):
                continue
            _, others = self._runs.call(forward, inputs)
            if not all(map(self._close, results, [one.detach() for one in others])):
                return False
            for cotangents in self._scaled(self._runs.cotangents(self._runs.carrying(results), number)):
                written = self._runs.written(inputs, cotangents)
                if not all(map(self._matches, written, derivative(inputs, cotangents))):
                    return False
        return True

    @staticmethod
    def _scaled(cotangents: list[Tensor]) -> Iterator[list[Tensor]]:
        for scale in _GRADIENTS:
            yield [scale * one for one in cotangents]

    def _close(self, one: Tensor, other: Tensor) -> bool:
        if one.shape != other.shape:
            return False
        if not is_number(one):
            return torch.equal(one, other)
        limit = self._rough * max(float(one.norm()), float(other.norm()))
        return float((one - other).norm()) <= limit

    def _matches(self, written: Tensor | None, derived: Tensor | None) -> bool:
        """Whether a written gradient is the derived one; to give none is no gradient, and always right."""
        if written is None:
            return True
        return self._close(written, torch.zeros_like(written) if derived is None else derived)

    def _agrees_with_differences(self) -> bool:
        """As :meth:`_agrees`, with differences of results in random directions."""
        for number, magnitude in enumerate(_MAGNITUDES):
            inputs = self._runs.inputs(magnitude, number)
            results = self._runs.results(inputs)
            if not self._runs.are_finite([*filter(is_number, results)]):
                continue
            for seed, cotangents in enumerate(
                self._scaled(self._runs.cotangents(self._runs.carrying(results), number))
            ):
                written = self._runs.written(inputs, cotangents)
                if not self._differences_match(inputs, cotangents, written, magnitude, seed):
                    return False
        return True

    def _differences_match(
        self, inputs: list[Tensor], cotangents: list[Tensor], written: Gradients, magnitude: float, seed: int
    ) -> bool:
        step = magnitude * (1e-6 if self._runs.dtype == torch.float64 else 1e-3)
        self._runs.generator.manual_seed(2000 + seed)
        gradients = iter(written)
        directions = []
        for tensor, given in zip(inputs, self._runs.givens, strict=True):
            direction = None
            if given.differentiable and next(gradients, None) is not None:
                direction = torch.randn(tensor.shape, generator=self._runs.generator, dtype=tensor.dtype)
            directions.append(direction)
        sides = []
        for sign in (1, -1):
            moved = [
                tensor if direction is None else tensor + sign * step * direction
                for tensor, direction in zip(inputs, directions, strict=True)
            ]
            sides.append(self._runs.carrying(self._runs.results(moved)))
        expected = sum(
            float((cotangent.conj() * (above - below)).real.sum()) / (2 * step)
            for cotangent, above, below in zip(cotangents, *sides, strict=True)
        )
        differentiable = zip(directions, self._runs.givens, strict=True)
        moving = [direction for direction, given in differentiable if given.differentiable]
        pairs = [
            (one, direction)
            for one, direction in zip(written, moving, strict=True)
            if one is not None and direction is not None
        ]
        found = sum(float((one.conj() * direction).real.sum()) for one, direction in pairs)
        size = max((float(one.norm()) for one, _ in pairs), default=0.0)
        return abs(found - expected) <= self._rough * max(abs(expected), size)

    def _is_linear(self) -> bool:
        for number, magnitude in enumerate(_MAGNITUDES):
            inputs = self._runs.inputs(magnitude, number)
            carrying = self._runs.carrying(self._runs.results(inputs))
            if not self._runs.are_finite(list(carrying)):
                continue
            pairs = (self._scaled(self._runs.cotangents(carrying, seed)) for seed in (number, 10 + number))
            for first, second in zip(*pairs, strict=True):
                sums = [a + b for a, b in zip(first, second, strict=True)]
                found = [self._runs.written(inputs, one) for one in (first, second, sums)]
                if not all(map(self._adds_up, *found)):
                    return False
        return True

    def _adds_up(self, one: Tensor | None, other: Tensor | None, both: Tensor | None) -> bool:
        if one is None or other is None or both is None:
            return one is None and other is None and both is None
        # element by element: a large one may not hide a small one
        limit = self._rough * (one.abs() + other.abs() + 1e-3 * both.norm() / max(1, both.numel()) ** 0.5)
        return bool(((both - one - other).abs() <= limit).all())

    def _free(self) -> tuple[int, ...] | None:
        """The dimensions of which some indices alone give the same as together with the others."""
        results = self._runs.results(self._runs.inputs(1.0))
        shapes = {tuple(results[index].shape) for index in self._runs.differentiable}
        if len(shapes) != 1 or len(self._runs.differentiable) != len(results):
            return None
        (shape,) = shapes
        for given, own in zip(self._runs.givens, self._runs.shapes, strict=True):
            if own != shape and (given.differentiable or prod(own) != 1):
                return None
        return tuple(
            dimension
            for dimension, extent in enumerate(shape)
            if extent > 1 and self._is_free(shape, dimension)
        )

    def _is_free(self, shape: tuple[int, ...], dimension: int) -> bool:
        extent = shape[dimension]
        for number, magnitude in enumerate(_MAGNITUDES):
            inputs = self._runs.inputs(magnitude, number)
            results = self._runs.results(inputs)
            if not self._runs.are_finite(list(results)):
                continue
            for seed, cotangents in enumerate(self._scaled(self._runs.cotangents(results, number))):
                self._runs.generator.manual_seed(3000 + seed)
                count = max(1, extent // 2 if seed % 2 else extent - 1)
                chosen = torch.randperm(extent, generator=self._runs.generator)[:count]

                def part(tensor: Tensor, chosen: Tensor = chosen) -> Tensor:
                    return tensor.index_select(dimension, chosen) if tensor.shape == shape else tensor

                whole = self._runs.written(inputs, cotangents)
                some = [part(tensor) for tensor in inputs]
                alone = self._runs.written(some, [part(one) for one in cotangents])
                pairs = [*zip(results, self._runs.results(some), strict=True)]
                pairs += [
                    (one, other)
                    for one, other in zip(whole, alone, strict=True)
                    if one is not None and other is not None
                ]
                if [one is None for one in whole] != [one is None for one in alone]:
                    return False
                if not all(self._same(part(one), other) for one, other in pairs):
                    return False
        return True

    def _same(self, one: Tensor, other: Tensor) -> bool:
        if one.shape != other.shape:
            return False
        smallest = 1e-3 * self._exact * float(one.abs().max()) if one.numel() else 0.0
        return torch.allclose(one, other, rtol=self._exact, atol=smallest, equal_nan=True)
