"""Calling a program's own function, forward and backward, on random tensors of given shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from colrow.trace.integers import TracedInt
from colrow.trace.tree import map_leaves, tensors_of

Gradients: TypeAlias = list[Tensor | None]


@dataclass(frozen=True)
class Given:
    """A tensor among the arguments of a function, without its data.

    Attributes:
        shape, dtype: as traced.
        differentiable: whether a gradient is asked for.
        content: the data, where that is known and no gradient is.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool
    content: Tensor | None = None


@dataclass(frozen=True)
class Trial:
    """How to call a function.

    Attributes:
        function: with its own backward.
        forward: the same computation, whose derivative autograd can take; ``None`` if there is no such thing.
        arguments, keywords: :class:`Given` in place of tensors.
    """

    function: Callable[..., Any]
    forward: Callable[..., Any] | None
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def key(self) -> str:
        """The same for calls that are alike."""

        def text(leaf: Any) -> Any:
            if isinstance(leaf, Given):
                known = None if leaf.content is None else leaf.content.tolist()
                return ("tensor", leaf.shape, str(leaf.dtype), leaf.differentiable, known)
            return int.__int__(leaf) if isinstance(leaf, TracedInt) else leaf

        owner = getattr(self.function, "__self__", self.function)
        return f"{id(owner)} {map_leaves((self.arguments, self.keywords), text)!r}"


@dataclass(frozen=True)
class Finding:
    """What was found out.

    Attributes:
        is_derivative: whether the backward is the derivative of the forward.
        is_linear: whether it is linear in the gradient.
        free: the dimensions along which each index of all tensors, which have one shape, is on its own;
            ``None`` if there is no telling.
        why: why it could not be tried, if so.
    """

    is_derivative: bool
    is_linear: bool
    free: tuple[int, ...] | None
    why: str = ""


def givens_of(trial: Trial) -> list[Given]:
    """The tensors among the arguments, in order."""
    found: list[Given] = []

    def collect(leaf: Any) -> Any:
        if isinstance(leaf, Given):
            found.append(leaf)
        return leaf

    map_leaves((trial.arguments, trial.keywords), collect)
    return found


class Runs:
    """Calls of a function on random tensors.

    Args:
        trial: how to call it.
        dtype: of all floating-point tensors.
        shrink: maps each extent to the one that it is tried with.

    Attributes:
        givens, shapes: the tensors among the arguments, and the shapes with which they are tried.
        is_positive: whether inputs are positive numbers only, as a logarithm needs them.
        differentiable: indices of the results that carry gradients.
    """

    def __init__(self, trial: Trial, dtype: torch.dtype, shrink: Callable[[int], int]) -> None:
        self.trial, self.dtype = trial, dtype
        self.givens = givens_of(trial)
        self.shapes = [tuple(map(shrink, one.shape)) for one in self.givens]
        self.is_positive = False
        self.generator = torch.Generator()
        self.differentiable: list[int] = []

    def inputs(self, magnitude: float, seed: int = 0) -> list[Tensor]:
        """Random tensors in place of the arguments."""
        self.generator.manual_seed(seed)
        return [
            self._made(given, shape, magnitude) for given, shape in zip(self.givens, self.shapes, strict=True)
        ]

    def _made(self, given: Given, shape: tuple[int, ...], magnitude: float) -> Tensor:
        if given.content is not None and given.content.shape == shape:
            return given.content.clone()
        if given.dtype == torch.bool:
            return torch.rand(shape, generator=self.generator) > 0.5
        if not (given.dtype.is_floating_point or given.dtype.is_complex):
            return torch.zeros(shape, dtype=given.dtype)
        dtype = self.dtype.to_complex() if given.dtype.is_complex else self.dtype
        if self.is_positive:
            return magnitude * (0.5 + torch.rand(shape, generator=self.generator, dtype=self.dtype)).to(dtype)
        return magnitude * torch.randn(shape, generator=self.generator, dtype=dtype)

    def call(self, function: Callable[..., Any], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs that carry gradients and the results that do; the seed is always the same."""
        torch.default_generator.manual_seed(0)
        leaves = [
            tensor.detach().requires_grad_(given.differentiable)
            for tensor, given in zip(inputs, self.givens, strict=True)
        ]
        # copies, that a function may write into
        copies = iter([leaf.clone() for leaf in leaves])

        def build(leaf: Any) -> Any:
            if isinstance(leaf, Given):
                return next(copies)
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            return int.__int__(leaf) if isinstance(leaf, TracedInt) else leaf

        arguments, keywords = map_leaves((self.trial.arguments, self.trial.keywords), build)
        results = tensors_of(function(*arguments, **keywords))
        return [leaf for leaf in leaves if leaf.requires_grad], results

    def results(self, inputs: list[Tensor]) -> list[Tensor]:
        """What the function gives."""
        _, results = self.call(self.trial.function, inputs)
        return [one.detach() for one in results]

    def gradients(
        self, function: Callable[..., Any], inputs: list[Tensor], cotangents: list[Tensor]
    ) -> Gradients:
        """Of the inputs that carry some, for cotangents of the results that do."""
        leaves, results = self.call(function, inputs)
        pairs = [
            (one, cotangent)
            for one, cotangent in zip(self.carrying(results), cotangents, strict=True)
            if one.requires_grad
        ]
        if not pairs:
            return [None] * len(leaves)
        roots, given = zip(*pairs, strict=True)
        return list(torch.autograd.grad(roots, leaves, [one.clone() for one in given], allow_unused=True))

    def carrying(self, results: list[Tensor]) -> list[Tensor]:
        """The results for which there are cotangents: those that carry gradients from the function."""
        return [results[index] for index in self.differentiable]

    def cotangents(self, results: list[Tensor], seed: int) -> list[Tensor]:
        """Random gradients of the results."""
        self.generator.manual_seed(1000 + seed)
        return [torch.randn(one.shape, generator=self.generator, dtype=one.dtype) for one in results]

    def written(self, inputs: list[Tensor], cotangents: list[Tensor]) -> Gradients:
        """What the function's own backward gives."""
        return self.gradients(self.trial.function, inputs, cotangents)

    def is_finite(self) -> bool:
        """Whether results and gradients are; finds out which results carry gradients."""
        inputs = self.inputs(1.0)
        _, results = self.call(self.trial.function, inputs)
        self.differentiable = [
            index for index, one in enumerate(results) if one.requires_grad and is_number(one)
        ]
        carrying = self.carrying(results)
        found = self.written(inputs, self.cotangents(carrying, 0))
        return self.are_finite([*carrying, *found])

    def are_finite(self, tensors: Gradients) -> bool:
        """Whether all numbers are."""
        return all(bool(one.isfinite().all()) for one in tensors if one is not None)


def is_number(tensor: Tensor) -> bool:
    """Whether a tensor is of numbers that may have gradients."""
    return tensor.is_floating_point() or tensor.is_complex()
