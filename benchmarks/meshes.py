"""Which meshes train exactly: dense, tied, encoder-decoder and mixture-of-experts models on all of them.

    python benchmarks/meshes.py --ranks 2 3 4 6 8 --output meshes.jsonl
    python benchmarks/meshes.py --ranks 4 8 --sequence

Every mesh of so many ranks that makes sense for a model, and every way in which its replicas can train
together, is verified in float64 against one device that has the data of all replicas: losses, every gradient,
the norm that clips them, and parameters, in three steps. Ranks that fail lose one case; for the others, new
ones are started.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from colrow.launch import LaunchError, launch

DIMENSIONS = {
    "llama": ("pp", "dp", "cp", "tp"),
    "gpt2": ("pp", "dp", "cp", "tp"),
    "t5": ("pp", "dp", "tp"),
    "mixtral": ("pp", "dp", "ep", "cp", "tp"),
}
"""The dimensions that make sense for each model."""
DATA = ("ddp", "zero1", "fsdp")
SCHEDULES = ("1f1b", "gpipe", "zbv", "interleaved_1f1b", "interleaved_zero_bubble")
"""Of pipelines; each case has another one."""
ONE_STAGE = ("1f1b", "gpipe")
"""Those that give each rank one stage: the models have four layers."""
STAGES, EXPERTS = 4, 5
SECONDS = 120.0
"""For one case."""


def cases(models: Sequence[str], ranks: int, sequence: bool) -> Iterator[dict[str, Any]]:
    """All cases of so many ranks. How replicas train together matters where there are some."""
    several, single = itertools.cycle(SCHEDULES), itertools.cycle(ONE_STAGE)
    for model in models:
        names = DIMENSIONS[model]
        divisors = [size for size in range(1, ranks + 1) if ranks % size == 0]
        for sizes in itertools.product(divisors, repeat=len(names)):
            if math.prod(sizes) != ranks:
                continue
            mesh = dict(zip(names, sizes, strict=True))
            if mesh["tp"] == ranks or mesh["pp"] > STAGES:
                continue  # the first is what verify does without a mesh
            if mesh.get("ep", 1) > EXPERTS or (sequence and mesh["tp"] == 1):
                continue
            has_replicas = mesh["dp"] * mesh.get("ep", 1) * mesh.get("cp", 1) > 1
            for data in DATA if has_replicas else DATA[:1]:
                schedule = next(several if mesh["pp"] == 2 else single) if mesh["pp"] > 1 else ""
                case = {"model": model, "mesh": mesh, "data": data, "schedule": schedule}
                yield {**case, "sequence": sequence}


def run(wanted: Sequence[Mapping[str, Any]], ranks: int) -> Iterator[dict[str, Any]]:
    """A row for each case, in order; those after one that fails have other processes."""
    left = list(wanted)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "rows.jsonl"
            arguments = {"cases": left, "output": str(output)}
            error = ""
            try:
                launch("meshes_worker:run", arguments, ranks, threads_per_rank=1, timeout=SECONDS * len(left))
            except LaunchError as failed:
                error = failed.summary
            rows = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
        yield from map(json.loads, rows)
        left = left[len(rows) :]
        if left:
            yield {**left.pop(0), "equal": False, "error": math.inf, "seconds": math.nan, "detail": error}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows, to be read."""
    shown = Table(box=box.SIMPLE)
    for name in (
        "model",
        "mesh",
        "replicas",
        "schedule",
        "equal",
        "largest error",
        "seconds",
        "first difference",
    ):
        shown.add_column(name, justify="right" if name in ("largest error", "seconds") else "left")
    for row in rows:
        mesh = " ".join(f"{name}={size}" for name, size in row["mesh"].items() if size > 1)
        shown.add_row(
            row["model"],
            mesh,
            row["data"],
            row["schedule"],
            "yes" if row["equal"] else "NO",
            f"{row['error']:.1e}",
            f"{row['seconds']:.0f}",
            row["detail"],
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; 0 if all are equal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--models", nargs="+", choices=list(DIMENSIONS), default=list(DIMENSIONS))
    parser.add_argument("--sequence", action="store_true", help="cut along the sequence between regions")
    parser.add_argument("--output", type=Path, help="file for a line of JSON per case")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for ranks in options.ranks:
        for row in run(list(cases(options.models, ranks, options.sequence)), ranks):
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            if options.output is not None:
                options.output.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    Console(width=160).print(table(rows))
    equal = sum(row["equal"] for row in rows)
    print(f"{equal} of {len(rows)} equal")
    return 0 if equal == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
