"""Memory of one training step on each rank: weights, gradients, AdamW's state and what autograd keeps.

    OMP_NUM_THREADS=1 python benchmarks/memory.py --model gpt --tp 2 --output memory.json

Variants, all in one run: one process; the model cut over the ranks; the same with what lies between regions
cut along the sequence; and that again with layers that keep what they have gathered, in place of gathering it
again in the backward pass.

Every allocation of torch's is counted, by its profiler. The peaks are those of a later step, in which
gradients are made anew: ``forward`` and ``backward`` hold weights, AdamW's state and activations, ``update``
holds weights, gradients, AdamW's state and what the update needs besides. ``kept`` is what the forward pass
leaves for the backward pass. Beside them stands the highest resident memory of a process above that before it
made its model, with everything imported: it includes what the allocator has not given back.

Steps are timed first, as ``step.py`` does: every round runs every variant, ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from step import LOSS_TOLERANCE, Round, VariantError, environment, in_rounds, ratio, started
from step_worker import SIZES, Trainer, Variant, answer, build_model

MEGABYTE = 1 << 20
WARM = 2
"""Steps before the first round."""


@dataclass
class Memory:
    """Bytes on one rank; of several ranks the most.

    Attributes:
        held: weights and AdamW's state.
        kept: what a forward pass leaves for the backward pass.
        forward, backward, update: the most that there is at once in each part of a step, with what is held.
        resident: most memory of the process above that before it made its model.
    """

    held: int
    kept: int
    forward: int
    backward: int
    update: int
    resident: int

    @property
    def peak(self) -> int:
        """The most of a step."""
        return max(self.forward, self.backward, self.update)


class MeasuredTrainer(Trainer):
    """A trainer that measures its memory."""

    def __init__(self, variant: Variant, model_name: str, shape: tuple[int, int]) -> None:
        # what is imported is there before, as are the libraries that a step begins with
        build_model("tiny")(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
        self._before = _resident("VmRSS")
        super().__init__(variant, model_name)
        self.sizes = replace(self.sizes, batch=shape[0], sequence=shape[1])
        ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on

    def memory(self) -> Memory:
        """That of a step; some have been done before."""
        resident = _resident("VmHWM") - self._before
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for state in self.optimizer.state.values():
            tensors += [one for one in state.values() if isinstance(one, torch.Tensor)]
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
        held = sum(storages.values())
        shape = (self.sizes.batch, self.sizes.sequence)
        tokens = torch.randint(self.sizes.vocabulary, shape, generator=self.generator)
        if self.variant.ranks > 1:
            dist.barrier()
        losses: list[torch.Tensor] = []
        kept, forward = counted(
            lambda: losses.append(self.model(input_ids=tokens, labels=tokens).loss),
        )
        gradients, backward = counted(losses[0].backward)
        _, update = counted(self.optimizer.step)
        self.optimizer.zero_grad()
        begun = held + kept
        return Memory(held, kept, held + forward, begun + backward, begun + gradients + update, resident)


def counted(work: Callable[[], object]) -> tuple[int, int]:
    """How many more bytes are allocated after ``work`` than before, and the most at once meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None
    now = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return now, most


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def serve(
    variant: Variant, rank: int, port: int, model_name: str, connection: Connection, shape: tuple[int, int]
) -> None:
    """A process of a variant: answers each number of steps with what it measured, 0 with its memory."""

    def work(trainer: Any, steps: int) -> Any:
        return trainer.run(steps) if steps else trainer.memory()

    answer(variant, rank, port, connection, lambda: MeasuredTrainer(variant, model_name, shape), work)


@dataclass
class Outcome:
    """Rounds, and memory of the rank that needs most of it."""

    rounds: list[Round]
    memory: Memory


def measure(
    variants: Sequence[Variant], model: str, shape: tuple[int, int], rounds: int, steps: int, console: Console
) -> dict[str, Outcome]:
    """All rounds of each variant, then its memory."""
    memories: dict[str, Memory] = {}
    with started(variants, model, WARM, console, serve, shape) as running:
        found, _ = in_rounds(running, rounds, steps, console)
        for one in running:
            of_ranks: list[Memory] = one.ask(0)
            memories[one.variant.name] = max(of_ranks, key=lambda memory: memory.peak)
    return {name: Outcome(found[name], memories[name]) for name in found}


def table(outcomes: dict[str, Outcome], title: str) -> Table:
    """Memory in megabytes and over that of the first variant; time over that of the second."""
    first, *others = outcomes.values()
    second = others[0]
    result = Table(title=title, box=box.SIMPLE_HEAVY, title_justify="left")
    result.add_column("variant", no_wrap=True)
    parts = ("held", "kept", "forward", "backward", "update", "peak", "resident")
    for heading in (*(f"{part}\nMB" for part in parts), "peak\nover 1st", "resident\nover 1st"):
        result.add_column(heading, justify="right")
    result.add_column("step\nms", justify="right")
    result.add_column("time over 2nd", justify="right")
    for name, one in outcomes.items():
        median, low, high = ratio(one.rounds, second.rounds)
        milliseconds = sorted(each.milliseconds for each in one.rounds)[len(one.rounds) // 2]
        result.add_row(
            name,
            *(f"{getattr(one.memory, part) / MEGABYTE:.1f}" for part in parts),
            f"{one.memory.peak / first.memory.peak:.3f}",
            f"{one.memory.resident / first.memory.resident:.3f}",
            f"{milliseconds:.1f}",
            f"{median:.3f} ({low:.2f}-{high:.2f})",
        )
    return result


def main(arguments: list[str]) -> int:
    """Measure, print and write; 1 if the variants do not compute the same loss or a process fails."""
    parser = argparse.ArgumentParser(description="Memory of one training step.")
    parser.add_argument("--model", choices=tuple(SIZES), default="gpt")
    parser.add_argument("--tp", type=int, default=2, help="ranks that share the model (default: 2)")
    parser.add_argument("--batch", type=int, help="sequences per step (default: as step.py)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all variants (default: 5)")
    parser.add_argument("--steps", type=int, default=5, help="steps per variant and round (default: 5)")
    parser.add_argument("--output", type=Path, help="write all numbers to this JSON file")
    options = parser.parse_args(arguments)
    shape = (options.batch or SIZES[options.model].batch, SIZES[options.model].sequence)
    cut = Variant(f"tp={options.tp}", options.tp, 1)
    variants = [
        Variant("1 process", 0, 1),
        cut,
        replace(cut, name=f"{cut.name}, sequence", sequence=True),
        replace(cut, name=f"{cut.name}, sequence, kept whole", sequence=True, keeps_gathered=True),
    ]
    console = Console(width=160)
    try:
        outcomes = measure(variants, options.model, shape, options.rounds, options.steps, console)
    except VariantError as error:
        print(error, file=sys.stderr)
        return 1
    title = f"{options.model}, {shape[0]} x {shape[1]} tokens: medians over {options.rounds} rounds"
    console.print(table(outcomes, title))
    if options.output:
        record = {
            "options": {name: str(value) for name, value in vars(options).items()},
            "environment": environment(),
            "variants": {
                name: {"memory": asdict(one.memory), "rounds": [asdict(each) for each in one.rounds]}
                for name, one in outcomes.items()
            },
        }
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    losses = [[each.loss for each in one.rounds] for one in outcomes.values()]
    for of_round in zip(*losses, strict=True):
        if max(of_round) - min(of_round) > LOSS_TOLERANCE * abs(of_round[0]):
            print(f"the variants do not compare: their losses are {of_round}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
