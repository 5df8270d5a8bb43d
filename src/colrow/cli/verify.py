"""``colrow verify MODEL --tp N``: prove that a model cut over ranks is equal to the model on one device."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colrow.cli.options import SEQUENCE, SEQUENCE_HELP

if TYPE_CHECKING:
    from torch import nn

PRECISIONS = ("float64", "float32")
DATA = ("ddp", "zero1", "fsdp")


@dataclass(frozen=True)
class SpecifiedModel:
    """A function without arguments that builds a specified model; it can be sent to ranks, models may not."""

    specification: str
    settings: Mapping[str, Any]

    def __call__(self) -> nn.Module:
        from colrow.model import load

        return load(self.specification, self.settings, device="cpu").model


def run(arguments: list[str]) -> int:
    """Run the command: starts ``--pp`` x ``--dp`` x ``--tp`` processes on this host.

    Returns:
        0 if the models are equal; 1 if they differ.

    Raises:
        ValueError, FileNotFoundError: in one line, for a model or an option that cannot be used.
        LaunchError: if a rank failed, or no plan can be made.
    """
    options = _parser().parse_args(arguments)
    sizes = {name: getattr(options, name) for name in ("pp", "dp", "ep", "cp", "tp")}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"--{name} must be a number, at least 1, not {size}")
    settings = dict(_setting(text) for text in options.set)
    is_function = not options.model.startswith("transformers:") and not Path(options.model).is_dir()
    # of a function's model nothing is known that could be made smaller
    shrink = not is_function if options.shrink is None else options.shrink
    if options.plan is not None and not Path(options.plan).exists():
        raise FileNotFoundError(f"there is no plan {options.plan}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch

    from colrow.model import load
    from colrow.plan import Plan
    from colrow.verify import verify

    loaded = load(options.model, settings, device="cpu", shrink=shrink)
    count = sum(parameter.numel() for parameter in loaded.model.parameters())
    print(
        f"{loaded.name}{', made small' if shrink else ''}: {count:,} parameters, "
        f"{' and '.join(loaded.examples)}; starting {prod(sizes.values())} ranks",
        file=sys.stderr,
        flush=True,
    )
    report = verify(
        SpecifiedModel(options.model, settings) if is_function else loaded.model,
        loaded.examples,
        sizes,
        Plan.load(options.plan) if options.plan is not None else None,
        data=options.data,
        schedule=options.schedule,
        micro_batches=options.micro_batches,
        steps=options.steps,
        dtype=getattr(torch, options.dtype),
        sequence=SEQUENCE[options.sequence],
        timeout=options.timeout,
    )
    print(report)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(report.as_dictionary(), indent=1) + "\n", encoding="utf-8")
    return 0 if report.exact else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "colrow verify",
        description="Prove that a model cut over ranks is equal to the model on one device: outputs, every "
        "gradient and optimizer steps. If it is not, the first module and call in which they part are found.",
    )
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="transformers:DeepseekV3Config (a configuration with its defaults), a folder with a "
        "config.json, or package.module:function, which returns a model or (model, keywords of a call)",
    )
    add("--tp", type=int, required=True, metavar="N", help="ranks to cut the model over")
    add("--dp", type=int, default=1, metavar="N", help="replicas, each with its own data (default: 1)")
    add("--data", choices=DATA, default="ddp", help="how replicas train together (default: ddp)")
    add("--ep", type=int, default=1, metavar="N", help="ranks that divide the experts (default: 1)")
    add("--cp", type=int, default=1, metavar="N", help="ranks that divide each sequence (default: 1)")
    add("--pp", type=int, default=1, metavar="N", help="stages of a pipeline (default: 1)")
    add("--schedule", default="1f1b", help="of a pipeline (default: 1f1b)")
    add("--micro-batches", type=int, default=2, metavar="N", help="of a pipeline (default: 2)")
    add("--steps", type=int, default=3, metavar="N", help="of the optimizer (default: 3)")
    add("--dtype", choices=PRECISIONS, default="float64", help="precision (default: float64)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of the configuration, or an argument of the function; of a nested configuration as "
        "text_config.num_hidden_layers=4; may be given several times",
    )
    add(
        "--shrink",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="verify a small model of the same architecture (default for configurations and folders)",
    )
    add("--sequence", choices=SEQUENCE, default="no", help=SEQUENCE_HELP)
    add("--plan", metavar="FILE.yaml", help="what to verify (default: the derived plan)")
    add("--json", metavar="FILE", help="write every comparison to this file")
    add(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="for everything (default: 600)",
    )
    return parser


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set needs NAME=VALUE, not {text!r}")
    return name, value
