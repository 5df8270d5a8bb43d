"""How long collectives between the ranks of one host take: through gloo, and through shared memory.

    OMP_NUM_THREADS=1 python benchmarks/collectives.py --ranks 2 --json collectives.json

Three ways to the same collective are timed in one run, in turns: gloo, torch.distributed on colrow's backend
(the same call, through shared memory), and the direct path that colrow's own collectives take. Each rank's
thread is bound to a processor, unless --free is given. Per size and way there are several blocks of calls;
what is quoted is the median call of the fastest block, because on a machine with other work most blocks
measure that work. The medians of all blocks are in the JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

import colrow
from colrow.launch import launch
from colrow.transport import share_memory

WAYS = ("gloo", "c10d", "direct")
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = tuple(4096 * 4**power for power in range(8))
"""Bytes: 4 KB to 64 MB."""
TARGETS = ((4 << 20, 20.0), (64 << 20, 8.0))
"""How much faster than gloo the direct all-reduce of two ranks has to be, up to a size in bytes."""
BLOCK_BYTES = 16 << 20
"""What a block of calls moves, in at most 100 calls and at least three."""
LEAST_BLOCKS = 5


def measure(
    ranks: int, operations: list[str], sizes: list[int], seconds: float, bound: bool
) -> list[dict[str, Any]]:
    """In each rank: a row per operation, dtype and size, with the medians in seconds of every block.

    Args:
        ranks: number of ranks.
        operations: of :data:`OPERATIONS`.
        sizes: in bytes.
        seconds: how long to measure each row.
        bound: whether each rank's thread stays on a processor.
    """
    colrow.init_mesh(tp=ranks, device="cpu", timeout=300)
    gloo = dist.new_group(backend="gloo")
    assert dist.group.WORLD is not None
    shared = share_memory(dist.group.WORLD)
    if shared is None:
        raise RuntimeError("there is no shared memory to be measured: see the line above")
    dist.all_reduce(torch.zeros(1), group=gloo)
    if bound:
        _bind(dist.get_rank())
    rows = []
    for operation in operations:
        for name, dtype in DTYPES.items():
            for size in sizes:
                calls = _calls(
                    operation, torch.zeros(size // dtype.itemsize, dtype=dtype), ranks, gloo, shared
                )
                number = max(3, min(100, BLOCK_BYTES // size))
                begin = time.perf_counter()
                for way in WAYS:  # warms, and tells how many blocks there is time for
                    _block(calls[way], number)
                rounds = torch.tensor([seconds / (time.perf_counter() - begin)])
                dist.broadcast(rounds, 0)
                blocks: dict[str, list[float]] = {way: [] for way in WAYS}
                for _ in range(max(LEAST_BLOCKS, int(rounds.item()))):
                    for way in WAYS:
                        blocks[way].append(_block(calls[way], number))
                rows.append({"operation": operation, "dtype": name, "bytes": size, "blocks": blocks})
    return rows


def _bind(rank: int) -> None:
    """Keep this thread on a processor of its own, so that other programs do not drive two ranks onto one.

    Gloo's own threads, which are there already, go where they like.
    """
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[rank % len(processors)]})


def _block(call: Callable[[], object], number: int) -> float:
    """Median seconds of a call, all ranks beginning together."""
    dist.barrier()
    seconds = []
    for _ in range(number):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def _calls(
    operation: str, tensor: torch.Tensor, ranks: int, gloo: dist.ProcessGroup, shared: Any
) -> dict[str, Callable[[], object]]:
    """The ways to one collective on this tensor: reduced in place, gathered from, or scattered."""
    whole = tensor.new_zeros(tensor.numel() * ranks) if operation == "all_gather" else tensor
    part = torch.zeros_like(tensor.chunk(ranks)[0])
    if operation == "all_reduce":
        return {
            "gloo": lambda: dist.all_reduce(tensor, group=gloo),
            "c10d": lambda: dist.all_reduce(tensor),
            "direct": lambda: shared.all_reduce(tensor, tensor),
        }
    if operation == "all_gather":
        return {
            "gloo": lambda: dist.all_gather_into_tensor(whole, tensor, group=gloo),
            "c10d": lambda: dist.all_gather_into_tensor(whole, tensor),
            "direct": lambda: shared.all_gather(tensor, whole),
        }
    return {
        "gloo": lambda: dist.reduce_scatter_tensor(part, tensor, group=gloo),
        "c10d": lambda: dist.reduce_scatter_tensor(part, tensor),
        "direct": lambda: shared.reduce_scatter(tensor, part),
    }


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the microseconds of each way's fastest block, and by how much each is faster than gloo."""
    results = []
    for row in rows:
        fastest = {way: min(blocks) * 1e6 for way, blocks in row["blocks"].items()}
        times = {f"{way}_faster": fastest["gloo"] / fastest[way] for way in WAYS if way != "gloo"}
        results.append({**row, "microseconds": fastest, **times})
    return results


def missed(results: Sequence[dict[str, Any]], ranks: int) -> list[str]:
    """Targets that were not met, in words."""
    lines = []
    for row in results:
        target = next(factor for limit, factor in TARGETS if row["bytes"] <= limit)
        if ranks == 2 and row["operation"] == "all_reduce" and row["direct_faster"] < target:
            lines.append(
                f"{row['dtype']} {_size(row['bytes'])}: {row['direct_faster']:.1f} times, not {target:g}"
            )
    return lines


def table(results: Sequence[dict[str, Any]], ranks: int) -> Table:
    """Microseconds per call, and how many times faster than gloo."""
    shown = Table(
        title=f"{ranks} ranks, µs per call (times faster than gloo)",
        box=box.SIMPLE_HEAVY,
        title_justify="left",
    )
    for name in ("", "", ""):
        shown.add_column(name, no_wrap=True)
    for name in ("gloo", "c10d on shm", "direct"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in results:
        times = row["microseconds"]
        shown.add_row(
            row["operation"],
            row["dtype"],
            _size(row["bytes"]),
            f"{times['gloo']:.1f}",
            *(f"{times[way]:.1f} ({row[f'{way}_faster']:.1f})" for way in ("c10d", "direct")),
        )
    return shown


def _size(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} KB"


def main(arguments: list[str]) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Collectives through gloo and through shared memory.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row (default: 2)")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=["all_reduce"])
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="bytes of the largest tensor")
    parser.add_argument("--free", action="store_true", help="let the ranks' threads go where they like")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args(arguments)
    sizes = [size for size in SIZES if size <= options.largest]
    task = {
        "ranks": options.ranks,
        "operations": options.operations,
        "sizes": sizes,
        "seconds": options.seconds,
        "bound": not options.free,
    }
    module = __spec__.name if __spec__ else Path(__file__).stem
    results = summary(launch(f"{module}:measure", task, options.ranks, timeout=600))
    console = Console()
    console.print(table(results, options.ranks))
    not_met = missed(results, options.ranks)
    for line in not_met:
        console.print(f"missed: {line}")
    if options.ranks == 2 and "all_reduce" in options.operations and not not_met:
        console.print("Both targets are met: 20 times to 4 MB, 8 times to 64 MB.")
    if options.json:
        record = {
            "options": task,
            "environment": {"torch": torch.__version__, "python": platform.python_version()},
            "targets": TARGETS,
            "results": results,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
