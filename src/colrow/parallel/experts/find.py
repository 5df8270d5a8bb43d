"""Which modules of a model hold experts, and what the tokens are that are given to them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from colrow.errors import PlanError
from colrow.parallel.experts.trial import try_experts
from colrow.plan.derive import record
from colrow.trace import Example
from colrow.trace.records import ModuleCall, Trace, Value

_HINT = (
    "Experts can be divided where one module has the weights of all of them stacked, [experts, ...], and is "
    "called with tokens [tokens, features], choices and their weights, both [tokens, choices]. Make the mesh "
    "without ep; tensor parallelism cuts inside experts"
)


@dataclass(frozen=True)
class Argument:
    """Where a module's argument stands: callers may give it by position or by name.

    Attributes:
        position: among the positional arguments; ``None`` if it has none.
        name: ``None`` if it has none.
    """

    position: int | None
    name: str | None


@dataclass(frozen=True)
class Experts:
    """A module with the stacked weights of experts.

    Attributes:
        path: of the module.
        count: how many experts it has: the extent of dimension 0 of all its parameters.
        tokens: the argument that is [tokens, features].
        index: [tokens, choices], integers below ``count``.
        weights: [tokens, choices], what each choice counts.
        attributes: of the module, which become the number of experts that a rank holds.
    """

    path: str
    count: int
    tokens: Argument
    index: Argument
    weights: Argument
    attributes: tuple[str, ...]


def find_experts(model: nn.Module, examples: Mapping[str, Example]) -> tuple[Experts, ...]:
    """All modules of ``model`` that compute token by token with a few of many experts.

    They are found by what they are given in a call of the model, and each kind is tried on small random
    tokens: whether its result is the sum over the choices of what an expert makes of the token, and whether
    some of the experts can do their part without the others.

    Args:
        model: whole, real or on the meta device; not changed.
        examples: calls of it by mode.

    Raises:
        PlanError: if there are none, or one of them does not compute so.
    """
    trace = record(model, examples)
    found = experts_of(model, trace)
    if not found:
        raise PlanError("", _why_none(trace), _HINT + ".")
    return tuple(found.values())


def experts_of(model: nn.Module, trace: Trace) -> dict[str, Experts]:
    """:func:`find_experts`, by path, of a model that has been recorded; empty if there are none.

    Raises:
        PlanError: if one of them does not compute token by token.
    """
    found: dict[str, Experts] = {}
    tried: dict[object, tuple[str, ...] | str] = {}
    for call in trace.modules:
        module = model.get_submodule(call.path)
        count = _stacked(module)
        if count is None:
            continue
        arguments = _arguments(call, module)
        if arguments is None:
            if call.path in found:
                raise PlanError(call.path, "it is called in different ways", _HINT + ".")
            continue
        if call.path in found:
            if _places(found[call.path]) != arguments[0]:
                raise PlanError(call.path, "it is called in different ways", _HINT + ".")
            continue
        kind = _kind(module, arguments)
        if kind not in tried:
            tried[kind] = try_experts(module, count, *arguments)
        outcome = tried[kind]
        if isinstance(outcome, str):
            raise PlanError(call.path, outcome, _HINT + ".")
        found[call.path] = Experts(call.path, count, *arguments[0], outcome)
    return found


def _stacked(module: nn.Module) -> int | None:
    """The extent of dimension 0, if a module has parameters and it is the same for all of them."""
    own = list(module.parameters(recurse=False))
    if not own or len(own) < len(list(module.parameters())):
        return None
    extents = {one.shape[0] if one.dim() >= 2 else 0 for one in own}
    return extents.pop() if len(extents) == 1 and 0 not in extents else None


_Found = tuple[tuple[Argument, Argument, Argument], int, int]


def _arguments(call: ModuleCall, module: nn.Module) -> _Found | None:
    """Where tokens, choices and weights are given, the number of features and that of choices."""
    integers = [(path, value) for path, value in call.inputs if _is_integer(value)]
    floats = [(path, value) for path, value in call.inputs if value.dtype.is_floating_point]
    if len(integers) != 1 or len(floats) != 2 or len(call.inputs) != 3 or len(call.outputs) != 1:
        return None
    index = integers[0][1]
    # with as many features as choices, tokens come first
    weights = [one for one in floats if one[1].shape == index.shape][-1:]
    tokens = [one for one in floats if one not in weights]
    if len(index.shape) != 2 or not weights or len(tokens) != 1:
        return None
    given, result = tokens[0][1], call.outputs[0][1]
    if len(given.shape) != 2 or given.shape[0] != index.shape[0]:
        return None
    if (result.shape, result.dtype) != (given.shape, given.dtype) or call.outputs[0][0] != ():
        return None
    paths = [tokens[0][0], integers[0][0], weights[0][0]]
    if any(len(path) != 1 for path in paths):
        return None
    one, two, three = (_argument(module, path[0]) for path in paths)
    return (one, two, three), given.shape[1], index.shape[1]


def _is_integer(value: Value) -> bool:
    return not value.dtype.is_floating_point and not value.dtype.is_complex and value.dtype.itemsize > 1


def _argument(module: nn.Module, first: int | str) -> Argument:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    if isinstance(first, int):
        return Argument(first, names[first] if first < len(names) else None)
    return Argument(names.index(first) if first in names else None, first)


def _places(one: Experts) -> tuple[Argument, Argument, Argument]:
    return one.tokens, one.index, one.weights


def _kind(module: nn.Module, arguments: _Found) -> object:
    """What modules that are tried once for all of them have in common."""
    shapes = tuple((name, tuple(one.shape)) for name, one in module.named_parameters())
    numbers = tuple(
        (name, item) for name, item in vars(module).items() if isinstance(item, bool | int | float | str)
    )
    return type(module), shapes, numbers, arguments


def _why_none(trace: Trace) -> str:
    cause = "no module was found whose experts could be divided over ep"
    if trace.warnings:
        return f"{cause} ({trace.warnings[0]})"
    return cause
