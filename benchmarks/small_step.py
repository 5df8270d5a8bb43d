"""CPU time of a training step whose products take no time: what is left is overhead.

    OMP_NUM_THREADS=1 python benchmarks/small_step.py --tp 2

A Llama of 4 layers, hidden 64, and 8 tokens; forward, backward, fused AdamW. Each rank holds the model whole,
cut by colrow, and cut by transformers' ``tp_plan`` as well, and takes steps of each in turns. So all of them
have the same processor, at the same time and as much disturbed by other programs, and the ranks that are
compared with one process share caches and memory with each other as those of a cut model do.

What is counted is the processor time of the thread that trains, and how much of it goes by in colrow's
reductions: summing, and waiting for other ranks without giving up the processor. Where more programs run than
there are cores, waiting also costs caches, in every system; quote numbers of a quiet machine.

``--parts`` tells where colrow's time goes: forward and backward of the embedding, the layers, and all with
the loss, each by itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import colrow
from colrow.model import calls_for
from step import busy_seconds
from step_worker import SIZES, CollectiveClock, become_rank, build_model

PARTS = ("forward", "backward", "optimizer")
DISTURBED = 0.1
"""A turn in which other programs take a larger share of the cores is made again."""
TURN = 10
"""Steps of one model before the next has its turn."""
ANSWER_SECONDS = 3600.0


@dataclass
class Turns:
    """One model with its optimizer, and the thread's milliseconds of each of its steps."""

    model: nn.Module
    clock: CollectiveClock
    parts: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PARTS})
    collectives: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.train()
        kinds: dict[type, list[nn.Parameter]] = defaultdict(list)
        for parameter in self.model.parameters():
            kinds[type(parameter.data)].append(parameter)
        # transformers leaves some parameters plain, which one fused step does not take together with DTensors
        self._optimizers = [torch.optim.AdamW(alike, lr=1e-5, fused=True) for alike in kinds.values()]
        self._generator = torch.Generator().manual_seed(1)

    def step(self) -> float:
        """Train a step; its loss."""
        shape = (SIZES["tiny"].batch, SIZES["tiny"].sequence)
        tokens = torch.randint(SIZES["tiny"].vocabulary, shape, generator=self._generator)
        self.clock.seconds = 0.0
        times = [time.thread_time()]
        loss = self.model(input_ids=tokens, labels=tokens).loss
        times.append(time.thread_time())
        loss.backward()
        times.append(time.thread_time())
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        times.append(time.thread_time())
        for name, (begin, end) in zip(PARTS, pairwise(times), strict=True):
            self.parts[name].append((end - begin) * 1e3)
        self.collectives.append(self.clock.seconds * 1e3)
        return float(loss.detach())

    def forget(self, turns: Iterable[int]) -> None:
        """Leave out what was measured in some turns."""
        left_out = set(turns)
        for times in (*self.parts.values(), self.collectives):
            times[:] = [one for index, one in enumerate(times) if index // TURN not in left_out]

    def results(self) -> dict[str, float]:
        """Medians over the steps, in milliseconds."""
        found = {name: statistics.median(times) for name, times in self.parts.items()}
        found["step"] = statistics.median(map(sum, zip(*self.parts.values(), strict=True)))
        return found | {"in collectives": statistics.median(self.collectives)}


def in_turns(models: dict[str, Turns], turns: int, patience: int = 1) -> int:
    """Steps of all models, whose losses must stay together.

    Args:
        models: which.
        turns: of each of them.
        patience: so many times as many are made at most, to replace those that other programs disturbed.

    Returns:
        The number of turns that were not disturbed. Others count only if there are too few of these.
    """
    disturbed: list[int] = []
    for number in range(turns * patience):
        losses = {}
        before, own, begin = busy_seconds(), time.process_time(), time.perf_counter()
        for index in range(len(models)):
            name = list(models)[(number + index) % len(models)]
            dist.barrier()
            losses[name] = [models[name].step() for _ in range(TURN)][-1]
        if max(losses.values()) - min(losses.values()) > 1e-3:
            raise RuntimeError(f"they do not train the same model: {losses}")
        spent = torch.tensor([time.process_time() - own], dtype=torch.float64)
        dist.all_reduce(spent)
        after, seconds = busy_seconds(), (time.perf_counter() - begin) * (os.cpu_count() or 1)
        share = 0.0 if before is None or after is None else (after - before - float(spent)) / seconds
        is_disturbed = torch.tensor([float(share > DISTURBED)])
        dist.all_reduce(is_disturbed)  # all ranks go on alike
        if is_disturbed:
            disturbed.append(number)
        if number + 1 - len(disturbed) == turns:
            break
    quiet = number + 1 - len(disturbed)
    if quiet == turns:
        for one in models.values():
            one.forget(disturbed)
    return quiet


def parts_of(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """What to call for a part of a model."""
    sizes = SIZES["tiny"]
    tokens = torch.zeros(sizes.batch, sizes.sequence, dtype=torch.long)
    hidden = torch.randn(sizes.batch, sizes.sequence, sizes.hidden, requires_grad=True)
    positions = tuple(torch.randn(sizes.batch, sizes.sequence, sizes.hidden // sizes.heads) for _ in range(2))
    body: Any = model.model

    def layers() -> Tensor:
        value = hidden
        for layer in body.layers:
            value = layer(value, position_embeddings=positions)
        return value

    return {
        "embedding": lambda: body.embed_tokens(tokens),
        "layers": layers,
        "all without the loss": lambda: body(input_ids=tokens).last_hidden_state,
        "all": lambda: model(input_ids=tokens, labels=tokens).loss,
    }


def measure_parts(models: dict[str, Turns], turns: int) -> dict[str, dict[str, list[float]]]:
    """Microseconds of forward and backward of each part of each model, medians."""
    found: dict[str, dict[str, list[float]]] = {}
    for part in parts_of(models["one process"].model):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
        for _ in range(turns):
            for name, one in models.items():
                call = parts_of(one.model)[part]
                dist.barrier()
                for _ in range(TURN):
                    begin = time.thread_time()
                    result = call()
                    middle = time.thread_time()
                    result.backward(torch.ones_like(result))
                    times[name].append((middle - begin, time.thread_time() - middle))
                one.model.zero_grad()
        found[part] = {
            name: [statistics.median(both) * 1e6 for both in zip(*pairs, strict=True)]
            for name, pairs in times.items()
        }
    return found


def serve(rank: int, port: int, options: argparse.Namespace, folder: str, connection: Connection) -> None:
    """One rank."""
    torch.set_num_threads(1)
    become_rank(rank, options.tp, port)
    clock = CollectiveClock()
    mesh = colrow.init_mesh(tp=options.tp, device="cpu")
    cut = build_model("tiny")
    colrow.parallelize(cut, mesh, calls_for(cut))
    models = {"one process": Turns(build_model("tiny"), clock), "colrow": Turns(cut, clock)}
    if options.transformers:
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(folder, distributed_config={"tp_plan": "auto"})
        models["transformers"] = Turns(theirs, clock)
    in_turns(models, 2)  # warm
    for one in models.values():
        one.collectives.clear()
        for times in one.parts.values():
            times.clear()
    gc.collect()
    quiet = in_turns(models, options.turns, options.patience)
    results = {name: one.results() for name, one in models.items()}
    only_ours = {name: models[name] for name in ("one process", "colrow")}
    parts = measure_parts(only_ours, options.turns) if options.parts else {}
    connection.send((results, parts, quiet))
    dist.barrier()
    dist.destroy_process_group()


Found: TypeAlias = list[tuple[dict[str, dict[str, float]], dict[str, Any], int]]
"""Of each rank the steps, the parts, and the number of turns that were not disturbed."""


def run(options: argparse.Namespace) -> Found:
    """What each rank measured."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        model: Any = build_model("tiny")
        model.save_pretrained(folder)
        pipes, processes = [], []
        for rank in range(options.tp):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, port, options, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            found = []
            for pipe in pipes:
                if not pipe.poll(ANSWER_SECONDS):
                    raise TimeoutError("a rank did not answer")
                found.append(pipe.recv())
            return found
        finally:
            for process in processes:
                process.join(5)
                process.kill()
                process.join()


def tables(found: Found) -> list[Table]:
    """Means over the ranks."""
    shown = Table(title="CPU ms per rank and step, medians", box=box.SIMPLE_HEAVY, title_justify="left")
    columns = (*PARTS, "step", "in collectives")
    for heading in ("", *columns, "over one process", "without collectives"):
        shown.add_column(heading, justify="left" if not heading else "right")

    def mean(name: str, column: str) -> float:
        return statistics.fmean(results[name][column] for results, *_ in found)

    alone = mean("one process", "step")
    for name in found[0][0]:
        step, waiting = mean(name, "step"), mean(name, "in collectives")
        cells = [f"{mean(name, column):.2f}" for column in columns]
        shown.add_row(name, *cells, f"{step / alone:.2f}", f"{(step - waiting) / alone:.2f}")
    if not found[0][1]:
        return [shown]
    parts = Table(title="CPU µs of parts: one process, colrow", box=box.SIMPLE_HEAVY, title_justify="left")
    for heading in ("", "forward", "", "more", "backward", "", "more"):
        parts.add_column(heading, justify="right")
    for part in found[0][1]:
        cells = []
        for direction in range(2):
            one, ours = (
                statistics.fmean(of[part][name][direction] for _, of, _ in found)
                for name in ("one process", "colrow")
            )
            cells += [f"{one:.0f}", f"{ours:.0f}", f"{ours - one:.0f}"]
        parts.add_row(part, *cells)
    return [shown, parts]


def main(arguments: list[str]) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="CPU time of a step that is nothing but overhead.")
    parser.add_argument("--tp", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument("--turns", type=int, default=30, help=f"of {TURN} steps of each model (default: 30)")
    parser.add_argument("--patience", type=int, default=5, help="at most so many times --turns (default: 5)")
    parser.add_argument("--transformers", action="store_true", help="transformers' tensor parallelism too")
    parser.add_argument("--parts", action="store_true", help="also parts of the model by themselves")
    parser.add_argument("--output", type=Path, help="write all numbers to this JSON file")
    options = parser.parse_args(arguments)
    for name in ("tp", "turns", "patience"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    found = run(options)
    console = Console()
    console.print(*tables(found))
    quiet = min(turns for *_, turns in found)
    if quiet < options.turns:
        console.print(f"Not quiet: other programs took more than {DISTURBED:.0%} in all but {quiet} turns.")
    if options.output:
        options.output.write_text(
            json.dumps([{"steps": steps, "parts": parts} for steps, parts, _ in found], indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
