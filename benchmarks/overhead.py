"""What colrow adds to the call of a module: microseconds of host time, without any communication.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py --json overhead.json

A module that does nothing is called over and over, as it is and changed as `colrow.parallelize` changes it: a
value entered, a result summed, a number made local at a call in its code. There is one rank, so a collective
moves nothing; the modules that have it written into their forward tell what of the time is the collective's
own (an autograd node, a copy), the others what it costs to get there.

The row of 64 is what a model pays once per call to see whether its changed modules are as colrow left them.

A second table has what PyTorch offers to change a module's values, to choose from: hooks of all kinds, a
forward of the instance's own.

Every round measures every variant, in rotating order, by this thread's processor time. Each time is compared
with the reference's in the same round; what is quoted are medians over rounds.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import colrow
from colrow.apply.calls import CallTable, local_number
from colrow.apply.values import ModuleTable
from colrow.collectives import AllReduce, Communicator, Enter, communicator
from colrow.forwards import Watch
from colrow.layers import SharedEntry
from colrow.plan.derive import derive_plan
from colrow.trace import Example

STATES = ("inference", "training")
TARGET = {"module": 1.0, "call site": 60.0}
"""Microseconds that a changed module, and one with changed calls in its code, may take longer."""


class Nothing(nn.Module):
    """Gives what it is given."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class Written(Nothing):
    """Has the collectives in its forward, where a person would write them."""

    def __init__(self, before: Callable[[Tensor], Tensor] | None, after: Callable[[Tensor], Tensor] | None):
        super().__init__()
        self.before, self.after = before, after

    def forward(self, hidden: Tensor) -> Tensor:
        if self.before is not None:
            hidden = self.before(hidden)
        return hidden if self.after is None else self.after(hidden)


class Attention(nn.Module):
    """Attention with its number of heads and of features written as numbers: three calls must change."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        query = self.query(hidden).view(batch, length, 4, 8).transpose(1, 2)
        key = self.key(hidden).view(batch, length, 4, 8).transpose(1, 2)
        value = self.value(hidden).view(batch, length, 4, 8).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value)
        merged: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, 32))
        return merged


@dataclass(frozen=True)
class Variant:
    """A module, and the one that it is compared with.

    Attributes:
        name: what is done to it.
        module: called with one tensor.
        shape: of that tensor.
        reference: name of the variant whose time is taken off; empty if this is one.
        kind: ``"module"`` or ``"call site"``, for what it may cost; ``"torch"`` if nothing of colrow's.
    """

    name: str
    module: nn.Module
    reference: str
    kind: str
    shape: tuple[int, ...] = (2,)


def colrow_variants(ranks: Communicator) -> list[Variant]:
    """What ``parallelize`` does to modules."""

    def shared() -> SharedEntry:
        return SharedEntry(ranks, "enter", 1)

    enter, exit = Enter(ranks, "enter"), AllReduce(ranks, "exit")
    return [
        Variant("as it is", Nothing(), "", "module"),
        Variant("an input replaced", _changed([_same], []), "as it is", "module"),
        Variant("a result replaced", _changed([], [_same]), "as it is", "module"),
        Variant("input and result replaced", _changed([_same], [_same]), "as it is", "module"),
        Variant("64 in a model", _with_changed(64), "as it is", "module"),
        Variant("written: enter", Written(enter, None), "as it is", "module"),
        Variant("entered by colrow", _changed([enter], []), "written: enter", "module"),
        Variant("entered, shared", _changed([shared()], []), "written: enter", "module"),
        Variant("written: exit", Written(None, exit), "as it is", "module"),
        Variant("left by colrow", _changed([], [exit]), "written: exit", "module"),
        Variant("written: both", Written(enter, exit), "as it is", "module"),
        Variant("both by colrow", _changed([enter], [exit]), "written: both", "module"),
        Variant("both, shared", _changed([shared()], [exit]), "written: both", "module"),
        Variant("attention", Attention(), "", "call site", (1, 4, 32)),
        Variant("4 numbers at calls", _with_calls(), "attention", "call site", (1, 4, 32)),
    ]


def _same(value: Tensor) -> Tensor:
    return value


def _changed(before: list[Callable[[Tensor], Tensor]], after: list[Callable[[Tensor], Tensor]]) -> nn.Module:
    model = nn.ModuleDict({"part": Nothing()})
    table = ModuleTable(model)
    for change in before:
        table.at("part").change_input(("hidden",), change)
    for change in after:
        table.at("part").change_output((), change)
    table.attach()
    return model["part"]


def _with_changed(count: int) -> nn.Module:
    """A model that calls none of its changed modules, but sees to it that they still are."""
    model = Nothing()
    table = ModuleTable(model)
    for number in range(count):
        model.add_module(f"part{number}", Nothing())
        table.at(f"part{number}").change_output((), _same)
    table.attach()
    Watch(model)
    return model


def _with_calls() -> nn.Module:
    """Attention with the calls changed that a plan for two ranks changes, each number to itself."""
    module = Attention()
    plan = derive_plan(module, {"evaluation": Example((torch.zeros(1, 4, 32),))}, 2)
    table = CallTable(module)
    for integer in plan.integers:
        given = integer.given[0]
        change = local_number(given, given, integer.place)
        table.at("").at(integer.place.call).integers.append((integer.place.path, change))
    assert len(plan.integers) == 4, plan.integers
    table.attach()
    return module


class OwnForward:
    """A forward of the instance's own. A deep copy of the module copies it too, unlike a closure."""

    def __init__(self, module: nn.Module) -> None:
        self.original = module.forward
        self.__signature__ = inspect.signature(module.forward)  # transformers asks for it

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.original(*arguments, **keywords)


def torch_variants() -> list[Variant]:
    """What PyTorch offers to change a module's values; none of them changes anything here."""

    def variant(name: str, change: Callable[[nn.Module], object]) -> Variant:
        module = Nothing()
        change(module)
        return Variant(name, module, "plain module", "torch")

    def own_closure(module: nn.Module) -> None:
        original = module.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            return original(*arguments, **keywords)

        module.forward = forward

    def own_object(module: nn.Module) -> None:
        module.forward = OwnForward(module)

    def own_method(module: nn.Module) -> None:
        module.forward = OwnForward(module).__call__

    def subclass(module: nn.Module) -> None:
        def forward(self: Nothing, *arguments: Any, **keywords: Any) -> Any:
            return Nothing.forward(self, *arguments, **keywords)

        module.__class__ = type("Changed", (Nothing,), {"forward": forward})

    def before(module: nn.Module, arguments: Any) -> Any:
        return arguments

    def before_keywords(module: nn.Module, arguments: Any, keywords: Any) -> Any:
        return arguments, keywords

    def after(module: nn.Module, arguments: Any, result: Any) -> Any:
        return result

    def both(module: nn.Module) -> None:
        module.register_forward_pre_hook(before_keywords, with_kwargs=True)
        module.register_forward_hook(after)

    return [
        Variant("plain module", Nothing(), "", "torch"),
        variant("pre-hook", lambda module: module.register_forward_pre_hook(before)),
        variant(
            "pre-hook with_kwargs",
            lambda module: module.register_forward_pre_hook(before_keywords, with_kwargs=True),
        ),
        variant("forward hook", lambda module: module.register_forward_hook(after)),
        variant(
            "forward hook always_call", lambda module: module.register_forward_hook(after, always_call=True)
        ),
        variant("pre-hook with_kwargs, forward hook", both),
        variant("own forward: closure", own_closure),
        variant("own forward: object", own_object),
        variant("own forward: method of an object", own_method),
        variant("own forward: subclass", subclass),
    ]


def measure_calls(variant: Variant, state: str, calls: int) -> float:
    """Microseconds of this thread per call; in training of a forward and a backward."""
    module = variant.module
    x = torch.zeros(variant.shape, requires_grad=state == "training")
    cotangent = torch.ones(variant.shape)
    with torch.set_grad_enabled(state == "training"):
        if state == "training":
            begin = time.thread_time()
            for _ in repeat(None, calls):
                module(x).backward(cotangent)
        else:
            begin = time.thread_time()
            for _ in repeat(None, calls):
                module(x)
        return (time.thread_time() - begin) / calls * 1e6


def measure(
    variants: list[Variant], rounds: int, calls: int, console: Console
) -> dict[str, dict[str, list[float]]]:
    """Microseconds per call, by variant and state, one per round."""
    found: dict[str, dict[str, list[float]]] = {one.name: {state: [] for state in STATES} for one in variants}
    for variant in variants:
        for state in STATES:
            measure_calls(variant, state, calls // 10 + 1)  # warm
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            with console.status(f"round {number + 1} of {rounds}"):
                for index in range(len(variants)):
                    variant = variants[(number + index) % len(variants)]
                    for state in STATES:
                        few = calls if variant.kind != "call site" else calls // 10 + 1
                        found[variant.name][state].append(measure_calls(variant, state, few))
            gc.collect()
    finally:
        gc.enable()
    return found


def summary(variants: list[Variant], found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Per variant and state the median time, and what it adds to its reference: median and quartiles."""
    result: dict[str, dict[str, Any]] = {}
    for variant in variants:
        result[variant.name] = {"kind": variant.kind, "reference": variant.reference}
        for state in STATES:
            times = found[variant.name][state]
            row: dict[str, Any] = {"microseconds": statistics.median(times)}
            if variant.reference:
                pairs = zip(times, found[variant.reference][state], strict=True)
                low, median, high = statistics.quantiles([one - other for one, other in pairs], n=4)
                row["added"] = [median, low, high]
            result[variant.name][state] = row
    return result


def table(results: dict[str, dict[str, Any]], of_torch: bool, title: str) -> Table:
    """What each variant takes and adds."""
    shown = Table(title=title, box=box.SIMPLE_HEAVY, title_justify="left")
    shown.add_column("", no_wrap=True)
    if not of_torch:
        shown.add_column("over", no_wrap=True)
    for state in STATES:
        shown.add_column(f"{state}, µs", justify="right", no_wrap=True)
    for name, row in results.items():
        if (row["kind"] == "torch") != of_torch or not row["reference"]:
            continue
        added = [row[state]["added"] for state in STATES]
        cells = [f"{median:.2f} ({low:.2f}-{high:.2f})" for median, low, high in added]
        shown.add_row(name, *([] if of_torch else [row["reference"]]), *cells)
    return shown


def main(arguments: list[str]) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="What colrow adds to the call of a module, in microseconds.")
    parser.add_argument("--rounds", type=int, default=15, help="over all variants, at least 2 (default: 15)")
    parser.add_argument("--calls", type=int, default=3000, help="calls per variant and round (default: 3000)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args(arguments)
    for name, least in (("rounds", 2), ("calls", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}")
    torch.set_num_threads(1)
    ranks = communicator(colrow.init_mesh(device="cpu"))
    variants = [*colrow_variants(ranks), *torch_variants()]
    console = Console()
    found = measure(variants, options.rounds, options.calls, console)
    results = summary(variants, found)
    console.print(table(results, False, "added by colrow: median (quartiles)"))
    console.print(table(results, True, "added to a module that does nothing by PyTorch's own means"))
    console.print(
        f"To be met: {TARGET['module']:g} µs for a changed module, {TARGET['call site']:g} µs for one with "
        "changed calls; training is a forward and a backward."
    )
    if options.json:
        record = {
            "options": {"rounds": options.rounds, "calls": options.calls},
            "environment": {"torch": torch.__version__, "python": platform.python_version()},
            "target": TARGET,
            "variants": results,
            "rounds": found,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
