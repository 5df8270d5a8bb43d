"""The demo: what the ranks report, the picture as printed, and the verdict."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from colrow.cli import demo
from colrow.cli.demo_picture import picture, verdict
from colrow.cli.demo_ranks import Report, multiply
from tests.pool import Pool


def _reports(ranks: Callable[[int], Pool], folder: Path, size: int) -> list[Report]:
    ranks(size).run(multiply, str(folder), size)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def _printed(reports: list[Report], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(picture(reports), verdict(demo.compare(reports)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_two_ranks(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    reports = _reports(ranks, tmp_path, 2)
    assert len({report.process for report in reports}) == 2
    # by columns: rank 1 has the second column of B and computes the second column of the product
    share = reports[1].column
    assert share.left.values == [[1, 2], [3, 4]]
    assert (share.right.columns, share.right.values) == ((1, 2), [[6], [8]])
    assert (share.alone.columns, share.alone.values) == ((1, 2), [[22], [50]])
    assert share.moved == {"all_gather": (1, 4 * 8)}
    # by rows: a term of every number
    share = reports[1].row
    assert (share.left.values, share.right.values) == ([[2], [4]], [[7, 8]])
    assert share.alone.values == [[14, 16], [28, 32]]
    assert share.moved == {"all_reduce": (1, 4 * 8)}
    # columns then rows: one exchange for two products
    assert reports[1].pair.left == reports[1].column.alone
    assert reports[1].pair.moved == {"all_reduce": (1, 4 * 8)}
    text = _printed(reports)
    for line in (
        "[ 3  4 ]   [ .  8 ]       [ .  3*6+4*8 ] = [ .  50 ]",
        "[ 43  . ]   [ .  50 ] -> [ 43  50 ]",
        "[ 15  18 ] + [ 28  32 ] = [ 43  50 ]",
        "Counted on rank 0: 1 all-gather of 32 bytes (8 for each number).",
    ):
        assert line in text
    assert "SUMMA" not in text
    assert text.count("yes") == 4


def test_four_ranks_show_the_grid(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    reports = _reports(ranks, tmp_path, 4)
    assert [report.grid.left.values for report in reports] == [[[1]], [[2]], [[3]], [[4]]]
    assert [report.grid.alone.values for report in reports] == [[[19]], [[22]], [[43]], [[50]]]
    text = _printed(reports)
    assert "on a grid of 2 x 2 ranks (SUMMA)" in text
    # rank 2, step 1: A's 3 is its own, B's 5 comes from above
    assert "5 from rank 0   7 is own" in text
    assert text.count("yes") == 4


@pytest.mark.parametrize(("size", "idle"), [(1, 0), (3, 3), (6, 3 * 4 + 2)])
def test_any_number_of_ranks(ranks: Callable[[int], Pool], tmp_path: Path, size: int, idle: int) -> None:
    """More ranks than columns: some are idle, by columns, by rows, in the pair, and on a grid of 2 x 3."""
    text = _printed(_reports(ranks, tmp_path, size))
    assert text.count("nothing is left for it") == idle
    assert ("nothing, the one rank has it all" in text) == (size == 1)
    assert text.count("yes") == 4


def test_piped_output_is_plain_and_fits(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    text = _printed(_reports(ranks, tmp_path, 4), width=80)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_wrong_product_is_noticed(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    reports = _reports(ranks, tmp_path, 2)
    wrong = replace(reports[1], row=replace(reports[1].row, whole=[[19, 22], [43, 51]]))
    found = demo.compare([reports[0], wrong])
    assert [equal for *_, equal in found] == [True, False, True, True]
    assert _printed([reports[0], wrong]).count("NO") == 1


def test_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.run(["matmul"]) == 0
    assert "One matrix product on 2 ranks" in capfd.readouterr().out


@pytest.mark.parametrize("given", ["0", "9", "two", "-1"])
def test_ranks_out_of_range_are_refused(capsys: pytest.CaptureFixture[str], given: str) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.run(["matmul", "--ranks", given])
    assert caught.value.code == 2
    assert "give 1 to 8 ranks" in capsys.readouterr().err
