"""Checkpoints whose tensors are not those of the model, as transformers converts them when it loads.

Many of the hub's have one tensor for each expert where the model has one for all, or other names. Which, and
how to make one of the other, transformers knows (``conversion_mapping``); its own converters run here, on
tensors that are read later and in part (:mod:`colrow.checkpoint.stored`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from colrow.checkpoint.reader import SafetensorsFolder
from colrow.checkpoint.stored import as_stored


def convert_names(module: nn.Module, files: SafetensorsFolder, shapes: Mapping[str, Sequence[int]]) -> None:
    """Let ``files`` have the tensors of a model of transformers, made of those that are there.

    Args:
        module: of which the class and the configuration say what is converted; others are left alone.
        files: changed in place; nothing is read yet.
        shapes: global shapes of the model's tensors by name. Any will do for those of other ranks only.

    Raises:
        ValueError: if tensors that are there cannot be converted.
    """
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:  # models of other libraries, or a transformers that converts nothing
        return
    if not isinstance(module, PreTrainedModel):
        return
    mapping = get_model_conversion_mapping(module)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    named = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    pending: dict[str, Any] = {}
    sources: dict[str, list[str]] = {}
    for key in sorted(files.names, key=dot_natural_key):  # experts by their numbers
        if key in named:
            continue
        target, pattern = rename_source_key(key, renamings, converters, module.base_model_prefix, named)
        if target not in named:
            continue
        if pattern is None:
            files.rename(key, target)
            continue
        converter = pending.setdefault(target, copy.deepcopy(by_pattern[pattern]))
        converter.add_tensor(target, key, pattern, files.stored(key))
        sources.setdefault(target, []).append(key)
    parameters = _Parameters(named)
    for target, converter in pending.items():
        try:
            made = converter.convert(target, model=parameters, config=module.config)
        except Exception as error:
            raise ValueError(
                f"{target} cannot be made of {', '.join(sources[target][:3])}"
                f"{' and others' if len(sources[target]) > 3 else ''}: {error}. Load the checkpoint with "
                "transformers and save it with save_original_format=False, in the model's own form"
            ) from error
        tensors = {name: one[0] if isinstance(one, list) else one for name, one in made.items()}
        files.replace(sources[target], {name: as_stored(one) for name, one in tensors.items()})


class _Parameters:
    """What converters ask a model for: shapes of its parameters."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self._named = named

    def get_parameter(self, name: str) -> Tensor:
        return self._named[name]
