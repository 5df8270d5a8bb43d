"""Step time with and without ``torch.compile``, of the plain model and of the model cut over ranks.

    OMP_NUM_THREADS=1 python benchmarks/compile.py --output compile.json

A GPT and a Llama (those of ``step.py``) are trained by one process and by the ranks of a tensor-parallel
group, each as it is and after ``model.compile()``. The compiled graphs contain the rank's own products and
the collectives. All variants of a model run in turns, as in ``step.py``; the first steps, which compile, are
not counted, but how long they take is said. All variants must come to the same loss.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from step import VariantError, check_losses, environment, in_rounds, started, summary
from step_worker import SIZES, Variant

COMPILED = ", compiled"


def variants_of(ranks: int) -> list[Variant]:
    """One process and ``ranks``, with one thread each, as they are and compiled."""
    return [
        Variant("1 process", 0, 1),
        Variant("1 process" + COMPILED, 0, 1, compiled=True),
        Variant(f"tp={ranks}", ranks, 1),
        Variant(f"tp={ranks}" + COMPILED, ranks, 1, compiled=True),
    ]


def measure(model: str, ranks: int, rounds: int, steps: int, warm: int, console: Console) -> dict[str, Any]:
    """All numbers of one model.

    Raises:
        VariantError: if a process fails, or variants do not compute the same loss.
    """
    variants = variants_of(ranks)
    with started(variants, model, warm, console) as running:
        found, last = in_rounds(running, rounds, steps, console)
        first_seconds = {one.variant.name: one.first_seconds for one in running}
    fault = check_losses(variants, found)
    if fault:
        raise VariantError(f"{model}: the variants do not compare: {fault}")
    results = summary(variants, found, last)
    for name, seconds in first_seconds.items():
        results[name]["first_steps_seconds"] = seconds
    shares = [one.elsewhere for rounds_ in found.values() for one in rounds_ if one.elsewhere is not None]
    return {
        "sizes": asdict(SIZES[model]),
        "variants": results,
        "rounds": {name: [asdict(one) for one in each] for name, each in found.items()},
        "share_of_other_programs": sum(shares) / len(shares) if shares else None,
    }


def table(models: dict[str, dict[str, Any]], warm: int) -> Table:
    """Of every model and variant the time of a step, and what compiling changes."""
    shown = Table(title="a training step", box=box.SIMPLE_HEAVY, title_justify="left")
    shown.add_column("model", no_wrap=True)
    shown.add_column("variant", no_wrap=True)
    for heading in (
        "step\nms",
        "CPU ms\nper rank",
        "step time\nover not compiled",
        f"first {warm} steps\nseconds",
        "peak MB\nper rank",
    ):
        shown.add_column(heading, justify="right")
    for model, found in models.items():
        for name, row in found["variants"].items():
            plain = name.removesuffix(COMPILED)
            median, low, high = row["ratio_to"][plain]
            shown.add_row(
                model,
                name,
                f"{row['step_ms']:.1f}",
                f"{row['cpu_ms_per_rank']:.1f}",
                "" if name == plain else f"{median:.3f} ({low:.2f}-{high:.2f})",
                f"{row['first_steps_seconds']:.1f}",
                f"{row['peak_mb_per_rank']:.0f}",
            )
    return shown


def main(arguments: list[str]) -> int:
    """Measure, print and write; 1 if a process fails or losses differ."""
    parser = argparse.ArgumentParser(description="A training step with and without torch.compile.")
    parser.add_argument("--models", nargs="+", choices=tuple(SIZES), default=["gpt", "llama"])
    parser.add_argument("--tp", type=int, default=2, help="ranks that share the model (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all variants (default: 5)")
    parser.add_argument("--steps", type=int, default=3, help="steps per variant and round (default: 3)")
    parser.add_argument("--warm", type=int, default=2, help="steps before the first round (default: 2)")
    parser.add_argument("--output", type=Path, help="write all numbers to this JSON file")
    options = parser.parse_args(arguments)
    for name in ("tp", "rounds", "steps", "warm"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    console = Console()
    models: dict[str, dict[str, Any]] = {}
    try:
        for model in options.models:
            models[model] = measure(model, options.tp, options.rounds, options.steps, options.warm, console)
    except VariantError as error:
        print(error, file=sys.stderr)
        return 1
    console.print(table(models, options.warm))
    if options.output:
        record = {
            "options": {name: str(value) for name, value in vars(options).items()},
            "environment": environment(),
            "models": models,
        }
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
