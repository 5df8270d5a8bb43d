"""One factor, why it may not be sharded, and what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from colrow.trace.records import Operation

Kind = Literal["atom", "product", "sum"]


@dataclass(frozen=True)
class Reason:
    """Why a factor cannot be sharded: a text, and the operator that caused it.

    >>> str(Reason("softmax over it"))
    'softmax over it'
    """

    text: str
    operation: Operation | None = None

    def __str__(self) -> str:
        if self.operation is None:
            return self.text
        module, call = self.operation.module, self.operation.call
        place = f" in {module.path}" if module is not None and module.path else ""
        source = f", {call.site}" if call is not None else ""
        return f"{self.text} ({self.operation.name}{place}{source})"


@dataclass(eq=False, slots=True)
class Factor:
    """One factor. Only its :class:`Factors` changes it, and only that can tell what it is by now.

    Attributes:
        index: position in the order of creation.
        size: number of indices.
    """

    index: int
    size: int
    kind: Kind = "atom"
    children: tuple[Factor, ...] = ()
    same_as: Factor | None = None
    reasons: tuple[Reason, ...] = ()


def find(factor: Factor) -> Factor:
    """The factor that stands for all that were unified with ``factor``."""
    while (target := factor.same_as) is not None:
        if target.same_as is not None:
            factor.same_as = target.same_as
        factor = target
    return factor


class FactorStructure:
    """Makes factors, and tells what they are made of: the part of :class:`Factors` that changes none."""

    def __init__(self) -> None:
        self._count = 0

    # ---------------------------------------------------------------- making

    def atom(self, size: int, reasons: tuple[Reason, ...] = ()) -> Factor:
        """A new factor of which nothing is known but its size."""
        self._count += 1
        return Factor(self._count - 1, size, reasons=reasons)

    def product(self, parts: Sequence[Factor]) -> Factor:
        """The row-major product; parts of size 1 do not count.

        >>> factors = FactorStructure()
        >>> factors.text(factors.product([factors.atom(2), factors.atom(1), factors.atom(3)]))
        '2*3'
        """
        parts = [part for part in parts if part.size != 1]
        size = prod(part.size for part in parts)
        return self._composite("product", parts, size) if size else self.atom(0)

    def concatenation(self, parts: Sequence[Factor]) -> Factor:
        """The sum, in order; empty parts do not count.

        >>> factors = FactorStructure()
        >>> factors.text(factors.concatenation([factors.atom(2), factors.atom(3)]))
        '(2 + 3)'
        """
        parts = [part for part in parts if part.size != 0]
        return self._composite("sum", parts, sum(part.size for part in parts))

    def _composite(self, kind: Kind, parts: Sequence[Factor], size: int) -> Factor:
        if len(parts) == 1:
            return find(parts[0])
        factor = self.atom(size)
        if parts:
            factor.kind, factor.children = kind, tuple(parts)
        return factor

    # ---------------------------------------------------------------- looking

    def parts(self, factor: Factor, kind: Kind) -> list[Factor]:
        """The factors whose product (or sum) ``factor`` is, nested ones flattened; itself if it is none."""
        root = find(factor)
        if root.kind != kind:
            return [root]
        found = [part for child in root.children for part in self.parts(child, kind)]
        return [part for part in found if part.size != 1] if kind == "product" else found

    def atoms(self, factor: Factor) -> tuple[Factor, ...]:
        """The different atoms within ``factor``, in order; those of size 1 do not count.

        >>> factors = FactorStructure()
        >>> a, b = factors.atom(2), factors.atom(3)
        >>> [atom.size for atom in factors.atoms(factors.concatenation([factors.product([a, b]), b]))]
        [2, 3]
        """
        found: dict[int, Factor] = {}
        self._collect(factor, found)
        return tuple(found.values())

    def _collect(self, factor: Factor, found: dict[int, Factor]) -> None:
        root = find(factor)
        if root.kind == "atom":
            if root.size != 1:
                found[root.index] = root
        else:
            for child in root.children:
                self._collect(child, found)

    def count(self, factor: Factor, atom: Factor) -> int:
        """How often ``atom`` is cut for one index of ``factor``: more than once means it cannot be sharded.

        >>> factors = FactorStructure()
        >>> a = factors.atom(2)
        >>> factors.count(factors.product([a, a]), a), factors.count(factors.concatenation([a, a]), a)
        (2, 1)
        """
        root = find(factor)
        if root.kind == "atom":
            return int(root is find(atom))
        counts = [self.count(child, atom) for child in root.children]
        return sum(counts) if root.kind == "product" else max(counts)

    def covers(self, factor: Factor, atom: Factor) -> bool:
        """Whether every index of ``factor`` belongs to a unit of ``atom``, so that no part stays whole.

        >>> factors = FactorStructure()
        >>> a, b = factors.atom(2), factors.atom(3)
        >>> factors.covers(factors.product([a, b]), a), factors.covers(factors.concatenation([a, b]), a)
        (True, False)
        """
        root = find(factor)
        if root.kind == "atom":
            return root is find(atom)
        inside = (self.covers(child, atom) for child in root.children)
        return any(inside) if root.kind == "product" else all(inside)

    def reasons(self, factor: Factor) -> tuple[Reason, ...]:
        """Why no atom of ``factor`` may be sharded, or some may not; empty if all may."""
        return tuple(dict.fromkeys(reason for atom in self.atoms(factor) for reason in atom.reasons))

    def text(self, factor: Factor) -> str:
        """What ``factor`` is made of, by sizes: ``12*64``, ``(768 + 768 + 768)``."""
        root = find(factor)
        if root.kind == "atom":
            return str(root.size)
        if root.kind == "sum":
            return "(" + " + ".join(self.text(part) for part in self.parts(root, "sum")) + ")"
        return "*".join(self.text(part) for part in self.parts(root, "product"))
