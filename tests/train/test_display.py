"""What the user sees."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from colrow.report.curve import plot_losses, smooth
from colrow.train.display import Clock, LiveDisplay, PlainDisplay, Silent, make_display, memory_text
from colrow.train.metrics import StepRecord, ValidationRecord
from colrow.train.ranks import RankHolding, holdings_table


def _record(step: int) -> StepRecord:
    return StepRecord(step, 4.5, 1.25, 1e-3, 12345.6, 10, 0.123)


def test_plain_lines() -> None:
    file = io.StringIO()
    display = PlainDisplay(Console(file=file, width=20))
    for step in range(1, 101):
        display.step(_record(step), [2_000_000, 3_000_000], 100)
    display.validation(ValidationRecord(100, 4.0, 54.6))
    display.say("[bold] is no markup")
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines[:-2]] == ["1/100"] + [f"{n}/100" for n in range(5, 101, 5)]
    assert lines[0].startswith(
        "step 1/100  loss 4.5000  grad norm 1.25  12,346 tokens/s  communicating 12%  memory per rank 2 3 MB"
    )
    assert lines[-2] == "validation after step 100: loss 4.0000, perplexity 54.60"
    assert lines[-1] == "[bold] is no markup"
    assert "\x1b" not in file.getvalue()


def test_plain_lines_of_slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("colrow.train.display.time.monotonic", lambda: now[0])
    file = io.StringIO()
    display = PlainDisplay(Console(file=file, width=200))
    for step in range(1, 8):
        display.step(_record(step), [1], 1000)
        now[0] += 6.0
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1/1000", "4/1000", "7/1000"]


def test_plain_lines_while_the_length_is_unknown() -> None:
    file = io.StringIO()
    display = PlainDisplay(Console(file=file, width=200))
    for step in range(1, 11):
        display.step(_record(step), [1], None)
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1", "10"]


def test_live_display_shows_the_numbers() -> None:
    file = io.StringIO()
    with LiveDisplay(Console(file=file, force_terminal=True, width=100)) as display:
        for step in range(1, 4):
            display.step(_record(step), [2_000_000, 3_000_000], 10)
        display.validation(ValidationRecord(3, 4.0, 54.6))
        display.step(_record(4), [2_000_000, 3_000_000], 10)
    shown = file.getvalue()
    for part in (
        "4/10",
        "4.5000",
        "12,346",
        "12% of the step",
        "2 3 MB",
        "left",
        "4.0000",
        "perplexity 54.60",
    ):
        assert part in shown


def test_only_the_first_rank_displays() -> None:
    assert isinstance(make_display(is_first=False), Silent)
    assert not isinstance(make_display(is_first=True), Silent)


def test_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("colrow.train.display.time.monotonic", lambda: now[0])
    clock = Clock()
    for _ in range(100):
        now[0] += 2.0
        clock.tick()
    assert clock.left(45) == "1:30"
    assert clock.left(1800 + 31) == "1:01:02"
    for _ in range(50):  # only the recent steps count
        now[0] += 1.0
        clock.tick()
    assert clock.left(45) == "0:45"


def test_memory_of_many_ranks() -> None:
    assert memory_text([2_000_000, 3_000_000]) == "2 3 MB"
    assert memory_text([n * 1_000_000 for n in range(5, 20)]) == "5 to 19 MB"


def test_table_of_ranks() -> None:
    file = io.StringIO()
    ranks = [RankHolding(600, 2400, 9600, 300_000_000), RankHolding(500, 2000, 8000, 290_000_000)]
    Console(file=file, width=120).print(holdings_table(ranks, RankHolding(1000, 4000, 16000, None)))
    text = file.getvalue()
    for part in ("rank 0", "60.0%", "300.0 MB", "rank 1", "50.0%", "one process", "1,000", "not measured"):
        assert part in text


@pytest.mark.parametrize("points", [1, 2, 100, 1999, 30_001])
def test_smoothing_has_no_lag_and_no_bias(points: int) -> None:
    steps = np.arange(1, points + 1)
    places, means = smooth(steps, np.full(points, 2.5))
    np.testing.assert_allclose(means, 2.5)
    assert len(places) == min(points, 2000)
    places, means = smooth(steps, 3.0 * steps)
    inner = slice(len(places) // 10, -(len(places) // 10) or None)
    np.testing.assert_allclose(means[inner], 3.0 * places[inner], rtol=2e-3)
    assert means[0] == pytest.approx(3.0 * places[0])  # the steep begin is not smoothed away


def test_smoothing_smoothes() -> None:
    noise = np.random.default_rng(0).normal(size=1000)
    _, means = smooth(np.arange(1000), noise)
    assert means[200:800].std() < 0.25


@pytest.mark.parametrize("steps", [0, 1, 2, 1500])
def test_plot(tmp_path: Path, steps: int) -> None:
    losses = [5 - 0.001 * step for step in range(steps)]
    validation: tuple[list[int], list[float]] = ([steps], [4.0]) if steps > 1 else ([], [])
    plot_losses(tmp_path / "loss.png", (list(range(1, steps + 1)), losses), validation, "a model")
    picture = (tmp_path / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
