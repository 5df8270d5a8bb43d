"""Comparing what the two models returned and computed: lists of checks, on each rank for its own part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from colrow.collectives import CommStats
from colrow.plan import Prediction
from colrow.state import state_of
from colrow.verify.exchange import Exchange
from colrow.verify.measure import largest_difference, magnitude, relate
from colrow.verify.report import COLLECTIVES, Check
from colrow.verify.run import Outputs

OUTPUT_FLOOR = 1e-6
"""An output smaller than this part of the largest one is measured by that."""
GRADIENT_FLOOR = 1e-6
"""Gradients that are all smaller than this part of the largest output are measured by that: where they are
zero, as those of a softmax over one class, nothing is left of them but rounding."""
MISSING = float("inf")


def compare_tensors(
    stage: str,
    kind: str,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    tolerance: float,
    floor: float,
    sizes: Mapping[str, float] | None = None,
    least: float = 0.0,
) -> list[Check]:
    """One check for each name. What only one side has differs.

    Args:
        stage, kind: for the checks.
        found, expected: by name; of the cut model and of the whole one.
        tolerance: relative to the largest magnitude of each tensor.
        floor: what is smaller than this part of the largest of all tensors is measured by that.
        sizes: by which errors are measured; default: the magnitudes of ``expected``.
        least: errors are measured by no less than this.
    """
    sizes = sizes or {name: magnitude(one) for name, one in expected.items()}
    smallest = max(least, floor * max(sizes.values(), default=0.0))
    checks = []
    for name in [*expected, *(name for name in found if name not in expected)]:
        note = ""
        if name not in found:
            # a rank without any unit may have nothing to compute
            error = MISSING if expected[name].numel() else 0.0
            note = "missing in the parallelized model" if error else ""
        elif name not in expected:
            error, note = MISSING, "missing in the original model"
        else:
            error = largest_difference(found[name], expected[name], max(smallest, sizes[name]))
            if found[name].shape != expected[name].shape:
                note = f"{list(found[name].shape)} instead of {list(expected[name].shape)}"
        checks.append(Check(stage, kind, name, error, tolerance, note))
    return checks


def least_gradient(outputs: Iterable[Tensor]) -> float:
    """By what gradients of such outputs are measured at least."""
    return GRADIENT_FLOOR * max(map(magnitude, outputs), default=0.0)


def compare_kept(
    stage: str, found: Outputs, expected: Outputs, tolerance: float, exchange: Exchange
) -> list[Check]:
    """What lies in caches: whole on every rank, or each rank's part of it."""
    checks = []
    names = [set(names) for names in exchange.gather(list(found.kept))]
    for name, whole in expected.kept.items():
        if not all(name in one for one in names):
            checks.append(
                Check(stage, "cache", name, MISSING, tolerance, "missing in the parallelized model")
            )
            continue
        relation = relate(exchange.gather(found.kept[name].detach()), whole.detach(), tolerance)
        relation = exchange.gather(relation)[0]
        error = relation.error if relation.kind in ("whole", "cut") else MISSING
        checks.append(Check(stage, "cache", name, error, tolerance))
    return checks


def local_parts(model: nn.Module, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each global tensor, named as a parameter or buffer of a parallelized ``model``, this rank's part."""
    state = state_of(model)
    parts = {}
    for name, tensor in whole.items():
        layout = state.layouts.get(name) or state.plan.tensor_layout(name, tuple(tensor.shape))
        whole_tensor = tensor.detach()
        rank = state.communicator.rank
        parts[name] = layout.slice(whole_tensor, rank) if layout.is_part else whole_tensor
    return parts


def compare_collectives(
    stage: str, mode: str, prediction: Prediction, counted: CommStats, rank: int, *, with_bytes: bool
) -> list[Check]:
    """Collectives predicted for ``rank`` against counted ones: number and bytes, by direction and kind.

    Where the number varies with the data, it is compared with those that do not, which must be there.
    """
    varying: set[tuple[str, str]] = set()
    predicted: dict[tuple[str, str], tuple[int, int]] = {}
    for one in prediction.collectives:
        if one.mode == mode and (not one.members or rank in one.members):
            direction, kind = one.direction, one.kind.replace("-", "_")
            if one.varies:
                varying.add((direction, kind))
                continue
            count, size = predicted.get((direction, kind), (0, 0))
            predicted[direction, kind] = (count + one.count, size + one.count * one.bytes)
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for (operation, _, phase), tally in counted.tallies.items():
        count, size = found.get((phase, operation), (0, 0))
        found[phase, operation] = (count + tally.count, size + tally.bytes)
    checks = []
    for phase, operation in sorted(predicted.keys() | found.keys() | varying):
        foreseen, its_bytes = predicted.get((phase, operation), (0, 0))
        happened, bytes_moved = found.get((phase, operation), (0, 0))
        name = f"{operation.replace('_', '-')} {phase}"
        note = "" if foreseen == happened else f"{foreseen} predicted, {happened} counted"
        if (phase, operation) in varying:
            missing = max(0, foreseen - happened)
            checks.append(
                Check(stage, COLLECTIVES, f"{name}, at least", missing, 0.0, note if missing else "")
            )
            continue
        checks.append(Check(stage, COLLECTIVES, name, abs(foreseen - happened), 0.0, note))
        if with_bytes:
            note = "" if its_bytes == bytes_moved else f"{its_bytes} B predicted, {bytes_moved} B counted"
            checks.append(
                Check(stage, COLLECTIVES, f"{name}, bytes", abs(its_bytes - bytes_moved), 0.0, note)
            )
    return checks


def without_numbers(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are all NaN: they would agree with anything."""
    return [name for name, one in tensors.items() if one.numel() and bool(torch.isnan(one).all())]
