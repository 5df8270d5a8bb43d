"""What a run records: JSON lines and TensorBoard events, both complete up to the last step at any moment."""

from __future__ import annotations

import json
import resource
import sys
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from colrow.train.folder import RunFolder, write_atomically


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: counted from 1.
        loss: mean cross-entropy per predicted token over the whole batch, in nats, before the step.
        grad_norm: norm of the gradient of all parameters together, before clipping.
        lr: learning rate.
        tokens_per_second: tokens of the batch by the duration of the step, for all ranks together.
        peak_memory_bytes: the most that the first rank has held so far; see :func:`peak_memory_bytes`.
        comm_fraction: the share of the step that the first rank spent in collectives, waiting included.
        expert_load: tokens of the expert with most of them over the mean of its layer's experts, in this
            step, of the layer where that is largest; not recorded where experts are not divided over ``ep``.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float
    peak_memory_bytes: int
    comm_fraction: float
    expert_load: float | None = None


@dataclass(frozen=True)
class ValidationRecord:
    """Mean loss per predicted token over the validation sequences, after so many steps."""

    step: int
    loss: float
    perplexity: float


def peak_memory_bytes(device_type: str) -> int:
    """The most memory this process has held: resident memory, or on a GPU what tensors took there."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the process that started this one held, too
        line = next(one for one in status.read_text().splitlines() if one.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes, except on macOS


class MetricsWriter:
    """Writes the records of a run as they come.

    Args:
        folder: of the run.
        resumed_step: keep what was recorded up to this step, forget what came after; 0 for a new run.
    """

    def __init__(self, folder: RunFolder, resumed_step: int) -> None:
        self._files: dict[type, TextIO] = {}
        self._histories: dict[type, tuple[array[int], array[float]]] = {}
        for kind, path in ((StepRecord, folder.metrics), (ValidationRecord, folder.validation)):
            kept = [one for one in read_records(path) if one["step"] <= resumed_step]
            write_atomically(path, "".join(json.dumps(one) + "\n" for one in kept))
            self._files[kind] = path.open("a", encoding="utf-8")
            self._histories[kind] = (
                array("q", [one["step"] for one in kept]),
                array("d", [one["loss"] for one in kept]),
            )
        from torch.utils.tensorboard import SummaryWriter  # only the first rank need wait for it

        purge = resumed_step + 1 if resumed_step else None
        self._events = SummaryWriter(str(folder.tensorboard), purge_step=purge)

    def write(self, record: StepRecord | ValidationRecord) -> None:
        """Add one record to its file and to the events."""
        values = {name: value for name, value in asdict(record).items() if value is not None}
        file = self._files[type(record)]
        file.write(json.dumps(values) + "\n")
        file.flush()
        steps, losses = self._histories[type(record)]
        steps.append(record.step)
        losses.append(record.loss)
        group = "train" if isinstance(record, StepRecord) else "validation"
        for name, value in values.items():
            if name != "step":
                self._events.add_scalar(f"{group}/{name}", value, record.step)

    def losses(self, kind: type) -> tuple[array[int], array[float]]:
        """Steps and losses of the whole run, also from before it was resumed."""
        return self._histories[kind]

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._events.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; a last line that was cut off by a kill is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records
