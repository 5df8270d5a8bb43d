"""Time, memory, CPU time and communication of one training step, beside what else the machine could do.

    OMP_NUM_THREADS=1 python benchmarks/step.py --model gpt --tp 2 --output step.json

Variants, all in one run:

- one process with one thread, and with two: what a user would do without tensor parallelism;
- the model cut over the ranks by its hand-written plan, one thread per rank;
- the same with every collective replaced by this rank's own values: the numbers are wrong, the time shows
  what the step would cost if communication were free.

The model ``tiny`` has products that take no time: what it costs is overhead (with ``--steps 50``). It is
compared with one process, and with as many at once as there are ranks: also without any communication they
take more CPU time together, as they share caches and memory.

Machines are noisy, so every round runs every variant, in rotating order, and what is quoted are medians over
rounds. Ratios are taken within a round, between variants that ran within seconds of each other. The
processes of all variants live throughout and wait while others run, so memory for all is needed at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from step_worker import SIZES, Measured, Variant, serve

ANSWER_SECONDS = 600.0
QUIET = 0.05
"""Share of the cores that other programs may take before the table says so."""
LOSS_TOLERANCE = 1e-4
"""Relative: single precision, other order of summation, some steps of AdamW."""


@dataclass
class Round:
    """One variant in one round: medians over steps; of several ranks the slowest, for CPU time the mean.

    ``cpu_in_collectives`` are milliseconds of it, see :class:`Measured`.
    ``elsewhere`` is the share of all cores that other programs took meanwhile; ``None`` if unknown.
    """

    milliseconds: float
    cpu_milliseconds: float
    cpu_in_collectives: float
    peak_megabytes: float
    loss: float
    elsewhere: float | None


class VariantError(RuntimeError):
    """A process of a variant failed."""


class Running:
    """The processes of one variant.

    Attributes:
        first_seconds: duration of the steps before the first round.
    """

    def __init__(
        self, variant: Variant, model_name: str, serve: Callable[..., None] = serve, *more: object
    ) -> None:
        self.variant = variant
        self.first_seconds = 0.0
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(variant.processes):
            ours, theirs = context.Pipe()
            arguments = (variant, rank, port, model_name, theirs, *more)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self.answers()

    def answers(self) -> list[Any]:
        """What each process sends next."""
        answers = []
        for rank, connection in enumerate(self._connections):
            try:
                if not connection.poll(ANSWER_SECONDS):
                    raise VariantError(f"{self.variant.name}: rank {rank} did not answer")
                answer = connection.recv()
            except EOFError as error:
                raise VariantError(f"{self.variant.name}: rank {rank} died") from error
            if isinstance(answer, str):
                raise VariantError(f"{self.variant.name}, rank {rank}:\n{answer}")
            answers.append(answer)
        return answers

    def run(self, steps: int) -> list[Measured]:
        """Train some steps."""
        return self.ask(steps)

    def ask(self, number: int) -> list[Any]:
        """What each process answers to a number."""
        for connection in self._connections:
            connection.send(number)
        return self.answers()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def busy_seconds() -> float | None:
    """CPU seconds that all programs together, and other machines on the same host, have taken so far."""
    counters = Path("/proc/stat")
    if not counters.exists():
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal
    ticks = [int(value) for value in counters.read_text().splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def run_round(running: Running, steps: int) -> tuple[Round, Measured]:
    """One round of one variant, and what its first rank measured."""
    busy_before, begin = busy_seconds(), time.perf_counter()
    measured = running.run(steps)
    seconds, busy_after = time.perf_counter() - begin, busy_seconds()
    elsewhere = None
    if busy_before is not None and busy_after is not None:
        own = sum(one.cpu_total for one in measured)
        elsewhere = max(0.0, busy_after - busy_before - own) / (seconds * (os.cpu_count() or 1))
    return summarise(measured, elsewhere), measured[0]


def summarise(measured: Sequence[Measured], elsewhere: float | None) -> Round:
    """One round of one variant: the ranks' step is as long as the slowest rank's."""
    slowest = [max(of_ranks) for of_ranks in zip(*(one.seconds for one in measured), strict=True)]
    cpu = statistics.fmean(statistics.median(one.cpu_seconds) for one in measured)
    return Round(
        milliseconds=statistics.median(slowest) * 1e3,
        cpu_milliseconds=cpu * 1e3,
        cpu_in_collectives=statistics.fmean(one.cpu_collectives for one in measured) * 1e3,
        peak_megabytes=max(one.peak_megabytes for one in measured),
        loss=measured[0].loss,
        elsewhere=elsewhere,
    )


@contextmanager
def started(
    variants: Sequence[Variant], model_name: str, warm: int, console: Console, *serving: Any
) -> Iterator[list[Running]]:
    """The processes of all variants, each after ``warm`` steps; they end with the context.

    Args:
        serving: of :class:`Running`, what its processes run in place of :func:`step_worker.serve`.
    """
    running: list[Running] = []
    try:
        for variant in variants:
            with console.status(f"{model_name}: starting {variant.name}"):
                running.append(Running(variant, model_name, *serving))
                begin = time.perf_counter()
                running[-1].run(warm)
                running[-1].first_seconds = time.perf_counter() - begin
        yield running
    finally:
        for one in running:
            one.close()


def in_rounds(
    running: Sequence[Running], rounds: int, steps: int, console: Console
) -> tuple[dict[str, list[Round]], dict[str, Measured]]:
    """All rounds of each variant, in rotating order, and what rank 0 measured in the last one."""
    found: dict[str, list[Round]] = {one.variant.name: [] for one in running}
    last: dict[str, Measured] = {}
    for number in range(rounds):
        for index in range(len(running)):
            one = running[(number + index) % len(running)]
            with console.status(f"round {number + 1} of {rounds}: {one.variant.name}"):
                result, last[one.variant.name] = run_round(one, steps)
            found[one.variant.name].append(result)
    return found, last


def ratio(of: Sequence[Round], to: Sequence[Round]) -> tuple[float, float, float]:
    """Median, lowest and highest over rounds of step time of one variant over the other's."""
    ratios = [a.milliseconds / b.milliseconds for a, b in zip(of, to, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def cpu_ratio(of: Sequence[Round], to: Sequence[Round]) -> float:
    """Median over rounds of the CPU time per rank of one variant over the other's."""
    return statistics.median(a.cpu_milliseconds / b.cpu_milliseconds for a, b in zip(of, to, strict=True))


def check_losses(variants: Sequence[Variant], found: dict[str, list[Round]]) -> str | None:
    """Why the times are worthless, if the variants that communicate did not all train the same model."""
    reference = found[variants[0].name]
    for variant in variants:
        if variant.communicates:
            for number, (one, other) in enumerate(zip(found[variant.name], reference, strict=True)):
                if abs(one.loss - other.loss) > LOSS_TOLERANCE * abs(other.loss):
                    return (
                        f"after round {number + 1} the loss of {variant.name} is {one.loss:.6f}, that of "
                        f"{variants[0].name} {other.loss:.6f}: they do not compute the same"
                    )
    return None


def summary(
    variants: Sequence[Variant], found: dict[str, list[Round]], last: dict[str, Measured]
) -> dict[str, dict[str, Any]]:
    """Per variant the medians over rounds and the ratios to every other variant."""
    result = {}
    for variant in variants:
        rounds = found[variant.name]
        collectives = last[variant.name].collectives
        result[variant.name] = {
            "processes": variant.processes,
            "threads": variant.threads,
            "step_ms": statistics.median(one.milliseconds for one in rounds),
            "cpu_ms_per_rank": statistics.median(one.cpu_milliseconds for one in rounds),
            "cpu_ms_in_collectives": statistics.median(one.cpu_in_collectives for one in rounds),
            "peak_mb_per_rank": max(one.peak_megabytes for one in rounds),
            "collectives_per_step": sum(count for count, _ in collectives.values()),
            "payload_bytes_per_step": sum(size for _, size in collectives.values()),
            "by_operation": {name: list(values) for name, values in collectives.items()},
            "ratio_to": {other.name: ratio(rounds, found[other.name]) for other in variants},
            "cpu_ratio_to": {other.name: cpu_ratio(rounds, found[other.name]) for other in variants},
        }
    return result


def tables(variants: Sequence[Variant], results: dict[str, dict[str, Any]], title: str) -> list[Table]:
    """What each variant takes, and its time over that of each of the others."""
    taken = Table(title=title, box=box.SIMPLE_HEAVY, title_justify="left")
    taken.add_column("variant", no_wrap=True)
    headings = (
        "step\nms",
        "CPU ms\nper rank",
        "over 1st,\n2nd",
        "in collec-\ntives",
        "peak MB\nper rank",
        "collec-\ntives",
        "payload\nMB",
    )
    for heading in headings:
        taken.add_column(heading, justify="right")
    ratios = Table(title="step time of row over column: median (range)", box=box.SIMPLE_HEAVY)
    ratios.title_justify = "left"
    ratios.add_column("", no_wrap=True)
    for other in variants:
        ratios.add_column(other.name.replace(", ", ",\n"), justify="right", no_wrap=True)
    for variant in variants:
        row = results[variant.name]
        taken.add_row(
            variant.name,
            f"{row['step_ms']:.1f}",
            f"{row['cpu_ms_per_rank']:.1f}",
            " ".join(f"{row['cpu_ratio_to'][other.name]:.2f}" for other in variants[:2]),
            f"{row['cpu_ms_in_collectives']:.2f}",
            f"{row['peak_mb_per_rank']:.0f}",
            f"{row['collectives_per_step']:g}",
            f"{row['payload_bytes_per_step'] / 1e6:.1f}",
        )
        cells = []
        for other in variants:
            median, low, high = row["ratio_to"][other.name]
            cells.append("" if other is variant else f"{median:.3f}\n({low:.2f}-{high:.2f})")
        ratios.add_row(variant.name.replace(", ", ",\n"), *cells)
    return [taken, ratios]


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the program."""
    information = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", information.read_text()) if information.exists() else []
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
    }


def main(arguments: list[str]) -> int:
    """Measure, print and write; 1 if the variants do not compute the same loss or a process fails."""
    parser = argparse.ArgumentParser(description="Time, memory and communication of one training step.")
    parser.add_argument("--model", choices=tuple(SIZES), default="gpt")
    parser.add_argument("--tp", type=int, default=2, help="ranks that share the model (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all variants (default: 5)")
    parser.add_argument("--steps", type=int, default=5, help="steps per variant and round (default: 5)")
    parser.add_argument("--warm", type=int, default=2, help="steps before the first round (default: 2)")
    parser.add_argument("--output", type=Path, help="write all numbers to this JSON file")
    options = parser.parse_args(arguments)
    for name in ("tp", "rounds", "steps", "warm"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    variants = [
        Variant("1 process, 1 thread", 0, 1),
        # for overhead: processes that share memory and caches as the ranks do, and have no business together
        Variant(f"{options.tp} processes alone", 0, 1, copies=options.tp)
        if options.model == "tiny"
        else Variant("1 process, 2 threads", 0, 2),
        Variant(f"tp={options.tp}", options.tp, 1),
        Variant(f"tp={options.tp}, no exchange", options.tp, 1, communicates=False),
    ]
    console = Console()
    try:
        with started(variants, options.model, options.warm, console) as running:
            found, last = in_rounds(running, options.rounds, options.steps, console)
    except VariantError as error:
        print(error, file=sys.stderr)
        return 1
    results = summary(variants, found, last)
    title = f"{options.model}: medians over {options.rounds} rounds of {options.steps} steps"
    console.print(*tables(variants, results, title))
    shares = [one.elsewhere for rounds in found.values() for one in rounds if one.elsewhere is not None]
    if shares and statistics.fmean(shares) > QUIET:
        console.print(
            f"Not quiet: other programs took {statistics.fmean(shares):.0%} of the cores meanwhile."
        )
    fault = check_losses(variants, found)
    if options.output:
        record = {
            "options": {name: str(value) for name, value in vars(options).items()},
            "sizes": asdict(SIZES[options.model]),
            "environment": environment(),
            "equal_losses": fault is None,
            "variants": results,
            "rounds": {name: [asdict(one) for one in rounds] for name, rounds in found.items()},
        }
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    if fault:
        print(f"the variants do not compare: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
