"""The model: from a transformers configuration by name, or from a local folder."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from colrow.model import calls_for
from colrow.plan import HandPlan, derive_plan
from colrow.train.configuration import MeshConfiguration, ModelConfiguration, Precision

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
"""The dtype of the parameters for each precision."""


def transformers_configuration(model: ModelConfiguration, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The transformers configuration of the model to train, fitted to the tokenizer.

    Raises:
        ValueError: if there is no such configuration or field (the nearest names are given), transformers
            refuses the values, the folder holds no language model, or the vocabulary is too small.
    """
    if model.path is not None:
        configuration = _read_folder(Path(model.path))
    else:
        configuration = _from_fields(model, tokenizer)
    largest = max(tokenizer.get_vocab().values())
    if configuration.vocab_size <= largest:
        raise ValueError(
            f"the model's vocab_size={configuration.vocab_size} is too small for the tokenizer, whose ids go "
            f"up to {largest}: use the model's own tokenizer, or a vocab_size of at least {largest + 1}"
        )
    return configuration


def check_names(model: ModelConfiguration) -> None:
    """What can be said about the model before there is a tokenizer.

    Raises:
        ValueError: if there is no such configuration or field (the nearest names are given), or the folder
            holds no language model.
    """
    if model.path is not None:
        _read_folder(Path(model.path))
    else:
        _check_fields(_find_class(model.config or ""), model.fields)


def check_length(configuration: Any, length: int, what: str) -> None:
    """The model must have a position for each token.

    Raises:
        ValueError: if ``length`` tokens, which ``what`` describes, are more than its positions.
    """
    positions = getattr(configuration, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < length:
        raise ValueError(
            f"{what} of {length} tokens is longer than the model's max_position_embeddings={positions}: "
            "shorten it, or raise the model's field"
        )


def new_model(configuration: Any, dtype: torch.dtype) -> Any:
    """A whole causal language model with random weights from torch's current random numbers.

    Raises:
        ValueError: if the model's class refuses the configuration.
    """
    try:
        return AutoModelForCausalLM.from_config(configuration, dtype=dtype)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
        name = type(configuration).__name__
        raise ValueError(f"no model can be built from this {name}: {_one_line(error)}") from error


def named_plan(name: str | None) -> HandPlan | None:
    """The plan at ``package.module:NAME``; ``None`` if none is named.

    Raises:
        ValueError: if there is no such plan.
    """
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model.plan must be package.module:NAME of a HandPlan; {name}: {error}") from error
    if not isinstance(found, HandPlan):
        raise ValueError(f"model.plan: {name} is a {type(found).__name__}, not a colrow.plan.HandPlan")
    return found


def check_on_meta(
    configuration: Any, plan: HandPlan | None, mesh: MeshConfiguration, checkpoint_activations: bool
) -> int:
    """Build and plan the model without memory, to see that it can be built and cut.

    Args:
        configuration: of transformers.
        plan: how to cut it; ``None``: as follows from how it computes.
        mesh: the ranks.
        checkpoint_activations: whether it is meant to recompute activations.

    Returns:
        Its number of parameters.

    Raises:
        ValueError: if it cannot, or it cannot recompute activations though it is meant to.
        TraceError, PlanError: if it cannot be recorded, or the plan does not fit.
    """
    with torch.device("meta"):
        model = new_model(configuration, torch.float32)
    if checkpoint_activations and not model.supports_gradient_checkpointing:
        raise ValueError(
            f"{type(model).__name__} cannot recompute its layers: set checkpoint_activations: false"
        )
    if plan is not None:
        plan.resolve(model, mesh.tp, mesh.share)
    elif mesh.tp > 1:
        derive_plan(model, calls_for(model), mesh.tp, share=mesh.share)
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """Training needs no keys and values of earlier calls; saving and generating see the model's setting."""
    before = getattr(model.config, "use_cache", None)
    if before is not None:
        model.config.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            model.config.use_cache = before


def _read_folder(path: Path) -> Any:
    if not path.is_dir():
        raise ValueError(f"there is no folder {path} with a model")
    if not (path / "config.json").is_file():
        raise ValueError(f"the folder {path} has no config.json: it must be in Hugging Face layout")
    try:
        configuration = AutoConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers and its validators raise many kinds
        raise ValueError(f"{path}/config.json cannot be used: {_one_line(error)}") from error
    if configuration.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{path} holds a {configuration.model_type} model, which is no causal language model"
        )
    return configuration


def _from_fields(model: ModelConfiguration, tokenizer: PreTrainedTokenizerBase) -> Any:
    check_names(model)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    largest = max(tokenizer.get_vocab().values())
    values = {"vocab_size": largest + 1, **special, "pad_token_id": None, **model.fields}
    try:
        return _find_class(model.config or "")(**values)
    except Exception as error:  # transformers and its validators raise many kinds
        raise ValueError(f"model.fields do not make a {model.config}: {_one_line(error)}") from error


def _find_class(name: str) -> Any:
    classes = [
        class_name
        for model_type, class_name in CONFIG_MAPPING_NAMES.items()
        if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ]
    if name not in classes:
        reason = "no causal language model has the" if hasattr(transformers, name) else "there is no"
        near = difflib.get_close_matches(name, classes, n=3, cutoff=0.5)
        near = near or [one for one in classes if one.lower().startswith(name.lower())]
        raise ValueError(f"model.config: {reason} configuration {name}{_suggest(near)}")
    return getattr(transformers, name)


def _check_fields(kind: type, fields: Iterable[str]) -> None:
    """transformers keeps fields that a configuration does not have without a word."""
    if not dataclasses.is_dataclass(kind):
        return
    valid = {one.name for one in dataclasses.fields(kind)} | {"attn_implementation"}
    valid |= set(getattr(kind, "attribute_map", {}))
    for field in fields:
        if field not in valid:
            near = difflib.get_close_matches(field, valid, n=3, cutoff=0.6)
            raise ValueError(f"model.fields: {kind.__name__} has no field {field}{_suggest(near)}")


def _suggest(names: list[str]) -> str:
    return f"; did you mean {' or '.join(names[:3])}?" if names else ""


def _one_line(error: BaseException) -> str:
    cause = error.__cause__ if error.__cause__ is not None else error
    return " ".join(str(cause).split()) or type(cause).__name__
