"""The loss curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_TRAINING = "#2f6fb0"
_VALIDATION = "#d1495b"
_INK = "#333333"
_MOST_POINTS = 2000


def smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian running mean of a curve, without lag: at the ends the missing half of the window is left out.

    The window grows along the curve up to a sixtieth of it, since a loss falls steeply at first.

    Args:
        steps: [points], rising.
        values: [points].

    Returns:
        Steps and means, at most 2000 of each.
    """
    parts = min(len(steps), _MOST_POINTS)
    # long curves become means of equal parts first: a week of steps must not take minutes to draw
    bounds = np.linspace(0, len(steps), parts, endpoint=False).astype(int)
    sizes = np.diff(np.append(bounds, len(steps)))
    places, means = (np.add.reduceat(one, bounds) / sizes for one in (steps.astype(float), values))
    passed = places - places[0]
    widths = np.clip(passed / 6, 0.1, max(0.1, passed[-1] / 60))
    weights = sizes * np.exp(-0.5 * ((places - places[:, None]) / widths[:, None]) ** 2)
    return places, weights @ means / weights.sum(1)


def plot_losses(
    path: Path,
    training: tuple[Sequence[int], Sequence[float]],
    validation: tuple[Sequence[int], Sequence[float]],
    title: str,
) -> None:
    """Write a PNG: training loss light, its running mean strong, validation as points.

    Args:
        path: of the picture.
        training: steps and losses, one per step.
        validation: steps and losses; may be empty.
        title: what was trained.
    """
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = np.asarray(training[0]), np.asarray(training[1], dtype=float)
    if len(steps):
        axes.plot(steps, losses, color=_TRAINING, alpha=0.3, linewidth=0.8)
        places, mean = smooth(steps, losses)
        label = f"training, running mean: {mean[-1]:.3f}"
        axes.plot(places, mean, color=_TRAINING, linewidth=2.0, label=label)
    if len(validation[0]):
        axes.plot(
            validation[0],
            validation[1],
            "o",
            color=_VALIDATION,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            zorder=3,
            label=f"validation: {validation[1][-1]:.3f}",
        )
    _frame(axes, losses, validation)
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    if len(steps) or len(validation[0]):
        axes.legend(frameon=False, loc="upper right", labelcolor=_INK)
    figure.savefig(path)


def _frame(axes: Axes, losses: np.ndarray, validation: tuple[Sequence[int], Sequence[float]]) -> None:
    """Labels, a light grid, and limits that one outlier does not spoil."""
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss per token (nats)", color=_INK)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
    axes.tick_params(colors=_INK)
    axes.margins(x=0.02)
    finite = np.concatenate([losses[np.isfinite(losses)], np.asarray(validation[1], dtype=float)])
    if len(finite) > 1:
        low, high = finite.min(), np.quantile(finite, 0.999 if len(finite) > 1000 else 1.0)
        margin = 0.05 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
