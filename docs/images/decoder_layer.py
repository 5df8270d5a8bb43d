"""Draws decoder-layer.png: a Llama layer with the places where values enter and leave what is cut.

Run it after a change: ``python docs/images/decoder_layer.py``. The places are those that ``colrow plan
transformers:LlamaConfig --tp 2`` prints.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

WHOLE, CUT, ENTRY, EXIT = "#eceff1", "#ffe0b2", "#1565c0", "#c62828"


def box(axes: Axes, x: float, y: float, text: str, *, cut: bool, width: float = 1.5) -> None:
    """One operation, centred."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.24),
            width,
            0.48,
            boxstyle="round,pad=0.02",
            facecolor=CUT if cut else WHOLE,
            edgecolor="#37474f",
            linewidth=0.8,
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=8)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """The way of a value."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "lw": 0.9, "color": "#37474f"})


def mark(axes: Axes, x: float, text: str, colour: str) -> None:
    """A place where values enter or leave."""
    axes.plot([x, x], [-1.15, 1.15], color=colour, linewidth=1.6, linestyle=(0, (3, 2)))
    axes.text(x, -1.45, text, ha="center", va="top", fontsize=8, color=colour)


def draw() -> Figure:
    """The whole picture."""
    figure = Figure(figsize=(11.5, 2.8))
    axes = figure.add_axes((0.005, 0.0, 0.99, 1.0))
    axes.set_xlim(-0.3, 20.9)
    axes.set_ylim(-2.35, 1.75)
    axes.axis("off")

    box(axes, 1.6, 0, "norm", cut=False, width=1.2)
    for y, name in ((0.75, "q_proj"), (0.0, "k_proj"), (-0.75, "v_proj")):
        arrow(axes, (2.25, 0), (3.75, y))
        box(axes, 4.5, y, name, cut=True)
        arrow(axes, (5.25, y), (6.05, 0))
    box(axes, 6.9, 0, "attention", cut=True, width=1.6)
    arrow(axes, (7.75, 0), (8.1, 0))
    box(axes, 8.85, 0, "o_proj", cut=True)
    arrow(axes, (9.6, 0), (10.4, 0))
    box(axes, 12.0, 0, "norm", cut=False, width=1.2)
    for y, name in ((0.5, "gate_proj"), (-0.5, "up_proj")):
        arrow(axes, (12.65, 0), (14.05, y))
        box(axes, 14.8, y, name, cut=True)
        arrow(axes, (15.55, y), (16.05, 0))
    box(axes, 16.35, 0, r"$\times$", cut=True, width=0.5)
    arrow(axes, (16.65, 0), (16.95, 0))
    box(axes, 17.7, 0, "down_proj", cut=True)
    arrow(axes, (18.45, 0), (19.3, 0))

    for start, plus in ((0.3, 10.6), (11.0, 19.5)):
        axes.plot([start, start, plus, plus], [0, 1.55, 1.55, 0.2], color="#37474f", linewidth=0.9)
        axes.text(plus, 0, "+", ha="center", va="center", fontsize=13)
    arrow(axes, (-0.3, 0), (0.95, 0))
    arrow(axes, (10.8, 0), (11.35, 0))
    arrow(axes, (19.7, 0), (20.8, 0))

    mark(axes, 3.0, "entry: self_attn's input\nbackward: all-reduce", ENTRY)
    mark(axes, 10.0, "exit: o_proj's output\nforward: all-reduce", EXIT)
    mark(axes, 13.35, "entry: mlp's input\nbackward: all-reduce", ENTRY)
    mark(axes, 18.9, "exit: down_proj's output\nforward: all-reduce", EXIT)
    kinds = ((1.6, "I"), (6.5, "V: heads"), (9.62, "P"), (11.6, "I"), (16.1, "V: features"), (18.6, "P"))
    for x, text in kinds:
        axes.text(x, 1.28, text, ha="center", va="center", fontsize=9, family="monospace")
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).parent / "decoder-layer.png", dpi=110)
