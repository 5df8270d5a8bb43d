"""Rules, one per operator, and the registry that finds the rule of an operator.

A rule says how the factors of an operator's inputs and outputs relate. Users add their own, for custom
operators or to override a built-in rule, without changing anything global::

    @colrow.axes.rule("mylib.rotate", linear=["x"])
    def rotate(op):
        rows, features = op.dimensions("x")
        op.block(features, "rotated together")
        op.set_output([rows, features])

    registry = colrow.axes.default_registry().extended(rotate)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from colrow.trace.records import Operation

if TYPE_CHECKING:
    from colrow.axes.context import RuleContext

#: names of arguments in all of which together an operator is linear
LinearGroup = tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """How the factors of one operator's tensors relate, and what else later stages need to know of it.

    Attributes:
        names: operators it is for, without the underscore of in-place variants: ``aten.div``, or one
            overload alone: ``aten.div.Tensor_mode``.
        function: reads the factors of the inputs and sets those of the outputs.
        linear: groups of arguments. The operator is linear in all arguments of one group together, the
            others held fixed: it maps partial sums to a partial sum if every member of the group is one
            (or is zero). ``mul`` is linear in either factor, ``add`` in both summands together. Of an
            operator with several different results this holds for the first.
        addends: arguments that are added to a contraction; where that yields partial sums, one rank alone
            must add them.
        random: whether it draws random numbers, so that ranks must draw different ones for different parts.
    """

    names: tuple[str, ...]
    function: Callable[[RuleContext], None]
    linear: tuple[LinearGroup, ...] = ()
    addends: tuple[str, ...] = ()
    random: bool = False

    def __call__(self, op: RuleContext) -> None:
        self.function(op)


def rule(
    *names: str,
    linear: Sequence[str | LinearGroup] = (),
    addends: Sequence[str] = (),
    random: bool = False,
) -> Callable[[Callable[[RuleContext], None]], Rule]:
    """Decorator that makes a function the :class:`Rule` of the operators ``names``.

    Args:
        names: ``namespace.operator`` or, for one overload alone, ``namespace.operator.overload``.
        linear: arguments, or groups of them, that the operator is linear in: see :attr:`Rule.linear`.
        addends, random: see :class:`Rule`.

    Raises:
        ValueError: if a name has no namespace, or is that of an in-place variant.
    """
    for name in names:
        if name.count(".") not in (1, 2) or name.split(".")[1].endswith("_"):
            raise ValueError(
                f"{name!r} is not the name of an operator: write namespace.operator, such as aten.view, "
                "without the underscore of its in-place variant"
            )
    groups = tuple((group,) if isinstance(group, str) else tuple(group) for group in linear)

    def decorate(function: Callable[[RuleContext], None]) -> Rule:
        return Rule(names, function, groups, tuple(addends), random)

    return decorate


class Registry:
    """Rules by the names of their operators. Immutable: :meth:`extended` makes another one.

    Args:
        rules: later ones override earlier ones of the same name.
        pointwise: the rule of operators that PyTorch tags as pointwise and that no other rule names.
    """

    def __init__(self, rules: Iterable[Rule], pointwise: Rule | None = None) -> None:
        self._rules = {name: rule for rule in rules for name in rule.names}
        self._pointwise = pointwise

    def extended(self, *rules: Rule) -> Registry:
        """This registry with ``rules`` added; they override those of the same name."""
        return Registry([*self._rules_once(), *rules], self._pointwise)

    def find(self, function: torch._ops.OpOverload) -> Rule | None:
        """The rule of an operator; its in-place variant has the same one. None if there is none."""
        name = function._schema.name.replace("::", ".").rstrip("_")
        overload = function._schema.overload_name or "default"
        found = self._rules.get(f"{name}.{overload}") or self._rules.get(name)
        if found is None and _is_pointwise(function):
            return self._pointwise
        return found

    def linear(self, operation: Operation) -> tuple[LinearGroup, ...]:
        """The groups of arguments in which ``operation`` is linear: see :attr:`Rule.linear`.

        None of them if a result is of integers: a conversion to integers, a comparison.
        """
        found = self.find(operation.function)
        dtypes = [value.dtype for value in operation.outputs[:1]]
        if found is None or not all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes):
            return ()
        names = {argument.name for argument in operation.function._schema.arguments}
        groups = (tuple(name for name in group if name in names) for group in found.linear)
        return tuple(group for group in groups if group)

    def __contains__(self, name: str) -> bool:
        return name in self._rules

    def __iter__(self) -> Iterator[str]:
        """The names of all operators that have a rule."""
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def _rules_once(self) -> Iterator[Rule]:
        for name, known in self._rules.items():
            yield Rule((name,), known.function, known.linear, known.addends, known.random)


def _is_pointwise(function: torch._ops.OpOverload) -> bool:
    """Whether PyTorch says so of the operator, or of the one that it is the in-place variant of."""
    namespace, _, name = function._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.rstrip("_"), None)
    original = getattr(packet, function._overloadname, None) if name.endswith("_") else None
    return any(torch.Tag.pointwise in variant.tags for variant in (function, original) if variant is not None)


def rules_of(module: ModuleType) -> list[Rule]:
    """All rules that ``module`` defines, in the order it does."""
    return [item for item in vars(module).values() if isinstance(item, Rule)]
