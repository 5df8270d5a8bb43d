"""Trying whether a module computes as experts do: on a few random tokens, with a few random experts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from colrow.trace.meta import copy_with_tensors

if TYPE_CHECKING:
    from colrow.parallel.experts.find import Argument

_EXPERTS = 3
_TOKENS = 7
_LARGE = 1 << 26
"""Elements of an expert from which a trial is made in float32, to take less memory."""


class _Failed(Exception):
    """What a module did not do."""


def try_experts(
    module: nn.Module,
    count: int,
    places: tuple[Argument, Argument, Argument],
    features: int,
    choices: int,
) -> tuple[str, ...] | str:
    """The attributes that become a rank's number of experts; or, as a sentence, why there is no dividing.

    A copy of the module with a few experts, whose weights are random, must give the sum over the choices of
    what it gives for each alone; what it gives for one token must not depend on the others; and a copy that
    has some of those experts only must give the same for tokens that chose them.

    Args:
        module: with parameters [count, ...]; not changed.
        count: number of experts.
        places: of tokens, choices and weights among its arguments.
        features: of a token.
        choices: of a token.
    """
    if count < 2:
        return f"it has {count} expert: there is nothing to divide"
    elements = sum(prod(one.shape[1:]) for one in module.parameters())
    # grouped products of torch take no float64
    dtypes = [torch.float32] if elements > _LARGE else [torch.float64, torch.float32]
    named = [
        name
        for name, item in vars(module).items()
        if isinstance(item, int) and not isinstance(item, bool) and item == count
    ]
    reason = ""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for dtype in dtypes:
            reason = ""
            torch.manual_seed(0)
            trial = _Trial(module, min(count, _EXPERTS), places, features, choices, dtype)
            for attributes in _subsets(named):
                try:
                    trial.run(attributes)
                    return attributes
                except _Failed as failure:
                    reason = str(failure)
                except Exception as error:  # other numbers of experts may be anything to a program
                    reason = reason or f"with fewer experts it raises {type(error).__name__}: {error}"
    return reason


def _subsets(names: list[str]) -> Iterator[tuple[str, ...]]:
    """All of them first."""
    for size in range(len(names), -1, -1):
        yield from combinations(names, size)


class _Trial:
    def __init__(
        self,
        module: nn.Module,
        experts: int,
        places: tuple[Argument, Argument, Argument],
        features: int,
        choices: int,
        dtype: torch.dtype,
    ) -> None:
        self._module, self._places, self._dtype = module, places, dtype
        self._tolerance = 1e-9 if dtype == torch.float64 else 1e-3
        self._weights = {
            name: torch.randn(experts, *one.shape[1:], dtype=dtype) / max(one.shape[-1], 1) ** 0.5
            for name, one in module.named_parameters()
        }
        self._experts = experts
        self._x = torch.randn(_TOKENS, features, dtype=dtype)
        k = min(choices, experts)
        self._index = torch.rand(_TOKENS, experts).argsort(1)[:, :k]
        self._w = torch.rand(_TOKENS, k, dtype=dtype) + 0.1

    def run(self, attributes: tuple[str, ...]) -> None:
        """Raises if the module, its ``attributes`` set to the number of experts, does not compute so."""
        whole = self._copy(0, self._experts, attributes)
        x, index, w = self._x, self._index, self._w
        expected = self._call(whole, x, index, w)
        if not expected.abs().max() > 0:
            raise _Failed("its result is zero for random tokens and weights")
        alone = sum(self._call(whole, x, index[:, [j]], w[:, [j]]) for j in range(index.shape[1]))
        assert isinstance(alone, Tensor)
        self._same(alone, expected, "its result is not the sum over each token's choices")
        order = torch.randperm(_TOKENS)[: _TOKENS - 2]
        self._same(
            self._call(whole, x[order], index[order], w[order]),
            expected[order],
            "its result for a token depends on the other tokens",
        )
        swapped = index.roll(1, 0)
        if torch.equal(swapped, index) or self._is_same(self._call(whole, x, swapped, w), expected):
            raise _Failed("its result does not depend on the choices")
        for low in range(self._experts):
            for high in range(low + 1, self._experts + 1):
                self._part(low, high, attributes, whole)

    def _part(self, low: int, high: int, attributes: tuple[str, ...], whole: nn.Module) -> None:
        """Tokens that chose some experts, with these alone."""
        token, choice = ((self._index >= low) & (self._index < high)).nonzero(as_tuple=True)
        if not len(token):
            return
        x, index, w = self._x[token], self._index[token, choice, None], self._w[token, choice, None]
        self._same(
            self._call(self._copy(low, high, attributes), x, index - low, w),
            self._call(whole, x, index, w),
            "some of its experts alone do not compute what they do among all",
        )

    def _copy(self, low: int, high: int, attributes: tuple[str, ...]) -> nn.Module:
        memo: dict[int, object] = {
            id(one): nn.Parameter(self._weights[name][low:high].clone(), requires_grad=False)
            for name, one in self._module.named_parameters()
        }

        def change(tensor: Tensor) -> Tensor:
            if tensor.is_meta:
                return torch.ones(tensor.shape, dtype=tensor.dtype)
            new = tensor.detach().cpu().clone()
            return new.to(self._dtype) if new.is_floating_point() else new

        made = copy_with_tensors(self._module, change, memo)
        for name in attributes:
            setattr(made, name, high - low)
        return made.eval()

    def _call(self, module: nn.Module, x: Tensor, index: Tensor, w: Tensor) -> Tensor:
        arguments: dict[int, Tensor] = {}
        keywords: dict[str, Tensor] = {}
        for place, value in zip(self._places, (x.clone(), index.clone(), w.clone()), strict=True):
            if place.name is not None:
                keywords[place.name] = value
            elif place.position is not None:
                arguments[place.position] = value
        if arguments and sorted(arguments) != list(range(len(arguments))):
            raise _Failed("its arguments are given in a way that is not understood")
        result = module(*(arguments[position] for position in sorted(arguments)), **keywords)
        if not isinstance(result, Tensor) or result.shape != x.shape:
            raise _Failed("its result does not have the tokens' shape")
        return result

    def _is_same(self, one: Tensor, other: Tensor) -> bool:
        return bool((one - other).abs().max() <= self._tolerance * other.abs().max())

    def _same(self, one: Tensor, other: Tensor, reason: str) -> None:
        if not self._is_same(one, other):
            raise _Failed(reason)
