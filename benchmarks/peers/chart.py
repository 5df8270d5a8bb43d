"""The bar chart: a panel for each case, a bar for each system.

python -m benchmarks.peers.chart details.json bars.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .report import Spread, one_line

COLUMNS = 2
OURS, LIMIT, ALONE, OTHERS = "#1f6f8b", "#a9cdd8", "#b5b5b5", "#d9a25f"


def draw(details: dict[str, Any], target: Path) -> None:
    """Write the chart of what :func:`report.details` returned."""
    cases = list(details["cases"].values())
    rows = -(-len(cases) // COLUMNS)
    columns = min(COLUMNS, len(cases))
    most = max(len(case["systems"]) for case in cases)
    size = (6.5 * columns, rows * (0.9 + 0.32 * most))
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat[len(cases) :]:
        panel.set_visible(False)
    for panel, (key, case) in zip(panels.flat, details["cases"].items(), strict=False):
        _draw_case(panel, key, case)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def _draw_case(panel: Any, key: str, case: dict[str, Any]) -> None:
    systems = list(case["systems"].items())[::-1]  # the first on top
    spreads = [
        Spread.of([turn["milliseconds"] for turn in outcome["turns"]]) if outcome["turns"] else None
        for _, outcome in systems
    ]
    longest = max((spread.high for spread in spreads if spread), default=1.0)
    for row, ((name, outcome), spread) in enumerate(zip(systems, spreads, strict=True)):
        if spread is None:
            panel.text(
                0.01 * longest, row, one_line(outcome["error"], 60), va="center", color="#a33", fontsize=7
            )
            continue
        ends = [[spread.median - spread.low], [spread.high - spread.median]]
        panel.barh(row, spread.median, color=_colour(name), xerr=ends, error_kw={"lw": 1, "capsize": 2})
        different = "  different model" if outcome["error"] else ""
        panel.text(
            spread.high + 0.015 * longest, row, f"{spread.median:.4g}{different}", va="center", fontsize=8
        )
    panel.set_yticks(range(len(systems)), [name for name, _ in systems], fontsize=8)
    panel.set_xlim(0, 1.18 * longest)
    panel.set_xlabel("ms per step", fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.set_title(f"{key}: {case['dtype']}, {case['ranks']} ranks", fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)


def _colour(name: str) -> str:
    base = name.split("[")[0]
    if base == "colrow":
        return OURS
    if base == "limit":
        return LIMIT
    return ALONE if base.startswith("single") else OTHERS


def main() -> int:
    source, target = (Path(argument) for argument in sys.argv[1:])
    draw(json.loads(source.read_text()), target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
