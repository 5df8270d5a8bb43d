"""An optimizer's state in global form: it resumes at another number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from colrow.checkpoint.reader import SafetensorsFolder
from colrow.checkpoint.shards import Saved, write_global
from colrow.layout import TensorLayout
from colrow.state import PlacedParameter, placed_parameters, state_of

_STEM = "optimizer"
_GROUPS = "optimizer.json"


def _states(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[PlacedParameter, dict[str, Any]]]:
    return [
        (placed, optimizer.state[placed.parameter])
        for placed in placed_parameters(model)
        if placed.parameter in optimizer.state
    ]


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """Write the optimizer's state, global, by parameter name; every rank calls this.

    Tensors of a parameter's shape (AdamW's moments) are assembled like the parameter; other tensors (step
    counts) and the groups' options are written as they are.
    """
    state = state_of(model)
    folder = Path(folder)
    writes = state.is_first_replica
    is_writer = writes and state.communicator.rank == 0
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
    saved = []
    for placed, values in _states(model, optimizer):
        for key, value in values.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"the optimizer's {key!r} of {placed.name} is no tensor: it cannot be saved")
            is_alike = value.shape == placed.parameter.shape
            layout = placed.layout if is_alike else TensorLayout(tuple(value.shape))
            saved.append(Saved(f"{placed.name}|{key}", value, layout))
    write_global(folder, _STEM, saved, state.communicator, writes)
    if is_writer:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        partial = folder / f"{_GROUPS}.partial"
        partial.write_text(json.dumps(groups, indent=2) + "\n")
        partial.replace(folder / _GROUPS)
    state.communicator.barrier(label="save_optimizer")


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """Restore what :func:`save_optimizer` wrote, at any number of ranks; each rank reads its parts.

    Raises:
        FileNotFoundError: if there is no such state.
        ValueError: if the optimizer has other parameter groups.
    """
    folder = Path(folder)
    state = state_of(model)
    if not (folder / _GROUPS).exists():
        raise FileNotFoundError(f"there is no optimizer state in {folder}")
    groups = json.loads((folder / _GROUPS).read_text())
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the saved optimizer has {len(groups)} parameter groups, this one {len(optimizer.param_groups)}"
        )
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in options.items()})
    files = SafetensorsFolder(folder, _STEM)
    keys: dict[str, list[str]] = {}
    for name in files.names:
        parameter, _, key = name.rpartition("|")
        keys.setdefault(parameter, []).append(key)
    for placed in placed_parameters(model):
        values: dict[str, Tensor] = {}
        for key in sorted(keys.get(placed.name, [])):
            name = f"{placed.name}|{key}"
            shape = files.shape(name)
            is_alike = shape == placed.layout.shape and key != "step"
            layout = placed.layout if is_alike else TensorLayout(shape)
            value = files.read(name, layout, state.communicator.rank)
            values[key] = value.to(placed.parameter.device) if is_alike else value
        if values:
            optimizer.state[placed.parameter] = values
