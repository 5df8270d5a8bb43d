"""Time and memory of the last layer and its loss, forward and backward: fused against all logits at once.

    OMP_NUM_THREADS=1 python benchmarks/loss.py --output loss.json

Cases are hidden states, the last layer and its loss, or a whole GPT-2 of transformers' that is given labels.
Each rank is a process with one thread. Times: both ways take turns in the same processes; what is quoted is
the median over rounds of the time of the slowest rank, and of the ratio of two turns of one round. Memory, in
processes of their own, of one forward and backward: the most that logits take with their copies and
gradients; the most that all of torch's tensors take; and the highest resident memory above that before, with
the matrix library's own. The gradients of hidden states and weights, which both ways leave behind, are part
of the latter two.
"""

from __future__ import annotations

import argparse
import copy
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
import weakref
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

import colrow
from colrow.apply.parallelize import examples_of
from colrow.collectives import communicator
from colrow.layers import cross_entropy
from colrow.layers.faster import agreed_products
from colrow.layers.linear_cross_entropy import column_cross_entropy
from colrow.layers.linear_functions import ColumnWeights, column_linear
from colrow.layout import Cut
from colrow.plan import derive_plan
from step_worker import become_rank

ANSWER_SECONDS = 900.0
TOLERANCE = 1e-4
"""Relative difference of the losses; the logits are rounded alike."""
WAYS = ("plain", "fused")


@dataclass(frozen=True)
class Case:
    """Sizes of a loss. ``dtype`` is a name of torch's; with ``layers`` it is that of a whole GPT-2."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: str
    layers: int = 0

    @property
    def name(self) -> str:
        of = f", {self.layers} layers" if self.layers else ""
        return f"{self.tokens} x {self.hidden} x {self.vocabulary} {self.dtype}{of}"


CASES = [
    Case(1024, 512, 8192, "float32"),
    Case(1024, 512, 8192, "bfloat16"),
    Case(512, 1024, 128256, "float32"),
    Case(512, 1024, 128256, "bfloat16"),
    Case(1024, 512, 8192, "float32", layers=4),
    Case(1024, 512, 8192, "bfloat16", layers=4),
]


@dataclass
class Measured:
    """What one rank measured: seconds and CPU seconds of each turn, or its peaks of memory; the loss."""

    loss: float
    seconds: list[float]
    cpu_seconds: list[float]
    resident_bytes: int = 0
    tensor_bytes: int = 0
    logits_bytes: int = 0


class LogitsMemory(TorchDispatchMode):
    """Memory of logits: of tensors that have this rank's ids, and not the hidden features.

    Those are the logits, their copies in other dtypes or orders, and their gradients.
    """

    def __init__(self, ids: int, hidden: int) -> None:
        super().__init__()
        self._ids, self._hidden = ids, hidden
        self._known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and self._ids in tensor.shape and self._hidden not in tensor.shape:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._known or size <= 4 * self._ids:  # what is expanded has no memory, a bias little
            return
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


class Work:
    """What is measured, on one rank, in both ways."""

    def __init__(self, case: Case, ranks: int) -> None:
        self.case = case
        self.mesh = colrow.init_mesh(tp=ranks, device="cpu")
        self.ranks = communicator(self.mesh)
        self.cut = Cut.balanced(case.vocabulary, ranks)
        self.dtype: torch.dtype = getattr(torch, case.dtype)

    def loss(self, way: str) -> Tensor:
        """The loss, with a graph."""
        raise NotImplementedError

    def forget(self) -> None:
        """Let go of all gradients."""
        raise NotImplementedError

    def turn(self, way: str) -> float:
        """Forward and backward; the loss."""
        self.forget()
        loss = self.loss(way)
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
        self.forget()
        ctypes.CDLL(None).malloc_trim(0)
        self.ranks.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
        before = _memory("VmRSS")
        loss = self.turn(way)
        resident = _memory("VmHWM") - before
        self.forget()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self.turn(way)
        now = peak = 0
        assert profiled.profiler is not None
        for event in profiled.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        with LogitsMemory(self.cut.count(self.ranks.rank), self.case.hidden) as logits:
            self.turn(way)
        return Measured(loss, [], [], resident, peak, logits.peak)


class LastLayer(Work):
    """Hidden states, the last layer and its loss."""

    def __init__(self, case: Case, ranks: int) -> None:
        super().__init__(case, ranks)
        torch.manual_seed(0)
        self.x = torch.randn(case.tokens, case.hidden).to(self.dtype).requires_grad_()
        torch.manual_seed(1 + self.ranks.rank)
        weight = torch.empty(self.cut.count(self.ranks.rank), case.hidden, dtype=self.dtype)
        self.weight = weight.normal_(std=0.02).requires_grad_()
        self.target = torch.randint(
            case.vocabulary, (case.tokens,), generator=torch.Generator().manual_seed(0)
        )
        (products,) = agreed_products(self.ranks, [(case.hidden, len(weight))])
        self.layer = ColumnWeights(self.ranks, "enter", True, products, False)

    def loss(self, way: str) -> Tensor:
        """Of all logits, in single precision at least, as in transformers; or of some at a time."""
        if way == "fused":
            return column_cross_entropy(
                self.x, self.weight, None, self.target, self.layer, vocabulary=self.cut
            )
        products = self.layer.products
        logits = column_linear(self.x, self.weight, None, self.ranks, "enter", True, products, False)
        return cross_entropy(logits.float(), self.target, self.ranks, vocabulary=self.cut)

    def forget(self) -> None:
        self.x.grad = self.weight.grad = None


class Model(Work):
    """transformers' GPT-2, which computes its loss itself, from labels."""

    def __init__(self, case: Case, ranks: int) -> None:
        super().__init__(case, ranks)
        length = min(256, case.tokens)
        configuration = GPT2Config(
            vocab_size=case.vocabulary,
            n_positions=length,
            n_embd=case.hidden,
            n_layer=case.layers,
            n_head=case.hidden // 64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
        torch.manual_seed(0)
        self.ids = torch.randint(case.vocabulary, (case.tokens // length, length))
        self._model = nn.Module.to(GPT2LMHeadModel(configuration), self.dtype)
        few = self.ids[:1, :8]
        self._plan = derive_plan(self._model, examples_of({"input_ids": few, "labels": few}), ranks)
        self.models: dict[str, nn.Module] = {}

    def loss(self, way: str) -> Tensor:
        """That of the model."""
        if way not in self.models:
            assert self._plan.loss is not None
            plan = replace(self._plan, loss=replace(self._plan.loss, fused=way == "fused"))
            self.models[way] = colrow.parallelize(copy.deepcopy(self._model), self.mesh, plan)
        loss: Tensor = self.models[way](input_ids=self.ids, labels=self.ids).loss
        return loss

    def forget(self) -> None:
        for model in self.models.values():
            model.zero_grad(set_to_none=True)


def _memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def serve(case: Case, ranks: int, rank: int, port: int, connection: Connection) -> None:
    """A process: answers each request, a method of :class:`Work` and its arguments."""
    try:
        torch.set_num_threads(1)
        become_rank(rank, ranks, port)
        work = (Model if case.layers else LastLayer)(case, ranks)
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(work, method)(*arguments))
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
    resident, tensors, logits, losses = {}, {}, {}, {}
    for way in WAYS:
        processes = Ranks(case, ranks)
        try:
            found = processes.ask("memory", way)
        finally:
            processes.close()
        resident[way] = max(one.resident_bytes for one in found)
        tensors[way] = max(one.tensor_bytes for one in found)
        logits[way] = max(one.logits_bytes for one in found)
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
    return {
        "case": asdict(case),
        "ranks": ranks,
        "loss": losses,
        "logits_bytes": logits,
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
    for heading in (
        "logits\nratio",
        "logits\nMB",
        "tensors\nMB",
        "resident\nMB",
        "ms",
        "time\nratio",
        "CPU\nratio",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    for one in results:
        logits = one["logits_bytes"]
        pairs = [(logits, 1e6), (one["tensor_bytes"], 1e6), (one["resident_bytes"], 1e6)]
        pairs.append((one["milliseconds"], 1))
        shown.add_row(
            Case(**one["case"]).name,
            f"1 : {logits['plain'] / logits['fused']:.1f}",
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
    Console(width=130).print(table(results))
    if options.output:
        record = {"torch": torch.__version__, "cores": os.cpu_count(), "results": results}
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
