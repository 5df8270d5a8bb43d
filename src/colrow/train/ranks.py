"""What each rank held, beside what one process would hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class RankHolding:
    """What one rank held, or would.

    Attributes:
        parameters: number of elements.
        parameter_bytes: their size.
        training_bytes: with the gradients and AdamW's two running means.
        peak_bytes: the most memory of the process (on a GPU: of its tensors); ``None`` if not measured.
        step_bytes: what it communicated in a step, by the dimension of the mesh.
        waited_share: of a step's time, in which a rank of a pipeline did not compute; ``None`` without one.
    """

    parameters: int
    parameter_bytes: int
    training_bytes: int
    peak_bytes: int | None
    step_bytes: dict[str, int] = field(default_factory=dict)
    waited_share: float | None = None


def holdings_table(ranks: Sequence[RankHolding], whole: RankHolding) -> Table:
    """A row for each rank, and one for a process that would hold the whole model."""
    table = Table(title="What each rank held", title_justify="left", title_style="bold")
    table.add_column("")
    for heading in ("parameters", "of the model", "their bytes", "+ gradients, AdamW", "peak memory"):
        table.add_column(heading, justify="right")
    dimensions = list(dict.fromkeys(name for one in ranks for name in one.step_bytes))
    for name in dimensions:
        table.add_column(f"a step's {name} bytes", justify="right")
    has_stages = any(one.waited_share is not None for one in ranks)
    if has_stages:
        table.add_column("waited", justify="right")
    for number, one in enumerate(ranks):
        cells = [_megabytes(one.step_bytes[name]) for name in dimensions]
        if has_stages:
            cells.append("-" if one.waited_share is None else f"{one.waited_share:.0%}")
        table.add_row(f"rank {number}", *_cells(one, whole), *cells)
    table.add_section()
    table.add_row("one process", *_cells(whole, whole), style="dim")
    return table


def _cells(one: RankHolding, whole: RankHolding) -> list[str]:
    return [
        f"{one.parameters:,}",
        f"{one.parameters / max(1, whole.parameters):.1%}",
        _megabytes(one.parameter_bytes),
        _megabytes(one.training_bytes),
        _megabytes(one.peak_bytes) if one.peak_bytes is not None else "not measured",
    ]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def print_holdings(ranks: Sequence[RankHolding], whole: RankHolding) -> None:
    """Print the table; as wide as it needs where there is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(holdings_table(ranks, whole))
