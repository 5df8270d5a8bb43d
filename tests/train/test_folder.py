"""Checkpoints that are whole or absent, and metrics that survive a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colrow.train.folder import Checkpoints, RunFolder, read_state
from colrow.train.metrics import MetricsWriter, StepRecord, ValidationRecord, peak_memory_bytes, read_records


def _checkpoints(folder: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(folder, keep, is_first=True, barrier=lambda: None)


def _write(text: str):  # type: ignore[no-untyped-def]
    return lambda folder: (folder / "weights").write_text(text)


def test_latest_and_keep(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path)
    assert checkpoints.latest() is None
    for step in (8, 9, 10, 1_000_000):
        checkpoints.save(step, _write(str(step)), {"step": step})
    latest = checkpoints.latest()
    assert latest is not None
    assert (latest / "weights").read_text() == "1000000"
    assert read_state(latest) == {"step": 1_000_000}
    assert sorted(one.name for one in tmp_path.iterdir()) == ["latest", "step-000010", "step-1000000"]


def test_killed_while_saving(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path)
    checkpoints.save(1, _write("good"), {"step": 1})

    def killed(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, killed, {"step": 2})
    latest = _checkpoints(tmp_path).latest()
    assert latest is not None
    assert (latest / "weights").read_text() == "good"
    checkpoints.save(2, _write("whole"), {"step": 2})  # the next save clears what was left
    assert sorted(one.name for one in tmp_path.iterdir()) == ["latest", "step-000001", "step-000002"]


def test_delete_run_spares_the_rest(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.configuration.write_text("x")
    folder.model.mkdir()
    (folder.model / "weights").write_text("x")
    (tmp_path / "notes.txt").write_text("mine")
    assert folder.holds_run
    folder.delete_run()
    assert not folder.holds_run
    assert [one.name for one in tmp_path.iterdir()] == ["notes.txt"]


def _record(step: int) -> StepRecord:
    return StepRecord(step, 1.0 / step, 0.5, 1e-3, 100.0, 10, 0.1)


def test_resumed_metrics_continue_where_the_checkpoint_is(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    writer = MetricsWriter(folder, 0)
    for step in (1, 2, 3, 4):
        writer.write(_record(step))
    writer.write(ValidationRecord(2, 3.0, 20.0))
    writer.write(ValidationRecord(4, 2.0, 7.0))
    writer.close()
    with folder.metrics.open("a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a line
    assert [one["step"] for one in read_records(folder.metrics)] == [1, 2, 3, 4]
    writer = MetricsWriter(folder, 3)
    writer.write(_record(4))
    steps, losses = writer.losses(StepRecord)
    assert (list(steps), list(losses)) == ([1, 2, 3, 4], [1.0, 1 / 2, 1 / 3, 1 / 4])
    steps, losses = writer.losses(ValidationRecord)
    assert (list(steps), list(losses)) == ([2], [3.0])
    writer.close()
    lines = folder.metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert set(json.loads(lines[0])) == {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens_per_second",
        "peak_memory_bytes",
        "comm_fraction",
    }


def test_tensorboard_events(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(RunFolder(tmp_path), 0)
    writer.write(_record(1))
    writer.write(_record(2))
    writer.write(ValidationRecord(2, 3.0, 20.0))
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert [(one.step, one.value) for one in events.Scalars("validation/loss")] == [(2, 3.0)]


def test_peak_memory_is_in_bytes() -> None:
    peak = peak_memory_bytes("cpu")
    assert 50e6 < peak < 100e9
