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
from itertools import accumulate, pairwise
from math import prod

from colrow.axes.factor import Factor, FactorStructure, Reason, find

#: reasons remembered per atom; a batch dimension collects one from nearly every operator
REASONS_KEPT = 8


class Factors(FactorStructure):
    """All factors of one inference, and what can be done with them.

    ``unify``, ``split`` and ``cut`` cannot always succeed: a product of 4 and 9 and one of 6 and 6 have no
    common refinement. They then block all factors involved, for the reason given: sound, if not sharp.
    """

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
