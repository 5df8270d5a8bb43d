"""The folder of a run: what lies where, and checkpoints that are whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PARTIAL = ".partial"


class RunFolder:
    """Paths inside a run's folder.

    ::

        config.yaml         the configuration used: colrow train config.yaml runs it again
        metrics.jsonl       one object per step
        validation.jsonl    one object per validation
        loss.png            the loss curve
        tensorboard/        the same numbers as TensorBoard events
        data/, tokenizer/   the tokens that are trained on, and what made them
        checkpoints/        step-000500/ ..., and latest, a file with the name of the newest
        model/              the trained model and its tokenizer in Hugging Face layout
        sample.txt          text that the trained model wrote
        ranks.json          what each rank held
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.configuration = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.validation = self.path / "validation.jsonl"
        self.curve = self.path / "loss.png"
        self.tensorboard = self.path / "tensorboard"
        self.data = self.path / "data"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.sample = self.path / "sample.txt"
        self.ranks = self.path / "ranks.json"

    @property
    def holds_run(self) -> bool:
        """Whether a run has begun here."""
        return self.configuration.exists()

    def delete_run(self) -> None:
        """Delete what a run writes; anything else in the folder stays."""
        for path in vars(self).values():
            if path == self.path:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def move_data(self, other: RunFolder) -> None:
        """Move the tokenizer and the tokens to another folder, replacing what is there."""
        for source, target in ((self.tokenizer, other.tokenizer), (self.data, other.data)):
            shutil.rmtree(target, ignore_errors=True)
            os.rename(source, target)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content so that a reader sees the old or the new, never a part."""
    beside = path.with_name(path.name + _PARTIAL)
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


class Checkpoints:
    """The checkpoints of a run, of which the latest few are kept.

    A checkpoint is written beside its final place and renamed when it is whole, and only then ``latest``
    points to it: a run that is killed while saving resumes from the one before. All ranks call :meth:`save`.

    Args:
        folder: where the checkpoints lie.
        keep: how many stay.
        is_first: whether this is the rank that creates, renames and deletes folders.
        barrier: returns once every rank has called it.
    """

    def __init__(self, folder: Path, keep: int, is_first: bool, barrier: Callable[[], None]) -> None:
        self.folder, self.keep, self.is_first, self.barrier = folder, keep, is_first, barrier

    def latest(self) -> Path | None:
        """The newest whole checkpoint, if there is any."""
        pointer = self.folder / "latest"
        if not pointer.exists():
            return None
        return self.folder / pointer.read_text(encoding="utf-8").strip()

    def save(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
        """Save after so many steps.

        Args:
            step: number of steps done.
            write: writes this rank's part of the model and the optimizer into the folder it is given.
            state: small numbers that go into ``state.json``.
        """
        final = self.folder / f"step-{step:06d}"
        partial = final.with_name(final.name + _PARTIAL)
        if self.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.barrier()
        write(partial)
        self.barrier()
        if self.is_first:
            write_atomically(partial / "state.json", json.dumps(state))
            if final.exists():  # left by a run that was resumed from an earlier step
                shutil.rmtree(final)
            os.rename(partial, final)
            write_atomically(self.folder / "latest", final.name)
            self._delete_old(final)
        self.barrier()
        return final

    def _delete_old(self, newest: Path) -> None:
        partial = list(self.folder.glob(f"step-*{_PARTIAL}"))
        others = [one for one in self.folder.glob("step-*") if one not in partial and one != newest]
        others.sort(key=lambda one: int(one.name.removeprefix("step-")))
        for one in [*partial, *others[: max(0, len(others) - (self.keep - 1))]]:
            shutil.rmtree(one)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What :meth:`Checkpoints.save` was given as ``state``."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return state
