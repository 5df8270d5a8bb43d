"""Weights in the layout of the Hugging Face hub: written from shards, read as shards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.apply import parallelize
from colrow.checkpoint.meta import materialise, parameters_on_meta
from colrow.checkpoint.reader import SafetensorsFolder
from colrow.checkpoint.shards import BYTES_PER_FILE, Saved, write_global
from colrow.layout import TensorLayout
from colrow.plan import HandPlan, Plan, hand_plan
from colrow.state import PlacedParameter, parallel_module, placed_parameters, state_of


def save_pretrained(model: nn.Module, folder: str | Path, *, bytes_per_file: int = BYTES_PER_FILE) -> None:
    """Write a parallelized model in its original, global form; every rank calls this.

    The folder loads with plain ``AutoModel...from_pretrained``: names, shapes and dtypes are those of the
    original model, tied weights are written once. No rank holds more than one global tensor at a time.

    Args:
        model: a parallelized model; with a transformers model its configurations are written too.
        folder: made if it does not exist; files of the same names are replaced, each at once.
        bytes_per_file: begin another file, with an index, when one would grow beyond this.
    """
    module, state = parallel_module(model), state_of(model)
    folder = Path(folder)
    writes = state.is_first_replica
    is_writer = writes and state.communicator.rank == 0
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
    saved = [
        Saved(_saved_name(module, placed), placed.parameter, placed.layout)
        for placed in placed_parameters(model)
    ]
    saved += [
        Saved(name, buffer, TensorLayout(tuple(buffer.shape))) for name, buffer in _persistent_buffers(module)
    ]
    write_global(folder, "model", saved, state.communicator, writes, bytes_per_file)
    if is_writer:
        _save_configurations(module, folder)
    # nobody returns before the files are complete
    state.communicator.barrier(label="save_pretrained")


def _saved_name(module: nn.Module, placed: PlacedParameter) -> str:
    """Of a tied parameter's names the one that transformers keeps."""
    tied = getattr(module, "_tied_weights_keys", None) or {}
    kept = [name for name in placed.names if name not in tied]
    return (kept or list(placed.names))[0]


def _persistent_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    persistent = module.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in persistent]


def _save_configurations(module: nn.Module, folder: Path) -> None:
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "save_pretrained"):
        return
    parameter = next(module.parameters(), None)
    config.architectures = [type(module).__name__]
    if parameter is not None:
        config.dtype = parameter.dtype
    config.save_pretrained(folder)
    generation = getattr(module, "generation_config", None)
    if generation is not None and module.can_generate():  # type: ignore[operator]
        generation.save_pretrained(folder)


def load_pretrained(
    folder: str | Path,
    mesh: DeviceMesh,
    plan: Plan | HandPlan | None = None,
    *,
    dtype: torch.dtype | None = None,
    **config_options: Any,
) -> nn.Module:
    """A transformers model, parallelized, from a local folder; each rank reads its own parts only.

    Args:
        folder: with ``config.json`` and safetensors.
        mesh: from :func:`colrow.init_mesh`.
        plan: default: the example plan for the model's type.
        dtype: of the parameters; default: that of the configuration.
        config_options: fields of the configuration to change, such as ``attention_dropout=0.1``.

    Raises:
        FileNotFoundError: if the folder, its configuration or its weights do not exist.
        PlanError: if the plan does not fit the model.
        ValueError: if weights are missing or have other shapes.
    """
    import transformers

    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"there is no config.json in {folder}")
    config = transformers.AutoConfig.from_pretrained(folder, **config_options)
    names = config.architectures or []
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is None:
        raise ValueError(
            f"the architecture {names} of {folder} is not in transformers {transformers.__version__}"
        )
    dtype = dtype or config.dtype or torch.float32
    with parameters_on_meta(), _default_dtype(dtype):
        model: nn.Module = model_class(config)
    model.eval()
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)  # type: ignore[assignment]
    parallelize(model, mesh, plan or hand_plan(model))
    load_weights(model, folder)
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Fill a parallelized model from a folder of safetensors of global shapes; each rank reads its parts.

    Parameters on the meta device become real ones on the mesh's device; others are written in place.

    Raises:
        FileNotFoundError: if there are no safetensors.
        ValueError: if weights are missing or have other shapes than the model.
    """
    module, state = parallel_module(model), state_of(model)
    files = SafetensorsFolder(Path(folder))
    rank, device = state.communicator.rank, state.mesh.device_type
    sources: dict[str, str] = {}
    missing = []
    for placed in placed_parameters(model):
        source = next((name for name in placed.names if name in files.names), None)
        if source is None:
            missing.append(placed.name)
        else:
            sources[placed.name] = source
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the model's weights: {', '.join(missing[:5])}"
            + (", ..." if len(missing) > 5 else "")
        )
    buffers = _persistent_buffers(module)
    known = {name for placed in placed_parameters(model) for name in placed.names} | {
        name for name, _ in buffers
    }
    unknown = sorted(files.names - known)
    if unknown:
        warnings.warn(f"{folder} has tensors that the model does not: {', '.join(unknown[:5])}", stacklevel=2)
    values: dict[int, torch.Tensor] = {}
    for placed in placed_parameters(model):
        local = files.read(sources[placed.name], placed.layout, rank, placed.parameter.dtype)
        if placed.parameter.is_meta:
            values[id(placed.parameter)] = local.to(device)
        else:
            placed.parameter.data.copy_(local)
    materialise(module, values)
    for name, buffer in buffers:
        if name in files.names:
            buffer.copy_(files.read(name, TensorLayout(tuple(buffer.shape)), rank, buffer.dtype))
