"""Time and memory of the last layer and its loss, forward and backward: fused against all logits at once.

    OMP_NUM_THREADS=1 python benchmarks/loss.py --output loss.json

Each rank is a process with one thread. Times: both ways take turns in the same processes; what is quoted is
the median over rounds of the time of the slowest rank, and of the ratio of two turns of one round. Memory, in
processes of their own, of one forward and backward: the most that torch's tensors take, and the highest
resident memory above that before, with the matrix library's own. The gradients of hidden states and weight,
which both ways leave behind, are part of it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import re
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import colrow
from colrow.collectives import communicator
from colrow.layers import cross_entropy
from colrow.layers.linear_cross_entropy import column_cross_entropy
from colrow.layers.linear_functions import column_linear
from colrow.layers.loss_chunks import ColumnWeights
from colrow.layers.products import agreed_products
from colrow.layout import Cut

ANSWER_SECONDS = 900.0
TOLERANCE = 1e-4
"""Relative difference of the losses; the logits are rounded alike."""
WAYS = ("plain", "fused")


@dataclass(frozen=True)
class Case:
    """Sizes of a loss. ``dtype`` is a name of torch's."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.tokens} x {self.hidden} x {self.vocabulary} {self.dtype}"


CASES = [
    Case(1024, 512, 8192, "float32"),
    Case(1024, 512, 8192, "bfloat16"),
    Case(512, 1024, 128256, "float32"),
    Case(512, 1024, 128256, "bfloat16"),
]


@dataclass
class Measured:
    """What one rank measured: seconds and CPU seconds of each turn, or its peaks of memory; the loss."""

    loss: float
    seconds: list[float]
    cpu_seconds: list[float]
    resident_bytes: int = 0
    tensor_bytes: int = 0


class Loss:
    """Operands of one rank, and both ways to the loss."""

    def __init__(self, case: Case, ranks: int) -> None:
        self.ranks = communicator(colrow.init_mesh(tp=ranks, device="cpu"))
        self.cut = Cut.balanced(case.vocabulary, ranks)
        torch.manual_seed(0)
        dtype: torch.dtype = getattr(torch, case.dtype)
        self.x = torch.randn(case.tokens, case.hidden).to(dtype).requires_grad_()
        torch.manual_seed(1 + self.ranks.rank)
        weight = torch.empty(self.cut.count(self.ranks.rank), case.hidden, dtype=dtype)
        self.weight = weight.normal_(std=0.02).requires_grad_()
        self.target = torch.randint(
            case.vocabulary, (case.tokens,), generator=torch.Generator().manual_seed(0)
        )
        self.layer = ColumnWeights(self.ranks, "enter", True, agreed_products(self.ranks), False)

    def plain(self) -> Tensor:
        """All logits, in single precision at least, as transformers computes them."""
        layer = self.layer
        logits = column_linear(self.x, self.weight, None, self.ranks, "enter", True, layer.products, False)
        return cross_entropy(logits.float(), self.target, self.ranks, vocabulary=self.cut)

    def fused(self) -> Tensor:
        """Logits of some tokens at a time."""
        return column_cross_entropy(self.x, self.weight, None, self.target, self.layer, vocabulary=self.cut)

    def turn(self, way: str) -> float:
        """Forward and backward; the loss."""
        self.x.grad = self.weight.grad = None
        compute: Callable[[], Tensor] = getattr(self, way)
        loss = compute()
        loss.backward()
        return loss.item()

    def times(self, way: str, turns: int) -> Measured:
        """Some turns, which the ranks begin together."""
        found = Measured(0.0, [], [])
        for _ in range(turns):
            self.ranks.barrier()
            cpu, begin = time.process_time(), time.perf_counter()
            found.loss = self.turn(way)
            found.seconds.append(time.perf_counter() - begin)
            found.cpu_seconds.append(time.process_time() - cpu)
        return found

    def memory(self, way: str) -> Measured:
        """The peaks of a turn; what a process needs only once has been there before."""
        self.turn(way)
        self.x.grad = self.weight.grad = None
        ctypes.CDLL(None).malloc_trim(0)
        self.ranks.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
        before = _memory("VmRSS")
        loss = self.turn(way)
        resident = _memory("VmHWM") - before
        self.x.grad = self.weight.grad = None
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self.turn(way)
        now = peak = 0
        assert profiled.profiler is not None
        for event in profiled.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        return Measured(loss, [], [], resident, peak)


def _memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def serve(case: Case, ranks: int, rank: int, port: int, connection: Connection) -> None:
    """A process: answers each request, a method of :class:`Loss` and its arguments."""
    try:
        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        loss = Loss(case, ranks)
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(loss, method)(*arguments))
    except EOFError:
        os._exit(0)
    except BaseException:
        connection.send(traceback.format_exc())
        os._exit(1)


class Ranks:
    """The processes of one case."""

    def __init__(self, case: Case, ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._connections = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(case, ranks, rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def ask(self, method: str, *arguments: object) -> list[Measured]:
        """What each rank measured."""
        for connection in self._connections:
            connection.send((method, arguments))
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(ANSWER_SECONDS):
                raise RuntimeError(f"rank {rank} did not answer")
            answer = connection.recv()
            if isinstance(answer, str):
                raise RuntimeError(f"rank {rank}:\n{answer}")
            answers.append(answer)
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def measure(case: Case, ranks: int, rounds: int, turns: int) -> dict[str, Any]:
    """All numbers of one case.

    Raises:
        RuntimeError: if a rank failed, or the two ways do not give the same loss.
    """
    resident, tensors, losses = {}, {}, {}
    for way in WAYS:
        processes = Ranks(case, ranks)
        try:
            found = processes.ask("memory", way)
        finally:
            processes.close()
        resident[way] = max(one.resident_bytes for one in found)
        tensors[way] = max(one.tensor_bytes for one in found)
        losses[way] = found[0].loss
    if abs(losses["fused"] - losses["plain"]) > TOLERANCE * abs(losses["plain"]):
        raise RuntimeError(f"{case.name}: the losses differ: {losses}")
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    processes = Ranks(case, ranks)
    try:
        for number in range(rounds + 1):  # the first is not counted
            for way in WAYS if number % 2 else reversed(WAYS):
                found = processes.ask("times", way, turns)
                if number:
                    slowest = [max(of) for of in zip(*(one.seconds for one in found), strict=True)]
                    seconds[way].append(statistics.median(slowest))
                    cpu[way].append(statistics.fmean(statistics.median(one.cpu_seconds) for one in found))
    finally:
        processes.close()
    element = 4 if case.dtype == "float32" else 2
    return {
        "case": asdict(case),
        "ranks": ranks,
        "loss": losses,
        "logits_bytes": case.tokens * case.vocabulary // ranks * element,
        "tensor_bytes": tensors,
        "resident_bytes": resident,
        "milliseconds": {way: statistics.median(seconds[way]) * 1e3 for way in WAYS},
        "cpu_milliseconds": {way: statistics.median(cpu[way]) * 1e3 for way in WAYS},
        "time_ratio": _ratio(seconds),
        "cpu_ratio": _ratio(cpu),
        "rounds": {"seconds": seconds, "cpu_seconds": cpu},
    }


def _ratio(found: dict[str, list[float]]) -> float:
    return statistics.median(f / p for f, p in zip(found["fused"], found["plain"], strict=True))


def table(results: list[dict[str, Any]]) -> Table:
    """A row for each case."""
    shown = Table(title="last layer and loss, forward and backward", box=box.SIMPLE_HEAVY)
    shown.title_justify = "left"
    shown.add_column("tokens x hidden\nx vocabulary", no_wrap=True)
    for heading in ("logits\nMB", "tensors\nMB", "resident\nMB", "ms", "time\nratio", "CPU\nratio"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for one in results:
        pairs = [(one["tensor_bytes"], 1e6), (one["resident_bytes"], 1e6), (one["milliseconds"], 1)]
        shown.add_row(
            Case(**one["case"]).name,
            f"{one['logits_bytes'] / 1e6:.0f}",
            *(f"{of['plain'] / unit:.0f} → {of['fused'] / unit:.0f}" for of, unit in pairs),
            f"{one['time_ratio']:.2f}",
            f"{one['cpu_ratio']:.2f}",
        )
    return shown


def main(arguments: list[str]) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Time and memory of the loss, fused and plain.")
    parser.add_argument("--tp", type=int, default=2, help="ranks that share the vocabulary (default: 2)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds over both ways (default: 7)")
    parser.add_argument("--turns", type=int, default=3, help="of each way in a round (default: 3)")
    parser.add_argument("--cases", type=int, nargs="+", help="numbers of the cases, from 0 (default: all)")
    parser.add_argument("--output", type=Path, help="write all numbers to this JSON file")
    options = parser.parse_args(arguments)
    results = []
    for number in options.cases or range(len(CASES)):
        results.append(measure(CASES[number], options.tp, options.rounds, options.turns))
    Console(width=110).print(table(results))
    if options.output:
        record = {"torch": torch.__version__, "cores": os.cpu_count(), "results": results}
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
