"""Which models are cut exactly: each one of a file is built, planned and verified on real ranks.

    python benchmarks/coverage.py --builders benchmarks/builders/listed.py --tp 2 --json out.json

The file is any Python file with ``names() -> list[str]`` and ``build(name) -> (model, inputs)``: models in
float64 on the CPU that are called as ``model(**inputs)``.

Every model has processes of its own. One that raises, dies, hangs or takes all memory loses its own row
only. They are forked from a process that has already imported torch and transformers, so that a small model
takes a second or two.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from coverage_processes import Process, preload, run_names
from coverage_rows import Row

NAMES_SECONDS = 300.0
"""How long the file may take to say which models it has."""
POLL_SECONDS = 0.05
NAME_WIDTH = 36
REASON_WIDTH = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 if every model has a row, whatever is in it."""
    options = _parse(arguments)
    builders = options.builders.resolve()
    preload()
    try:
        names = options.names.split(",") if options.names else run_names(builders, NAMES_SECONDS)
    except RuntimeError as error:
        print(f"{options.builders}: {error}", file=sys.stderr)
        return 1
    print(f"{len(names)} models of {options.builders.name}, tensor parallel over {options.tp} ranks\n")
    print(
        _line(
            "model", "traced", "planned", "cut", "exact", "counted", "seconds", "first difference, or error"
        )
    )
    started = time.monotonic()
    rows: dict[str, Row] = {}
    for row in _run(builders, names, options.tp, options.jobs, options.timeout):
        rows[row.name] = row
        print(render(row), flush=True)
        if options.json:
            ordered = [rows[name] for name in names if name in rows]
            _write(options.json, [asdict(each) for each in ordered])
    print(f"\n{summary(list(rows.values()))}, in {time.monotonic() - started:.0f} s")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--builders", type=Path, required=True, help="Python file with names() and build()")
    parser.add_argument("--names", default="", help="only these, separated by commas; default: all")
    parser.add_argument("--tp", type=int, default=2, help="number of ranks (default 2)")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default 1)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one model (default 120)")
    parser.add_argument("--json", type=Path, help="write the rows to this file, after every model")
    options = parser.parse_args(arguments)
    if not options.builders.is_file():
        parser.error(f"--builders: there is no file {options.builders}")
    for name in ("tp", "jobs", "timeout"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be positive")
    return options


def _run(builders: Path, names: list[str], ranks: int, jobs: int, timeout: float) -> Iterator[Row]:
    """The rows as they complete."""
    waiting, running = list(dict.fromkeys(names)), list[Process]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Process(builders, waiting.pop(0), ranks, timeout))
            for process in list(running):
                if process.poll():
                    running.remove(process)
                    yield process.row
            time.sleep(POLL_SECONDS if running else 0)
    finally:
        for process in running:
            process.kill()


def render(row: Row) -> str:
    """A line of the table."""
    reason = row.first_difference or row.error
    return _line(
        row.name,
        "yes" if row.traced else "no",
        "yes" if row.planned else "no",
        f"{row.share_cut:.1%}" if row.planned else "",
        "yes" if row.exact else "no",
        "yes" if row.predicted else "no",
        f"{row.seconds:.1f}",
        " ".join(reason.split()),
    )


def _line(*cells: str) -> str:
    name, *middle, reason = cells
    shown = reason if len(reason) <= REASON_WIDTH else f"{reason[: REASON_WIDTH - 3]}..."
    return "  ".join([name.ljust(NAME_WIDTH), *(cell.rjust(7) for cell in middle), shown]).rstrip()


def summary(rows: list[Row]) -> str:
    """How many rows reached each stage."""
    planned = [row for row in rows if row.planned]
    share = sum(row.share_cut for row in planned) / max(1, len(planned))
    exact = sum(row.exact for row in rows)
    runs, traced = (sum(getattr(row, stage) for row in rows) for stage in ("runs", "traced"))
    return (
        f"{len(rows)} models: {runs} run by themselves, {traced} traced, {len(planned)} planned ({share:.1%} "
        f"of the parameters cut on average), {exact} exact ({exact / max(1, runs):.1%} of {runs})"
    )


def _write(target: Path, rows: list[dict[str, object]]) -> None:
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.replace(target)


if __name__ == "__main__":
    sys.exit(main())
