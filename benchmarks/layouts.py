"""One training step on two ranks, divided along each dimension: time and memory.

    OMP_NUM_THREADS=1 python benchmarks/layouts.py --model gpt --rounds 3

All layouts train the same batches; their losses must agree. Every round runs every layout in processes of its
own, and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from colrow.launch import launch

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {"mesh": {}},
    "tp=2": {"mesh": {"tp": 2}},
    "dp=2, ddp": {"mesh": {"dp": 2}},
    "dp=2, zero1": {"mesh": {"dp": 2}, "data": "zero1"},
    "dp=2, fsdp": {"mesh": {"dp": 2}, "data": "fsdp"},
    "pp=2, 1f1b": {"mesh": {"pp": 2}},
    "pp=2, zbv": {"mesh": {"pp": 2}, "schedule": "zbv"},
    "cp=2": {"mesh": {"cp": 2}},
}
AGREEMENT = 1e-3
"""Relative difference of losses: sums are in other orders, and the steps before amplify that."""


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("gpt", "llama"), default="gpt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in LAYOUTS}
    for _ in range(options.rounds):
        for name, layout in LAYOUTS.items():
            arguments = {"model": options.model, "steps": options.steps, **layout}
            ranks = max(layout["mesh"].values(), default=1)
            found[name].append(
                launch("layouts_worker:run", arguments, ranks, threads_per_rank=1, timeout=300)
            )
    table = Table(box=box.SIMPLE)
    for heading in ("", "step, ms", "over one process", "memory per rank, MB", "over one process"):
        table.add_column(heading, justify="right" if heading else "left")
    first = found["one process"]
    for name, rounds in found.items():
        if abs(rounds[0]["loss"] / first[0]["loss"] - 1) > AGREEMENT:
            raise AssertionError(f"{name} has the loss {rounds[0]['loss']}, one process {first[0]['loss']}")
        times, memory = (
            statistics.median(one[key] / other[key] for one, other in zip(rounds, first, strict=True))
            for key in ("seconds", "megabytes")
        )
        milliseconds = 1e3 * statistics.median(one["seconds"] for one in rounds)
        megabytes = statistics.median(one["megabytes"] for one in rounds)
        table.add_row(name, f"{milliseconds:.0f}", f"{times:.2f}", f"{megabytes:.0f}", f"{memory:.2f}")
    Console(width=110).print(table)
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
