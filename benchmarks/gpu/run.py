"""colrow on one GPU: overhead, one rank's share of large layers, the loss, and two ranks that share it.

    python benchmarks/gpu/run.py --output gpu.json
    python benchmarks/gpu/run.py --device cpu --rounds 1 --calls 1   # tries the program

Four parts, each by its name or all:

- ``overhead``: a training step of the model as it is, and parallelized over one rank.
- ``share``: layers of Llama-3-8B and 70B, whole and as one of eight ranks computes them, with communication
  removed: how much of an eighth is left of the time.
- ``loss``: the last layer and its loss at a vocabulary of 128256, with all logits and fused: time and memory.
- ``sharing``: two ranks on the one device, through gloo, in fp32 and bf16, against one: losses and gradients.

Forms of one part take turns within rounds; ratios are taken within a round, quartiles are over rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from colrow.launch import launch
from gpu import parts
from gpu.device import Timed
from gpu.sharing import TOLERANCES

Work: TypeAlias = "Callable[[parts.Sizes, torch.device, torch.dtype, int, int], dict[str, Timed]]"

RANKS = 8
WORK: dict[str, Work] = {
    "overhead": parts.overhead,
    "share": partial(parts.share, RANKS),
    "loss": partial(parts.loss, 1),
}
PARTS = (*WORK, "sharing")


def measure(names: list[str], device: torch.device, rounds: int, calls: int) -> list[dict[str, Any]]:
    """A row for each form of each part."""
    is_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if is_gpu else torch.float32
    large = parts.LARGE if is_gpu else parts.SMALL
    rows: list[dict[str, Any]] = []
    for model, sizes in large.items():
        for name, work in WORK.items():
            # two copies of the largest with their optimizers would not fit
            if name in names and not (name == "overhead" and model != next(iter(large))):
                found = work(sizes, device, dtype, rounds, calls)
                rows += [
                    {"part": name, "model": model, "form": form, **asdict(one)} for form, one in found.items()
                ]
            if is_gpu:
                torch.cuda.empty_cache()
    for precision in TOLERANCES if "sharing" in names else ():
        rows.append(
            {"part": "sharing", "model": "small Llama", "form": precision, **share(device.type, precision)}
        )
    return rows


def share(device: str, dtype: str) -> dict[str, Any]:
    """Two ranks on the device.

    Raises:
        RuntimeError: if they compute something else than one.
    """
    configuration = {"device": device, "dtype": dtype, "ranks": 2}
    found = asdict(launch("gpu.sharing:compare", configuration, 2, timeout=300))
    if abs(found["cut"] / found["whole"] - 1) > TOLERANCES[dtype] or found["gradients"] > TOLERANCES[dtype]:
        raise RuntimeError(f"two ranks on one {device} compute something else in {dtype}: {found}")
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows, to be read."""
    shown = Table(box=box.SIMPLE)
    for name in ("part", "model", "form", "time / ratio", "peak memory"):
        shown.add_column(name, justify="left" if name in ("part", "model", "form") else "right")
    for row in rows:
        if row["part"] == "sharing":
            value = f"loss {row['cut']:.5f} for {row['whole']:.5f}, gradients {row['gradients']:.1e}"
            shown.add_row(row["part"], row["model"], row["form"], value, "")
            continue
        value = f"{row['seconds'] * 1e3:.2f} ms, {row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        memory = f"{row['peak_bytes'] / 2**20:.0f} MiB" if row["peak_bytes"] else "-"
        shown.add_row(row["part"], row["model"], row["form"], value, memory)
    return shown


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=5, help="of a form in each round")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    options = parser.parse_args(arguments)
    rows = measure(options.parts, torch.device(options.device), options.rounds, options.calls)
    Console(width=130).print(table(rows))
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
