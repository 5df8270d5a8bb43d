"""``colrow plan MODEL --tp N``: what would be cut, what that saves, and what the ranks would exchange."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from colrow.cli.options import SEQUENCE, SEQUENCE_HELP

if TYPE_CHECKING:
    from colrow.plan import Plan


def run(arguments: list[str]) -> int:
    """Run the command: nothing is allocated, computed or communicated.

    Returns:
        0; 1 if ``--against`` found a difference.

    Raises:
        ValueError, FileNotFoundError: in one line, for a model or an option that cannot be used.
    """
    options = _parser().parse_args(arguments)
    if options.tp < 1:
        raise ValueError(f"--tp must be a number of ranks, at least 1, not {options.tp}")
    share = _share(options.share, options.tp)
    settings = dict(_setting(text) for text in options.set)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.against is not None and not Path(options.against).exists():
        raise FileNotFoundError(f"there is no plan {options.against}")

    from colrow.model import load
    from colrow.plan import Plan, derive_plan

    before = Plan.load(options.against) if options.against is not None else None
    start = time.perf_counter()
    loaded = load(options.model, settings)
    built = time.perf_counter()
    plan = derive_plan(
        loaded.model,
        loaded.examples,
        options.tp,
        share=share,
        forbid=options.forbid,
        sequence=SEQUENCE[options.sequence],
    )
    done = time.perf_counter()

    print(f"{loaded.name} in {' and '.join(loaded.examples)}", end="\n\n")
    print(plan.explain(), end="\n\n")
    print(
        f"built in {built - start:.1f} s, analysed in {done - built:.1f} s, "
        f"peak memory {_peak_memory() / 1e9:.2f} GB"
    )
    if options.out is not None:
        plan.save(options.out)
        print(f"written to {options.out}")
    return 0 if before is None else _compare(before, plan, options.against)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "colrow plan",
        description="Show how a model would be cut over ranks. It is built without memory, of any size.",
    )
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="transformers:DeepseekV3Config (a configuration with its defaults), a folder with a "
        "config.json, or package.module:function, which returns a model or (model, keywords of a call)",
    )
    add("--tp", type=int, required=True, metavar="N", help="ranks to cut the model over")
    add(
        "--share",
        metavar="3,3,2",
        help="relative size of each rank's part, for unequal devices (default: balanced)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of the configuration, or an argument of the function; of a nested configuration as "
        "text_config.num_hidden_layers=4; may be given several times",
    )
    add(
        "--forbid",
        action="append",
        default=[],
        metavar="NAME",
        help="a parameter, or an axis as the plan without this names it, that must stay whole; may be given "
        "several times",
    )
    add("--sequence", choices=SEQUENCE, default="no", help=SEQUENCE_HELP)
    add("--out", metavar="FILE.yaml", help="write the plan, to be edited and given to colrow.parallelize")
    add(
        "--against",
        metavar="FILE.yaml",
        help="compare with a plan that was written before; the exit status is 1 if they differ",
    )
    return parser


def _share(text: str | None, ranks: int) -> list[float] | None:
    if text is None:
        return None
    try:
        share = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--share must be numbers with commas, such as 3,3,2, not {text!r}") from None
    if len(share) != ranks:
        raise ValueError(f"--share has {len(share)} numbers for {ranks} ranks: give one for each")
    return share


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set needs NAME=VALUE, not {text!r}")
    return name, value


def _compare(before: Plan, plan: Plan, file: str) -> int:
    difference = before.diff(plan)
    if not difference:
        print(f"the same as {file}")
        return 0
    print(f"\ndifference from {file}:\n{difference}")
    return 1


def _peak_memory() -> int:
    """Bytes of memory that the process has used at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
