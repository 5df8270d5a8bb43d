"""Cuts and layouts: every index on exactly one rank, and assembling is the exact inverse of slicing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colrow.layout import Cut, DimensionLayout, Segment, TensorLayout

RANKS = range(1, 10)


@given(units=st.integers(0, 60), ranks=st.integers(1, 9))
def test_balanced_cut_differs_by_at_most_one_unit(units: int, ranks: int) -> None:
    counts = Cut.balanced(units, ranks).counts
    assert sum(counts) == units
    assert max(counts) - min(counts) <= 1
    assert list(counts) == sorted(counts, reverse=True)


@given(units=st.integers(0, 60), weights=st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_weighted_cut_is_within_one_unit_of_the_share(units: int, weights: list[int]) -> None:
    if not sum(weights):
        with pytest.raises(ValueError, match="weights"):
            Cut.weighted(units, weights)
        return
    cut = Cut.weighted(units, weights)
    assert cut.units == units
    for count, weight in zip(cut.counts, weights, strict=True):
        assert abs(count - units * weight / sum(weights)) < 1


def test_weighted_cut_of_unequal_devices() -> None:
    assert Cut.weighted(16, [3, 3, 2]).counts == (6, 6, 4)
    assert Cut.weighted(7, [1, 1, 1]).counts == (3, 2, 2)


@pytest.mark.parametrize("boundaries", [(0,), (1, 2), (0, 3, 2)])
def test_bad_boundaries_are_refused(boundaries: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="boundaries"):
        Cut(boundaries)


LAYOUTS = [
    DimensionLayout.contiguous(341),
    DimensionLayout.contiguous(45, 9),
    DimensionLayout.packed([35, 35, 35], 5),
    DimensionLayout.packed([36, 12, 12], 3),
    DimensionLayout.packed([211, 211], 211),
    DimensionLayout.interleaved(4, 7),
    DimensionLayout.interleaved(3, 5, 2),
    DimensionLayout((Segment(1, 9, 5), Segment(1, 1, 5, whole=True), Segment(1, 1, 5, whole=True))),
    DimensionLayout((Segment(2, 3, 4), Segment(1, 3, 1))),
]
# 3 groups of 4 query heads each: their keys, and queries, key and value of each group together
KEYS = DimensionLayout((Segment(1, 3, 5, span=4),))
GROUPS = DimensionLayout(
    tuple(
        part
        for group in range(3)
        for part in (Segment(1, 4, 2, start=4 * group), *[Segment(1, 1, 2, span=4, start=4 * group)] * 2)
    )
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", RANKS)
def test_assemble_inverts_slice(layout: DimensionLayout, ranks: int) -> None:
    cut = Cut.balanced(layout.units, ranks)
    for shape, dimension in [((layout.size,), 0), ((layout.size, 3), 0), ((2, layout.size, 2), 1)]:
        whole = torch.randn(shape)
        tensor_layout = TensorLayout(shape, {dimension: (layout, cut)})
        shards = [tensor_layout.slice(whole, rank) for rank in range(ranks)]
        assert [tuple(shard.shape) for shard in shards] == [
            tensor_layout.local_shape(r) for r in range(ranks)
        ]
        assert torch.equal(tensor_layout.assemble(shards), whole)
        assert all(shard.is_contiguous() for shard in shards)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if not layout.has_whole])
@pytest.mark.parametrize("ranks", RANKS)
def test_each_index_is_on_exactly_one_rank(layout: DimensionLayout, ranks: int) -> None:
    cut = Cut.balanced(layout.units, ranks)
    held = [i for rank in range(ranks) for low, high in layout.ranges(cut, rank) for i in range(low, high)]
    assert sorted(held) == list(range(layout.size))


@given(
    units=st.integers(1, 12),
    parts=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 5), min_size=1, max_size=6),
)
def test_any_segments_any_weights(units: int, parts: list[tuple[int, int]], weights: list[int]) -> None:
    layout = DimensionLayout(tuple(Segment(outer, units, inner) for outer, inner in parts))
    cut = Cut.weighted(units, weights)
    whole = torch.arange(layout.size)
    tensor_layout = TensorLayout((layout.size,), {0: (layout, cut)})
    shards = [tensor_layout.slice(whole, rank) for rank in range(cut.ranks)]
    assert torch.equal(tensor_layout.assemble(shards), whole)
    # every index lies on the rank that its unit went to
    offset = 0
    unit_of = torch.empty(layout.size, dtype=torch.long)
    for outer, inner in parts:
        block = torch.arange(units).repeat_interleave(inner).repeat(outer)
        unit_of[offset : offset + len(block)] = block
        offset += len(block)
    for rank, shard in enumerate(shards):
        assert all(cut.start(rank) <= unit < cut.stop(rank) for unit in unit_of[shard].tolist())


def test_packed_qkv_keeps_the_parts_apart() -> None:
    layout = DimensionLayout.packed([4, 4, 4], 2)
    assert layout.ranges(Cut.balanced(2, 2), 0) == [(0, 2), (4, 6), (8, 10)]
    assert layout.ranges(Cut.balanced(2, 2), 1) == [(2, 4), (6, 8), (10, 12)]


def test_two_cut_dimensions() -> None:
    rows, columns = DimensionLayout.contiguous(5), DimensionLayout.packed([4, 4], 4)
    layout = TensorLayout((5, 8), {0: (rows, Cut.from_counts([3, 2])), 1: (columns, Cut.balanced(4, 2))})
    assert layout.local_shape(1) == (2, 4)
    whole = torch.arange(40).view(5, 8)
    assert layout.slice(whole, 1).tolist() == [[26, 27, 30, 31], [34, 35, 38, 39]]


def test_errors_say_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="10 indices cannot be cut into 3 equal units"):
        DimensionLayout.contiguous(10, 3)
    with pytest.raises(ValueError, match="share one axis"):
        DimensionLayout((Segment(1, 2, 1), Segment(1, 3, 1)))
    with pytest.raises(ValueError, match="does not fit dimension 0"):
        TensorLayout((4,), {0: (DimensionLayout.contiguous(5), Cut.balanced(5, 2))})
    with pytest.raises(ValueError, match="a cut of 4 units"):
        TensorLayout((5,), {0: (DimensionLayout.contiguous(5), Cut.balanced(4, 2))})
    layout = TensorLayout((5,), {0: (DimensionLayout.contiguous(5), Cut.balanced(5, 2))})
    with pytest.raises(ValueError, match="expected the global shape"):
        layout.slice(torch.zeros(4), 0)
    with pytest.raises(ValueError, match="rank 1 holds"):
        layout.place(torch.zeros(3), 1, torch.zeros(5))


def test_a_key_value_head_is_on_every_rank_that_has_one_of_its_queries() -> None:
    cut = Cut.from_counts([2, 2, 4, 4])
    assert KEYS.units == GROUPS.units == 12
    assert [KEYS.ranges(cut, rank) for rank in range(4)] == [[(0, 5)], [(0, 5)], [(5, 10)], [(10, 15)]]
    assert KEYS.shared(cut) == [((0, 5), (0, 1))]
    assert KEYS.is_shared(cut)
    assert not KEYS.is_shared(Cut.from_counts([4, 0, 4, 4]))
    assert GROUPS.ranges(cut, 1) == [(4, 12)]
    assert GROUPS.ranges(cut, 0) == [(0, 4), (8, 12)]
    assert GROUPS.shared(cut) == [((8, 12), (0, 1))]
    whole = torch.randn(GROUPS.size, 2)
    layout = TensorLayout((GROUPS.size, 2), {0: (GROUPS, cut)})
    assert torch.equal(layout.assemble([layout.slice(whole, rank) for rank in range(4)]), whole)


def test_whole_segments_are_shared_by_all() -> None:
    layout = DimensionLayout((Segment(1, 9, 1), Segment(1, 2, 1, whole=True)))
    assert layout.shared(Cut.balanced(9, 3)) == [((9, 11), (0, 1, 2))]
    assert not DimensionLayout.contiguous(9).is_shared(Cut.balanced(9, 3))


@pytest.mark.parametrize(
    "segments",
    [
        (Segment(1, 3, 1), Segment(1, 4, 1)),
        (Segment(1, 4, 1, start=4),),
        (Segment(1, 4, 1), Segment(1, 4, 1, start=8)),
        (Segment(1, 3, 1, span=4), Segment(1, 8, 1)),
    ],
)
def test_segments_of_different_axes_are_refused(segments: tuple[Segment, ...]) -> None:
    with pytest.raises(ValueError, match="must share one axis"):
        DimensionLayout(segments)
