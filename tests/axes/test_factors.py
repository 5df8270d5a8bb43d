"""The algebra of factors: its examples, and that two descriptions of one dimension stay true."""

from __future__ import annotations

import doctest
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colrow.axes import Factor, Factors, Reason, cutting, dimension_layout, factor, factors
from colrow.axes.factor import find

WHY = Reason("test")


@pytest.mark.parametrize("module", [factor, factors, cutting])
def test_examples_in_the_documentation(module: object) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 3
    assert results.failed == 0


@settings(deadline=None, max_examples=100, database=None)
@given(data=st.data())
def test_refinements_keep_sizes_and_agree(data: st.DataObject) -> None:
    """After any sequence of splits, cuts and unifications: sizes are right, unified factors are alike."""
    arena = Factors()
    size = prod(data.draw(st.lists(st.sampled_from([2, 3, 4]), min_size=2, max_size=4)))
    known = [arena.atom(size) for _ in range(3)]
    pool = list(known)
    same = list[tuple[Factor, Factor]]()
    for _ in range(data.draw(st.integers(1, 8))):
        factor = data.draw(st.sampled_from(pool))
        action = data.draw(st.sampled_from(["split", "cut", "unify"]))
        if action == "split":
            divisors = [number for number in range(1, factor.size + 1) if factor.size % number == 0]
            outer = data.draw(st.sampled_from(divisors))
            parts = arena.split(factor, [outer, factor.size // outer], WHY)
            assert parts is None or [part.size for part in parts] == [outer, factor.size // outer]
        elif action == "cut":
            at = data.draw(st.integers(0, factor.size))
            parts = arena.cut(factor, [at], WHY)
            assert parts is None or sum(part.size for part in parts) == factor.size
        else:
            other = data.draw(st.sampled_from([each for each in pool if each.size == factor.size]))
            parts = None
            if arena.unify(factor, other, WHY):
                same.append((factor, other))
        pool += parts or []
    for factor in pool:
        assert evaluate(arena, factor) == factor.size
        if arena.reasons(factor):
            continue
        for atom in arena.atoms(factor):
            if arena.count(factor, atom) == 1:
                assert dimension_layout(arena, factor, atom).size == factor.size
    for first, second in same:
        for atom in arena.atoms(first):
            if arena.count(first, atom) == arena.count(second, atom) == 1:
                layouts = [dimension_layout(arena, factor, atom) for factor in (first, second)]
                assert indices(layouts[0], atom.size) == indices(layouts[1], atom.size)


def evaluate(arena: Factors, factor: Factor) -> int:
    """The size by what it is made of."""
    root = find(factor)
    if root.kind == "atom":
        return root.size
    sizes = [evaluate(arena, part) for part in arena.parts(root, root.kind)]
    return prod(sizes) if root.kind == "product" else sum(sizes)


def indices(layout: object, units: int) -> list[list[tuple[int, int]]]:
    from colrow.layout.cut import Cut

    cut = Cut((0, 1, units))
    return [layout.ranges(cut, rank) for rank in range(2)]  # type: ignore[attr-defined]


def test_views_without_common_refinement_are_blocked() -> None:
    arena = Factors()
    first, second = arena.atom(36), arena.atom(36)
    arena.split(first, [4, 9], Reason("one"))
    arena.split(second, [6, 6], Reason("two"))
    assert not arena.unify(first, second, Reason("added"))
    assert {reason.text for reason in (*arena.reasons(first), *arena.reasons(second))} == {"added"}


def test_what_was_cut_apart_cannot_be_sharded_across_the_cut() -> None:
    """``q, k, v = x.split(8)`` and ``x.view(3, 8)``: q, k and v are alike, but not three units."""
    arena = Factors()
    fused = arena.atom(24)
    assert arena.cut(fused, [8, 16], WHY) is not None
    assert arena.split(fused, [3, 8], WHY) is not None
    assert [atom.size for atom in arena.atoms(fused)] == [8]


@pytest.mark.parametrize("size", [4, 7, 5000])
def test_a_dimension_tied_to_itself_shifted_is_blocked(size: int) -> None:
    """``loss(x[1:], x[:-1])``: the dimension stays in one piece, and is quick to see."""
    arena = Factors()
    sequence = arena.atom(size)
    tails, heads = arena.cut(sequence, [1], WHY), arena.cut(sequence, [size - 1], WHY)
    assert tails is not None
    assert heads is not None
    assert not arena.unify(tails[1], heads[0], Reason("compared"))
    assert [atom.size for atom in arena.atoms(sequence)] == [size - 2]
    assert [reason.text for reason in arena.reasons(sequence)] == ["compared"]


def test_halves_that_change_places_are_tied() -> None:
    """``x * cos + cat(-x[half:], x[:half]) * sin``."""
    arena = Factors()
    whole = arena.atom(16)
    halves = arena.cut(whole, [8], WHY)
    assert halves is not None
    assert arena.unify(whole, arena.concatenation(halves[::-1]), WHY)
    assert arena.text(whole) == "(8 + 8)"
    assert len(arena.atoms(whole)) == 1


def test_a_reason_names_what_caused_it_and_survives_refinement() -> None:
    arena = Factors()
    factor = arena.atom(12)
    arena.block(factor, Reason("softmax over it"))
    parts = arena.split(factor, [3, 4], WHY)
    assert parts is not None
    other = arena.atom(4)
    arena.unify(other, parts[1], WHY)
    assert [str(reason) for reason in arena.reasons(other)] == ["softmax over it"]


def test_a_rule_that_splits_into_wrong_sizes_is_told() -> None:
    arena = Factors()
    with pytest.raises(ValueError, match="no product of"):
        arena.split(arena.atom(12), [5, 2], WHY)
