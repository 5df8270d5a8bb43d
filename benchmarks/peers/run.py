"""Measures colrow beside Megatron core, transformers, DeepSpeed and DTensor on the same training step.

    python benchmarks/peers/run.py --out runs/bench
    python benchmarks/peers/run.py --out runs/bench --shapes gpt llama --tp 2 --dtype fp32 --rounds 9
    python benchmarks/peers/run.py --out runs/gemm --shapes gpt \\
        --systems 'colrow[COLROW_GEMM=mkl]' colrow dtensor single_1_thread

Builds an environment with all systems on first use. Writes ``results.json``, ``results.md``, ``bars.png`` and
``details.json`` (every round), after every case, and what the processes print under ``logs``. A system that
fails has its error in the tables and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started as a file: say which package it belongs to
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    __package__ = "benchmarks.peers"

from .environment import FOLDER, ROOT, Environment, Existing, processor, versions
from .group import Group, Place, Ranks
from .report import Outcomes, details, markdown, results
from .rounds import run_case
from .shapes import DTYPES, SHAPES, Case
from .systems import PROGRAMS, System

LEAST_ROUNDS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 0 if colrow, where it was asked for, trained the model in every case."""
    options = parse(arguments)
    environment = Existing(options.folder) if options.existing else Environment(options.folder)
    try:
        with environment.held():
            environment.install()
            measured = measure(options, environment)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"written: {options.out}")
    ours = [
        outcomes[name] for outcomes in measured.values() for name in outcomes if name.startswith("colrow")
    ]
    return 1 if any(outcome.error for outcome in ours) else 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE")
    parser.add_argument("--tp", nargs="+", type=int, default=[2, 4], help="numbers of ranks (default 2 4)")
    parser.add_argument(
        "--systems",
        nargs="+",
        type=System.parse,
        default=[System.parse(name) for name in PROGRAMS],
        metavar="SYSTEM",
        help=f"of {', '.join(PROGRAMS)}; with settings: 'colrow[NAME=value,NAME=value]'",
    )
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS, help="turns of each system (default 5)")
    parser.add_argument("--steps", type=int, help="counted steps of a turn (default: by shape)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one answer (default 300)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the environment (default .peers)")
    parser.add_argument("--existing", action="store_true", help="use this interpreter's packages, build none")
    options = parser.parse_args(arguments)
    if min(options.tp) < 1 or options.rounds < 1 or (options.steps or 1) < 1 or options.timeout <= 0:
        parser.error("--tp, --rounds, --steps and --timeout must be positive")
    if len({system.name for system in options.systems}) < len(options.systems):
        parser.error("--systems: each name once")
    options.out, options.folder = options.out.resolve(), options.folder.resolve()
    return options


def measure(options: argparse.Namespace, environment: Environment) -> dict[Case, Outcomes]:
    """All cases, written to the folder after each of them."""
    cases = [
        Case(SHAPES[name], dtype, ranks)
        for ranks in options.tp
        for dtype in options.dtype
        for name in options.shapes
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    variables = environment.variables()
    place = Place(environment.python, environment.models, options.out / "logs", options.timeout, variables)

    def start(system: System, case: Case) -> Ranks:
        environment.remove_stale_locks()  # the last run of a system may have been killed while it compiled
        return Group(system, case, place)

    measured: dict[Case, Outcomes] = {}
    for number, case in enumerate(cases):
        begin = time.monotonic()
        prepare(case, place)
        print(f"\n[{number + 1}/{len(cases)}] {case.title}", flush=True)
        measured[case] = run_case(case, options.systems, options.rounds, options.steps, start, _say)
        write(options.out, measured, about(options, environment), environment.python)
        print(f"{time.monotonic() - begin:.0f} s\n")
        print(markdown({case: measured[case]}, {}).split("\n## ", 1)[1])
    return measured


def prepare(case: Case, place: Place) -> None:
    """Write the model's weights, unless an earlier case has.

    Raises:
        RuntimeError: if that fails.
    """
    target = place.models / case.shape.name
    programs = [Path(__file__).with_name("systems") / name for name in ("prepare.py", "models.py")]
    made_from = "\n".join([str(case.shape), *(program.read_text() for program in programs)])
    stamp = target / "made_from"
    if stamp.exists() and stamp.read_text() == made_from:
        return
    command = [
        str(place.python),
        "-m",
        "benchmarks.peers.systems.prepare",
        "--case",
        json.dumps(case.to_json()),
    ]
    command += ["--folder", str(place.models)]
    variables = {**os.environ, **place.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cannot write the weights of {case.shape.name}:\n{done.stderr}")
    stamp.write_text(made_from)


def about(options: argparse.Namespace, environment: Environment) -> dict[str, Any]:
    """What the numbers depend on besides the systems."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("COLROW_")}
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "Python": platform.python_version(),
        **versions(environment.python),
        "rounds": options.rounds,
        **settings,
    }


def write(
    folder: Path, measured: Mapping[Case, Outcomes], information: Mapping[str, Any], python: Path
) -> None:
    """All files, each replaced at once."""
    everything = details(measured, information)
    for name, text in (
        ("results.json", json.dumps(results(measured), indent=1) + "\n"),
        ("details.json", json.dumps(everything, indent=1) + "\n"),
        ("results.md", markdown(measured, information)),
    ):
        partial = folder / f"{name}.partial"
        partial.write_text(text)
        partial.replace(folder / name)
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [
        str(python),
        "-m",
        "benchmarks.peers.chart",
        str(folder / "details.json"),
        str(folder / "bars.png"),
    ]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        print(f"no chart: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
