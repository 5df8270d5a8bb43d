"""Weights in the layout of the Hugging Face hub: written from shards, read as shards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.apply import parallelize
from colrow.checkpoint.conversion import convert_names
from colrow.checkpoint.meta import materialise, parameters_on_meta
from colrow.checkpoint.reader import SafetensorsFolder
from colrow.checkpoint.shards import BYTES_PER_FILE, Saved, write_global
from colrow.data_shards import cut_like, held, let_go_of_gathered, own_class
from colrow.layout import TensorLayout
from colrow.mesh import size_of
from colrow.plan import HandPlan, Plan
from colrow.state import ParallelState, PlacedParameter, parallel_module, placed_parameters, state_of
from colrow.trace import Example


def save_pretrained(model: nn.Module, folder: str | Path, *, bytes_per_file: int = BYTES_PER_FILE) -> None:
    """Write a parallelized model in its original, global form; every rank calls this.

    The folder loads with plain ``AutoModel...from_pretrained``: names, shapes and dtypes are those of the
    original model, tied weights are written once. No rank holds more than one global tensor at a time.

    Nobody returns before the files are complete: this waits for all ranks of the mesh, replicas along its
    other dimensions included, also if the model was parallelized with a slice of it such as ``mesh["tp"]``.
    A save that fails or is killed leaves the save before it in effect, the new one takes effect as a whole:
    :mod:`colrow.checkpoint.replacement` says how.

    Args:
        model: a parallelized model; with a transformers model its configurations are written too.
        folder: made if it does not exist; an earlier save in it is replaced, other files stay.
        bytes_per_file: begin another file, with an index, when one would grow beyond this.

    Raises:
        ValueError: if safetensors cannot store a tensor's dtype, or the ranks hold different models.
        OSError: if the folder cannot be written. All ranks raise: the writing one its own error, the others
            one that says what it reported.
    """
    module, state = parallel_module(model), state_of(model)
    let_go_of_gathered(module)
    saved = [
        Saved(_saved_name(module, placed), placed.parameter, placed.layout, experts=placed.experts)
        for placed in placed_parameters(module)
        if state.pipeline is None or state.pipeline.is_first_holder(placed.name)
    ]
    saved += [
        Saved(name, buffer, _layout_of_buffer(state, name, buffer))
        for name, buffer in _persistent_buffers(module)
        if state.pipeline is None or state.pipeline.owns_buffer(name)
    ]
    write_global(
        Path(folder),
        "model",
        saved,
        state,
        bytes_per_file=bytes_per_file,
        write_configurations=partial(_save_configurations, module),
    )


def _saved_name(module: nn.Module, placed: PlacedParameter) -> str:
    """Of a tied parameter's names the one that transformers keeps."""
    tied = getattr(module, "_tied_weights_keys", None) or {}
    kept = [name for name in placed.names if name not in tied]
    return (kept or list(placed.names))[0]


def _persistent_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    persistent = module.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in persistent]


def _layout_of_buffer(state: ParallelState, name: str, buffer: torch.Tensor) -> TensorLayout:
    """Those that the plan cuts have one, as parameters have."""
    return state.layouts.get(name) or TensorLayout(tuple(buffer.shape))


def _save_configurations(module: nn.Module, folder: Path) -> None:
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "save_pretrained"):
        return
    parameter = next(module.parameters(), None)
    config.architectures = [own_class(module).__name__]
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
    share: Sequence[float] | None = None,
    pipeline: Mapping[str, Any] | None = None,
    calls: Mapping[str, Example] | None = None,
    **config_options: Any,
) -> nn.Module:
    """A transformers model, parallelized, from a local folder; each rank reads its own parts only.

    Args:
        folder: with ``config.json`` and safetensors.
        mesh: from :func:`colrow.init_mesh`.
        plan: default: derived from how the model computes.
        dtype: of the parameters; default: that of the configuration.
        calls: of the model by mode, from which a plan is derived; default: found by trying.
        pipeline: options of :func:`colrow.pipeline_parallel`, where the mesh has ``pp``.
        share: relative size of each rank's part, for unequal devices; default: balanced.
        config_options: fields of the configuration to change, such as ``attention_dropout=0.1``.

    Returns:
        The model, or the :class:`colrow.Pipeline` that has this rank's stages of it.

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
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"the weights in {folder} are quantized, which only transformers reads: load them there with "
            "dequantize=True in the quantization configuration, and save that model"
        )
    dtype = dtype or config.dtype or torch.float32
    with parameters_on_meta(), _default_dtype(dtype):
        model: nn.Module = model_class(config)
    model.eval()
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)  # type: ignore[assignment]
    from colrow.model import calls_for

    calls = calls or calls_for(model)
    # experts and sequences are found by how the model computes
    has_others = plan is not None and size_of(mesh, "ep") * size_of(mesh, "cp") > 1
    parallelize(model, mesh, plan or calls, share=share, check=calls if has_others else None)
    if size_of(mesh, "pp") > 1:
        from colrow.parallel.pipeline import pipeline_parallel

        model = pipeline_parallel(model, mesh, calls["training"], **(pipeline or {}))
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

    The parameter objects stay, with their hooks and attributes, so that an optimizer may be made before.

    Raises:
        FileNotFoundError: if there are no safetensors.
        ValueError: if weights or persistent buffers are missing or have other shapes than the model, or a
            buffer that no checkpoint holds is on the meta device. The model is unchanged.
    """
    module, state = parallel_module(model), state_of(model)
    files = SafetensorsFolder(Path(folder))
    rank, device = state.communicator.rank, state.mesh.device_type
    targets: list[tuple[tuple[str, ...], torch.Tensor, TensorLayout]] = [
        (one.names, one.parameter, one.layout) for one in placed_parameters(module)
    ]
    buffers = dict(_persistent_buffers(module))
    targets += [((name,), one, _layout_of_buffer(state, name, one)) for name, one in buffers.items()]
    elsewhere = state.pipeline.names if state.pipeline is not None else frozenset()
    if any(files.names.isdisjoint(names) for names, _, _ in targets):
        shapes = {name: layout.shape for names, _, layout in targets for name in names}
        convert_names(module, files, {**dict.fromkeys(elsewhere, ()), **shapes})
    sources = [_source(files, names, layout) for names, _, layout in targets]
    missing = [names[0] for (names, _, _), source in zip(targets, sources, strict=True) if source is None]
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of the model's weights: {_first(missing)}")
    lost = [name for name, one in module.named_buffers() if one.is_meta and name not in buffers]
    if lost:
        raise ValueError(
            f"{len(lost)} buffers are on the meta device, and checkpoints do not hold them: {_first(lost)}. "
            "Build the model in colrow.checkpoint.parameters_on_meta(), which leaves buffers real"
        )
    unknown = sorted(files.names - {name for names, _, _ in targets for name in names} - elsewhere)
    if unknown:
        warnings.warn(f"{folder} has tensors that the model does not: {_first(unknown)}", stacklevel=2)
    for (names, tensor, layout), source in zip(targets, sources, strict=True):
        local = files.read(str(source), layout, rank, tensor.dtype)
        if tensor.is_meta:
            materialise(tensor, local.to(device), names[0])
        else:
            held(tensor.data).copy_(held(cut_like(local.to(device), tensor.data)))


def _source(files: SafetensorsFolder, names: tuple[str, ...], layout: TensorLayout) -> str | None:
    """Under which of a tensor's names the files hold it.

    Raises:
        ValueError: if its shape there is another.
    """
    source = next((name for name in names if name in files.names), None)
    if source is not None:
        files.check_shape(source, layout)
    return source


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
