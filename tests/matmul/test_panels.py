"""The panels of SUMMA: pure arithmetic, no processes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from colrow.layout import Cut
from colrow.matmul.grid import near_square
from colrow.matmul.summa import panels


@given(st.data(), st.integers(0, 40), st.integers(1, 5), st.integers(1, 5), st.none() | st.integers(1, 9))
def test_panels_cover_the_inner_dimension_once(
    data: st.DataObject, size: int, columns: int, rows: int, widest: int | None
) -> None:
    cuts = []
    for ranks in (columns, rows):
        inner = data.draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1))
        cuts.append(Cut((0, *sorted(inner), size)))
    x_cut, y_cut = cuts
    reached = 0
    for panel in panels(x_cut, y_cut, widest):
        assert panel.width >= 1
        assert widest is None or panel.width <= widest
        # both owners hold the whole panel, and it begins where the last one ended
        assert x_cut.start(panel.column) + panel.in_x == reached
        assert y_cut.start(panel.row) + panel.in_y == reached
        reached += panel.width
        assert reached <= x_cut.stop(panel.column)
        assert reached <= y_cut.stop(panel.row)
    assert reached == size
    if widest is None:
        assert len(panels(x_cut, y_cut, None)) <= columns + rows - 1


def test_near_square() -> None:
    shapes = {1: (1, 1), 2: (1, 2), 4: (2, 2), 6: (2, 3), 7: (1, 7), 12: (3, 4), 16: (4, 4), 24: (4, 6)}
    assert {ranks: near_square(ranks) for ranks in shapes} == shapes
