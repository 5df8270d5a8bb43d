"""``colrow demo matmul``: a small matrix product by several real processes, drawn for the terminal."""

from __future__ import annotations

import argparse
import pickle
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from colrow.cli.demo_picture import picture, verdict
from colrow.cli.demo_ranks import A, B, D, Report, Rows, Share
from colrow.launch import launch

MOST_RANKS = 8
NARROWEST, WIDEST = 72, 100
TIMEOUT_SECONDS = 120.0


def run(arguments: list[str]) -> int:
    """``colrow demo matmul [--ranks N]``: 0 if the ranks computed what one process computes, else 1."""
    parser = argparse.ArgumentParser(
        "colrow demo", description="Show what the ranks do, with real processes."
    )
    demos = parser.add_subparsers(dest="demo", required=True, metavar="DEMO")
    help_text = "a product of two 2 x 2 matrices, by columns, by rows and (4, 6 or 8 ranks) on a grid"
    matmul = demos.add_parser("matmul", help=help_text, description=f"Shows {help_text}.")
    matmul.add_argument("--ranks", type=_ranks, default=2, metavar="N", help="processes (default: 2)")
    options = parser.parse_args(arguments)
    reports = _reports(options.ranks)
    checks = compare(reports)
    console = Console(highlight=False, markup=False)
    console.width = min(max(console.width, NARROWEST), WIDEST)
    console.print(picture(reports), verdict(checks))
    return 0 if all(equal for *_, equal in checks) else 1


def compare(reports: list[Report]) -> list[tuple[str, Rows, Rows, bool]]:
    """Per product: its name, rank 0's result, one process's, and whether every rank's equals the latter."""
    a, b, d = (torch.tensor(values, dtype=torch.float64) for values in (A, B, D))
    grid = "A x B on the grid of {} x {}".format(*reports[0].grid_shape)
    products: list[tuple[str, list[Share], torch.Tensor]] = [
        ("A x B, cut by columns", [report.column for report in reports], a @ b),
        ("A x B, cut by rows", [report.row for report in reports], a @ b),
        (grid, [report.grid for report in reports], a @ b),
        ("A x B x D, columns then rows", [report.pair for report in reports], a @ b @ d),
    ]
    return [
        (name, shares[0].whole, expected.tolist(), all(share.whole == expected.tolist() for share in shares))
        for name, shares, expected in products
    ]


def _ranks(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_RANKS:
        raise argparse.ArgumentTypeError(f"give 1 to {MOST_RANKS} ranks, not {text!r}")
    return int(text)


def _reports(ranks: int) -> list[Report]:
    """Start the ranks and collect what they report."""
    with tempfile.TemporaryDirectory(prefix="colrow-demo-") as folder:
        launch(
            target="colrow.cli.demo_ranks:multiply",
            arguments={"folder": folder, "ranks": ranks},
            ranks=ranks,
            threads_per_rank=1,
            timeout=TIMEOUT_SECONDS,
        )
        return [pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]
