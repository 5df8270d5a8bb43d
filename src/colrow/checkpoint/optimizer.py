"""An optimizer's state in global form: it resumes at another number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from colrow.checkpoint.holders import Holders
from colrow.checkpoint.optimizer_state import OptimizerState, Source
from colrow.checkpoint.reader import SafetensorsFolder
from colrow.checkpoint.shards import Saved, write_global
from colrow.collectives.texts import all_gather_texts
from colrow.data_shards import cut_like, let_go_of_gathered
from colrow.layout import TensorLayout
from colrow.state import PipelineShare, PlacedParameter, parallel_module, placed_parameters, state_of

_STEM = "optimizer"
_GROUPS = "groups"
_NAMES = "params"


class _Entry(NamedTuple):
    """One tensor of the optimizer's state."""

    placed: PlacedParameter
    key: str
    value: Tensor
    source: Source | None

    @property
    def name(self) -> str:
        return f"{self.placed.name}|{self.key}"


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """Write the optimizer's state, global, by parameter name; every rank that holds the model calls this.

    Of a sharded parameter the state may be tensors of the parameter's shape (AdamW's moments), which are
    assembled like the parameter, or scalars that are the same on every rank (step counts). What kind a
    state of some name is, is decided from all parameters and ranks together. State of replicated
    parameters is written as it is.

    As :func:`save_pretrained`, this returns when the files are complete, replaces an earlier save as a
    whole, and fails on all ranks if it fails on one.

    Raises:
        ValueError: if the state of a sharded parameter is of another kind, such as Adafactor's factored
            moments; if the optimizer trains something that is not in the model; if an option is no plain
            number, string or sequence of such.
        OSError: if the folder cannot be written.
    """
    state = state_of(model)
    let_go_of_gathered(parallel_module(model))
    holders, label = Holders(state), f"save {folder}"
    alike = Holders(state, of_stage=True)
    placed = list(placed_parameters(model))
    kept = OptimizerState(optimizer)
    values = kept.of([one.parameter for one in placed])
    with holders.together(label):
        groups = _describe_groups(model, optimizer)
        entries = [
            entry
            for one, own in zip(placed, values, strict=True)
            for entry in _entries(one, own, kept.source(one.parameter))
        ]
    alike.require_same(
        "\n".join([groups, *(entry.name for entry in entries)]),
        "the optimizers of the ranks have different options, or state of different parameters",
        label,
    )
    layouts = _layouts(entries, alike, label)
    if state.pipeline is not None:
        with holders.together(label):
            pass  # before stages wait for each other
        groups = _groups_of_stages(groups, state.pipeline, state.mesh.device_type, label)
    saved = [
        # numbers are everywhere
        Saved(
            entry.name,
            entry.value,
            layout,
            entry.source if entry.value.dim() else None,
            entry.placed.experts if layout.window else None,
        )
        for entry, layout in zip(entries, layouts, strict=True)
        if state.pipeline is None or state.pipeline.is_first_holder(entry.placed.name)
    ]
    write_global(Path(folder), _STEM, saved, state, metadata={_GROUPS: groups})


def _describe_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """The parameter groups as JSON: their options, and the names of their parameters."""
    described = []
    names = _parameter_names(model, optimizer)
    for group, own_names in zip(optimizer.param_groups, names, strict=True):
        options = {}
        for key, value in group.items():
            if key == _NAMES:
                continue
            options[key] = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            try:
                json.dumps(options[key])
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"the optimizer's option {key!r} is a {type(value).__name__}, which cannot be saved: "
                    "use numbers, strings or sequences of them"
                ) from error
        described.append(options | {_NAMES: own_names})
    return json.dumps(described)


def _groups_of_stages(groups: str, pipeline: PipelineShare, device: str, label: str) -> str:
    """The parameter groups of all stages' optimizers as those of one.

    Raises:
        ValueError: if their options differ; on all ranks.
    """
    texts = all_gather_texts(pipeline.communicator, groups, device, label=label)
    every = [json.loads(text) for text in texts]
    options = [[{key: one[key] for key in one if key != _NAMES} for one in each] for each in every]
    if any(one != options[0] for one in options):
        raise ValueError(
            "the optimizers of the pipeline's stages have different groups, or other options: make the same "
            "groups on all stages, also those that are empty on some"
        )
    merged = []
    for number, own in enumerate(options[0]):
        names = dict.fromkeys(name for each in every for name in each[number][_NAMES])
        merged.append(own | {_NAMES: list(names)})
    return json.dumps(merged)


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(placed.parameter): placed.name for placed in placed_parameters(model)}
    result = []
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"group {number} of the optimizer has a parameter of shape {list(parameter.shape)} that "
                    "is not in the model: make one optimizer for the model alone"
                )
        result.append([names[id(parameter)] for parameter in group["params"]])
    return result


def _entries(
    placed: PlacedParameter, values: Mapping[str, object], source: Source | None
) -> Iterator[_Entry]:
    for key, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"the optimizer's {key!r} of {placed.name} is no tensor: it cannot be saved")
        yield _Entry(placed, key, value, source)


def _layouts(entries: list[_Entry], holders: Holders, label: str) -> list[TensorLayout]:
    """Where each tensor lies in its whole; the same decision on every rank."""
    if not entries:
        return []
    other = torch.tensor([entry.value.shape != entry.placed.parameter.shape for entry in entries])
    sizable = torch.tensor([entry.value.dim() > 0 for entry in entries])
    other, sizable = holders.largest(torch.stack([other, sizable]).long(), label).bool()
    # a factor of a moment may have the parameter's shape by accident, but not under its key everywhere
    factors = {entry.key for entry, is_other in zip(entries, other, strict=True) if is_other}
    values = [
        0.0 if has_size else entry.value.item() for entry, has_size in zip(entries, sizable, strict=True)
    ]
    differ = holders.differing(torch.tensor(values, dtype=torch.float64).nan_to_num(), label)
    layouts = []
    for entry, has_size, differs in zip(entries, sizable, differ, strict=True):
        placed = entry.placed
        if not has_size and differs:
            raise ValueError(
                f"the optimizer's {entry.key!r} of {placed.name} is a number that differs between the ranks: "
                "it was computed from a part of the parameter, and has no global form"
            )
        if not placed.layout.is_part:
            layouts.append(TensorLayout(tuple(entry.value.shape)))
        elif entry.key not in factors:
            layouts.append(placed.layout)
        elif not has_size:
            layouts.append(TensorLayout(()))
        else:
            raise ValueError(
                f"the optimizer's {entry.key!r} of {placed.name} has the shape {list(entry.value.shape)}. Of "
                "a sharded parameter only state of the parameter's own shape and scalars can be saved: use "
                "an optimizer such as AdamW or SGD, or save without the optimizer"
            )
    return layouts


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """Restore what :func:`save_optimizer` wrote, at any number of ranks; each rank reads its parts.

    Options of the groups and state become those that were saved. Call it with an optimizer of the same
    groups of the same parameters.

    Raises:
        FileNotFoundError: if there is no such state.
        ValueError: if the optimizer has other groups, or other parameters in them, or the shapes are others;
            the optimizer is then unchanged.
    """
    folder, state = Path(folder), state_of(model)
    try:
        files = SafetensorsFolder(folder, _STEM)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no optimizer state in {folder}: {error}") from error
    if _GROUPS not in files.metadata:
        raise ValueError(f"the optimizer state in {folder} was not written by colrow.save_optimizer")
    groups: list[dict[str, Any]] = json.loads(files.metadata[_GROUPS])
    if state.pipeline is not None:
        # what stages on other ranks train is no business of this one's optimizer
        others = state.pipeline.holders.keys() - {one.name for one in placed_parameters(model)}
        for group in groups:
            group[_NAMES] = [name for name in group[_NAMES] if name not in others]
    _check_groups(groups, _parameter_names(model, optimizer))
    keys: dict[str, list[str]] = {}
    for name in sorted(files.names):
        parameter, _, key = name.rpartition("|")
        keys.setdefault(parameter, []).append(key)
    options = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    loaded: list[tuple[nn.Parameter, dict[str, Tensor]]] = []
    for placed in placed_parameters(model):
        values = {}
        for key in keys.pop(placed.name, []):
            name = f"{placed.name}|{key}"
            shape = files.shape(name)
            has_parts = placed.layout.is_part and shape != ()
            layout = placed.layout if has_parts else TensorLayout(shape)
            value = files.read(name, layout, state.communicator.rank)
            if shape != ():
                value = cut_like(value, placed.parameter.data)
            group = options.get(id(placed.parameter), {})
            # torch keeps counts on the CPU, unless the whole step runs on the device
            stays = shape == () and not (group.get("capturable") or group.get("fused"))
            values[key] = value if stays else value.to(placed.parameter.device)
        loaded.append((placed.parameter, values))
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, option in saved.items():
            if key != _NAMES:
                group[key] = _like(group.get(key), option)
    kept = OptimizerState(optimizer)
    for trained, values in loaded:
        kept.put(trained, values)


def _check_groups(saved: list[dict[str, Any]], names: list[list[str]]) -> None:
    if len(saved) != len(names):
        raise ValueError(f"the saved optimizer has {len(saved)} parameter groups, this one {len(names)}")
    for number, (group, own) in enumerate(zip(saved, names, strict=True)):
        missing = [name for name in own if name not in set(group[_NAMES])]
        unknown = [name for name in group[_NAMES] if name not in set(own)]
        if missing or unknown:
            raise ValueError(
                f"the saved optimizer is of other parameters: its group {number}"
                + (f" lacks {', '.join(missing[:5])}" if missing else "")
                + (" and" if missing and unknown else "")
                + (f" has {', '.join(unknown[:5])}, which this one does not" if unknown else "")
            )


def _like(present: object, saved: Any) -> Any:
    """A saved option in the type that the optimizer has it in: JSON knows no tuples and no tensors."""
    if isinstance(present, Tensor):
        return torch.full_like(present, saved)
    return tuple(saved) if isinstance(present, tuple) else saved
