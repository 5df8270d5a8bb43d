"""PyTorch's tag of pointwise operators means what the rule for them assumes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from colrow.axes import default_registry
from colrow.layout.cut import Cut
from tests.axes.brute_force import Case, check_cuts

REGISTRY = default_registry()


def tagged() -> Iterator[str]:
    """Names of all public operators without their in-place variants."""
    for name in dir(torch.ops.aten):
        if name[0] != "_" and not name.endswith("_") and hasattr(getattr(torch.ops.aten, name), "overloads"):
            yield name


def case_of(function: torch._ops.OpOverload, integers: bool) -> Case | None:
    """The operator on a matrix, further tensors broadcast to it; None if it takes something else."""
    arguments: list[Any] = []
    for argument in function._schema.arguments:
        if argument.kwarg_only:
            break
        kind = str(argument.type)
        if kind == "Tensor":
            tensor = torch.rand([4] if len(arguments) == 1 else [3, 4], dtype=torch.float64) * 0.8 + 0.1
            arguments.append((tensor * 5).long() if integers else tensor)
        elif argument.has_default_value():
            break
        elif kind in ("number", "Scalar", "float", "int"):
            arguments.append(1 if integers or kind == "int" else 0.5)
        else:
            return None
    return Case(function, arguments)


def runs(case: Case) -> bool:
    try:
        case.function(*case.arguments)
    except (RuntimeError, NotImplementedError, IndexError):
        return False
    return True


@pytest.mark.parametrize("letter", "abcdefghijklmnopqrstuvwxyz")
def test_tagged_operators_are_pointwise(letter: str) -> None:
    for name in tagged():
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads() if name[0] == letter else ():
            function = getattr(packet, overload)
            if torch.Tag.pointwise not in function.tags or overload.endswith("out"):
                continue
            for case in (case_of(function, False), case_of(function, True)):
                if case is not None and case.arguments and runs(case):
                    check_cuts(case, lambda units: Cut((0, 1, units)), REGISTRY)
                    break
