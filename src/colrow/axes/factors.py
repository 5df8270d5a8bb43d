"""The factor algebra: what the dimensions of tensors are made of.

A dimension is a *factor*, and a factor is

- an **atom**: indivisible as far as is known, such as 12 heads;
- a **product** of factors, row-major, the last one running fastest: ``768 = 12 heads x 64``;
- a **sum** of factors, one after the other: ``2304 = q + k + v``.

Operators tie factors together (:meth:`Factors.unify`), take them apart (:meth:`Factors.split` into a
product, :meth:`Factors.cut` into a sum) or forbid that they be sharded (:meth:`Factors.block`). What is
found out about a factor later holds everywhere it stands:

>>> factors = Factors()
>>> why = Reason("an example")
>>> fused = factors.atom(2304)                        # the output of one fused linear
>>> q, k, v = factors.cut(fused, [768, 1536], why)    # q, k, v = fused.split(768)
>>> heads, head_size = factors.split(q, [12, 64], why)          # q.view(..., 12, 64)
>>> factors.unify(q, k, why) and factors.unify(k, v, why)
True
>>> factors.text(fused)
'(12*64 + 12*64 + 12*64)'

Nothing here is global: factors belong to the :class:`Factors` object that made them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Literal

from colrow.trace.records import Operation

Kind = Literal["atom", "product", "sum"]

#: reasons remembered per atom; a batch dimension collects one from nearly every operator
REASONS_KEPT = 8


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


class Factors:
    """All factors of one inference, and what can be done with them.

    ``unify``, ``split`` and ``cut`` cannot always succeed: a product of 4 and 9 and one of 6 and 6 have no
    common refinement. They then block all factors involved, for the reason given: sound, if not sharp.
    """

    def __init__(self) -> None:
        self._count = 0

    # ---------------------------------------------------------------- making

    def atom(self, size: int, reasons: tuple[Reason, ...] = ()) -> Factor:
        """A new factor of which nothing is known but its size."""
        self._count += 1
        return Factor(self._count - 1, size, reasons=reasons)

    def product(self, parts: Sequence[Factor]) -> Factor:
        """The row-major product; parts of size 1 do not count.

        >>> factors = Factors()
        >>> factors.text(factors.product([factors.atom(2), factors.atom(1), factors.atom(3)]))
        '2*3'
        """
        parts = [part for part in parts if part.size != 1]
        size = prod(part.size for part in parts)
        return self._composite("product", parts, size) if size else self.atom(0)

    def concatenation(self, parts: Sequence[Factor]) -> Factor:
        """The sum, in order; empty parts do not count.

        >>> factors = Factors()
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

        >>> factors = Factors()
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

        >>> factors = Factors()
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

        >>> factors = Factors()
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

    # ---------------------------------------------------------------- finding out

    def block(self, factor: Factor, why: Reason) -> None:
        """Forbid that any atom of ``factor`` be sharded.

        >>> factors = Factors()
        >>> a = factors.atom(6)
        >>> factors.block(a, Reason("softmax over it"))
        >>> [part.reasons[0].text for part in factors.split(a, [2, 3], Reason("view"))]
        ['softmax over it', 'softmax over it']
        """
        self._block(factor, (why,))

    def _block(self, factor: Factor, reasons: tuple[Reason, ...]) -> None:
        for atom in self.atoms(factor):
            if len(atom.reasons) < REASONS_KEPT:
                atom.reasons = tuple(dict.fromkeys(atom.reasons + reasons))[:REASONS_KEPT]

    def unify(self, first: Factor, second: Factor, why: Reason) -> bool:
        """Make two factors the same, refining both as far as needed; a size of 1 is left alone (broadcast).

        Returns:
            whether it worked; if not, both are blocked.

        >>> factors = Factors()
        >>> first, second = factors.atom(24), factors.atom(24)
        >>> _ = factors.split(first, [4, 6], Reason("one view"))
        >>> _ = factors.split(second, [2, 12], Reason("another"))
        >>> factors.unify(first, second, Reason("added")), factors.text(first), factors.text(second)
        (True, '2*2*6', '2*2*6')
        """
        if self._unify(first, second):
            return True
        self.block(first, why)
        self.block(second, why)
        return False

    def split(self, factor: Factor, sizes: Sequence[int], why: Reason) -> list[Factor] | None:
        """The parts of ``factor`` as a row-major product of ``sizes``; None, and blocked, if it is no such.

        Raises:
            ValueError: if the product of ``sizes`` is not the factor's size.
        """
        if prod(sizes) != factor.size:
            raise ValueError(f"a factor of {factor.size} is no product of {list(sizes)}")
        parts = self._split(factor, [size for size in sizes if size != 1])
        if parts is None:
            self.block(factor, why)
            return None
        rest = iter(parts)
        return [self.atom(1) if size == 1 else next(rest) for size in sizes]

    def cut(self, factor: Factor, offsets: Iterable[int], why: Reason) -> list[Factor] | None:
        """The pieces of ``factor`` between ``offsets``; None, and blocked, if it cannot be cut there."""
        pieces = self._cut(factor, offsets)
        if pieces is None:
            self.block(factor, why)
        return pieces

    # The functions below only say whether it worked. What they did before they failed only refines and
    # unifies, which is never wrong; their callers block.

    def _unify(self, first: Factor, second: Factor) -> bool:
        a, b = find(first), find(second)
        if a is b or a.size == 1 or b.size == 1:
            return True
        if a.size != b.size or a.size == 0:
            return a.size == b.size
        if a.kind != "atom" and b.kind == "atom":
            a, b = b, a
        if a.kind != "atom":
            if not self._match(a, b):
                return False
            a, b = find(a), find(b)
            if a is b:
                return True
        a.same_as = b
        if a.reasons:
            self._block(b, a.reasons)
        return True

    def _match(self, a: Factor, b: Factor) -> bool:
        """Unify what two composite factors are made of."""
        if a.kind == b.kind == "product":
            return self._refine(self.parts(a, "product"), self.parts(b, "product"))
        if a.kind == b.kind == "sum":
            if self._shifted(a, b):
                return False
            both = [*self._offsets(a), *self._offsets(b)]
            return self._unify_all(self._cut(a, both), self._cut(b, both))
        if a.kind == "product":
            a, b = b, a
        outer = self.parts(b, "product")[0].size  # a is a sum, b a product
        if self._split(a, [outer, b.size // outer]) is not None and find(a).kind == "product":
            return self._unify(a, b)
        offsets = self._offsets(a)
        return self._unify_all(self._cut(a, offsets), self._cut(b, offsets))

    def _shifted(self, a: Factor, b: Factor) -> bool:
        """Whether two sums are one against the other shifted, as ``x[1:]`` and ``x[:-1]``.

        To make those the same would tie every index to the next one, and leave pieces of size 1.
        """
        starts = {}
        position = 0
        for part in self.parts(a, "sum"):
            starts[part.index] = position
            position += part.size
        position = 0
        for part in self.parts(b, "sum"):
            if part.index in starts and (starts[part.index] - position) % part.size:
                return True
            position += part.size
        return False

    def _unify_all(self, first: list[Factor] | None, second: list[Factor] | None) -> bool:
        if first is None or second is None or len(first) != len(second):
            return False
        return all(self._unify(a, b) for a, b in zip(first, second, strict=True))

    def _offsets(self, factor: Factor) -> list[int]:
        return list(accumulate(part.size for part in self.parts(factor, "sum")))

    def _refine(self, first: list[Factor], second: list[Factor]) -> bool:
        """Unify two row-major products of the same size."""
        left, right = first[::-1], second[::-1]  # stacks: the outermost factor on top
        while left and right:
            a, b = left.pop(), right.pop()
            if a.size < b.size:
                a, b, left, right = b, a, right, left
            if a.size == b.size:
                if not self._unify(a, b):
                    return False
                continue
            if a.size % b.size:
                return False
            parts = self._split(a, [b.size, a.size // b.size])
            if parts is None or not self._unify(parts[0], b):
                return False
            left.append(parts[1])
        return True

    def _split(self, factor: Factor, sizes: Sequence[int]) -> list[Factor] | None:
        """As :meth:`split`; no size is 1."""
        root = find(factor)
        if len(sizes) <= 1:
            return [root] if sizes else []
        if root.size == 0:
            return [self.atom(size) for size in sizes]
        if root.kind == "atom":
            root.kind, root.children = "product", tuple(self.atom(size, root.reasons) for size in sizes)
            root.reasons = ()
            return list(root.children)
        if root.kind == "product":
            parts = [self.atom(size) for size in sizes]
            return parts if self._refine(self.parts(root, "product"), parts) else None
        return self._split_sum(root, sizes)

    def _split_sum(self, root: Factor, sizes: Sequence[int]) -> list[Factor] | None:
        """``a*inner + b*inner`` is ``(a + b)*inner``; ``[q|k|v]`` of equal parts is ``(1 + 1 + 1)*q``.

        The outer factor remains a sum: whoever cut it into q, k and v still holds them apart.
        """
        inner = prod(sizes[1:])
        groups: list[list[Factor]] = [[]]
        for part in self.parts(root, "sum"):
            if sum(member.size for member in groups[-1]) % inner == 0 and groups[-1]:
                groups.append([])
            groups[-1].append(part)
        if len(groups) == 1:
            return None
        outers: list[Factor] = []
        common: Factor | None = None
        for group in groups:
            whole = self.concatenation(group)
            if whole.size % inner:
                return None
            if whole.size == inner:
                pair: list[Factor] | None = [self.atom(1), whole]
            else:
                pair = self._split(whole, [whole.size // inner, inner])
            if pair is None or (common is not None and not self._unify(common, pair[1])):
                return None
            outers.append(pair[0])
            common = pair[1]
        assert common is not None
        root = find(root)
        if root.kind == "sum":
            root.kind, root.children = "product", (self.concatenation(outers), common)
        outer = root.children[0]
        rest = self._split(common, sizes[1:])
        return None if rest is None else [outer, *rest]

    def _cut(self, factor: Factor, offsets: Iterable[int]) -> list[Factor] | None:
        root = find(factor)
        bounds = sorted({0, root.size, *offsets})
        if len(bounds) <= 2:
            return [root]
        if root.kind == "atom":
            sizes = [high - low for low, high in pairwise(bounds)]
            root.kind, root.children = "sum", tuple(self.atom(size, root.reasons) for size in sizes)
            root.reasons = ()
            return list(root.children)
        if root.kind == "product":
            first, *others = self.parts(root, "product")
            inner = prod(part.size for part in others)
            if any(bound % inner for bound in bounds):
                return None
            pieces = self._cut(first, [bound // inner for bound in bounds])
            return None if pieces is None else [self.product([piece, *others]) for piece in pieces]
        return self._cut_sum(root, bounds)

    def _cut_sum(self, root: Factor, bounds: list[int]) -> list[Factor] | None:
        parts: list[Factor] = []
        low = 0
        for part in self.parts(root, "sum"):
            high = low + part.size
            pieces = self._cut(part, [bound - low for bound in bounds if low < bound < high])
            if pieces is None:
                return None
            parts += [flat for piece in pieces for flat in self.parts(piece, "sum")]
            low = high
        root.children = tuple(parts)
        ends, group, result = set(bounds), list[Factor](), list[Factor]()
        position = 0
        for part in parts:
            group.append(part)
            position += part.size
            if position in ends:
                result.append(self.concatenation(group))
                group = []
        return result
