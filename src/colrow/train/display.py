"""Progress on the first rank's standard output: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from colrow.train.metrics import StepRecord, ValidationRecord

_RECENT = 50
_SILENCE_SECONDS = 15.0


class Display(Protocol):
    """What the loop tells the user. A context manager: leaving it restores the terminal."""

    def __enter__(self) -> Display: ...

    def __exit__(self, *error: object) -> None: ...

    def step(self, record: StepRecord, memory: Sequence[int], steps: int | None) -> None:
        """After a step. ``memory``: peak bytes of every rank; ``steps``: of the training, once known."""

    def validation(self, record: ValidationRecord) -> None:
        """After a validation."""

    def say(self, message: str) -> None:
        """Anything else worth a line."""


class Silent:
    """For all ranks but the first."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self, record: StepRecord, memory: Sequence[int], steps: int | None) -> None:
        pass

    def validation(self, record: ValidationRecord) -> None:
        pass

    def say(self, message: str) -> None:
        pass


class Clock:
    """The time left, from the duration of the recent steps."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque([time.monotonic()], maxlen=_RECENT + 1)

    def tick(self) -> None:
        """A step has ended."""
        self._ends.append(time.monotonic())

    def left(self, steps: int) -> str:
        """How long so many steps will take, such as ``1:05``."""
        seconds = steps * (self._ends[-1] - self._ends[0]) / max(1, len(self._ends) - 1)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class PlainDisplay:
    """A line for the first step, for about every twentieth of the training, and at least every 15 seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._clock = Clock()
        self._last = -math.inf

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def step(self, record: StepRecord, memory: Sequence[int], steps: int | None) -> None:
        self._clock.tick()
        every = max(1, (steps or 200) // 20)
        now = time.monotonic()
        if record.step % every and record.step != steps and now < self._last + _SILENCE_SECONDS:
            return
        self._last = now
        total = f"/{steps}" if steps else ""
        left = f"  left {self._clock.left(steps - record.step)}" if steps else ""
        self.say(
            f"step {record.step}{total}  loss {record.loss:.4f}  grad norm {record.grad_norm:.2f}  "
            f"{record.tokens_per_second:,.0f} tokens/s  communicating {record.comm_fraction:.0%}  "
            f"{_load(record)}memory per rank {memory_text(memory)}{left}"
        )

    def validation(self, record: ValidationRecord) -> None:
        self.say(validation_text(record))

    def say(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


class LiveDisplay:
    """A progress bar and the current numbers, redrawn in place; messages scroll by above."""

    def __init__(self, console: Console) -> None:
        self._clock = Clock()
        self._losses: deque[float] = deque(maxlen=_RECENT)
        self._validation: ValidationRecord | None = None
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("[cyan]{task.fields[left]}"),
            expand=True,
        )
        self._task = self._progress.add_task("training", total=None, left="")
        self._live = Live(self._progress, console=console, refresh_per_second=4)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def step(self, record: StepRecord, memory: Sequence[int], steps: int | None) -> None:
        self._clock.tick()
        self._losses.append(record.loss)
        left = f"{self._clock.left(steps - record.step)} left" if steps else "timing the first steps"
        self._progress.update(self._task, completed=record.step, total=steps, left=left)
        self._live.update(Group(self._progress, self._numbers(record, memory)))

    def _numbers(self, record: StepRecord, memory: Sequence[int]) -> Table:
        table = Table.grid(padding=(0, 2))
        mean = sum(self._losses) / len(self._losses)
        held_out = f"{self._validation.loss:.4f}" if self._validation else "-"
        table.add_row("[dim]loss", f"[bold]{mean:.4f}", "[dim]validation", held_out)
        table.add_row("[dim]grad norm", f"{record.grad_norm:.2f}", "[dim]learning rate", f"{record.lr:.2e}")
        speed = f"{record.tokens_per_second:,.0f}"
        table.add_row("[dim]tokens/s", speed, "[dim]communicating", f"{record.comm_fraction:.0%} of the step")
        if record.expert_load is not None:
            table.add_row("[dim]largest load of an expert", f"{record.expert_load:.2f} times the mean")
        outer = Table.grid()
        outer.add_row(table)
        outer.add_row(f"[dim]memory per rank[/]  {memory_text(memory)}")
        return outer

    def validation(self, record: ValidationRecord) -> None:
        self._validation = record
        self.say(validation_text(record))

    def say(self, message: str) -> None:
        self._live.console.print(message, markup=False, highlight=False, soft_wrap=True)


def make_display(is_first: bool) -> Display:
    """Live on a terminal, lines elsewhere, nothing on ranks other than the first."""
    if not is_first:
        return Silent()
    console = Console()
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


def validation_text(record: ValidationRecord) -> str:
    return f"validation after step {record.step}: loss {record.loss:.4f}, perplexity {record.perplexity:.2f}"


def _load(record: StepRecord) -> str:
    load = record.expert_load
    return "" if load is None else f"largest load of an expert {load:.2f} times the mean  "


def memory_text(memory: Sequence[int]) -> str:
    """Megabytes of each rank, or their range if there are many."""
    megabytes = [f"{one / 1e6:,.0f}" for one in memory]
    if len(megabytes) > 8:
        smallest, largest = min(memory), max(memory)
        return f"{smallest / 1e6:,.0f} to {largest / 1e6:,.0f} MB"
    return " ".join(megabytes) + " MB"
