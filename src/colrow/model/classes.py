"""Which of transformers' classes a configuration is for: found through its own automatic mappings."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ORDER = ("CausalLM", "Seq2SeqLM", "MaskedLM", "ImageClassification", "SpeechSeq2Seq", "ImageTextToText")
"""Which automatic class is asked first, ``AutoModelFor...``; then all others as transformers lists them."""


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of models that a configuration describes: the first of :func:`model_classes`.

    Raises:
        ValueError: if transformers has no model for it.
    """
    return model_classes(config)[0]


def model_classes(config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """The classes of models for a configuration, the likeliest first.

    Classes that the configuration itself names; entries of the ``AutoModelFor...`` mappings in :data:`ORDER`,
    where encoder-decoders are sought among the sequence-to-sequence models first and encoders among the
    masked language models; ``AutoModel``; classes of the module that belongs to the configuration's. Those
    that take exactly this configuration come before those that take a part of it.

    Raises:
        ValueError: if transformers has no model for it.
    """
    import transformers

    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    mapped = [found for one in _automatic_classes(config) for found in _of_mapping(one, config)]
    whole = [one for one in mapped if getattr(one, "config_class", None) in (None, type(config))]
    parts = [one for one in mapped if one not in whole]
    found = [
        one
        for one in [*named, *whole, *_classes_of_module(config), *parts]
        if one is not None and one.forward is not nn.Module.forward
    ]
    if not found:
        raise ValueError(
            f"transformers has no model for {type(config).__name__}: it describes a part of another model. "
            "Name the configuration of the whole model"
        )
    return list(dict.fromkeys(found))


def _of_mapping(automatic: Any, config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    try:
        found = automatic._model_mapping.get(type(config), None)
    except (ImportError, ValueError):
        return []
    return list(found) if isinstance(found, list | tuple) else [found] if found is not None else []


def _automatic_classes(config: PreTrainedConfig) -> list[Any]:
    from transformers.models.auto import modeling_auto

    found = {
        name: one
        for name, one in vars(modeling_auto).items()
        if name.startswith("Auto") and hasattr(one, "_model_mapping")
    }
    first = [f"AutoModelFor{name}" for name in ORDER]
    if getattr(config, "is_encoder_decoder", False):
        first.insert(0, "AutoModelForSpeechSeq2Seq")
        first.insert(0, "AutoModelForSeq2SeqLM")
    elif getattr(config, "is_decoder", None) is False:
        first.insert(0, "AutoModelForMaskedLM")
    last = ("AutoModel", "AutoBackbone")
    names = [*first, *(name for name in found if name not in (*first, *last)), *last]
    return [found[name] for name in names if name in found]


def _classes_of_module(config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """Models of the configuration's own folder that take exactly this configuration, the largest first."""
    from transformers import PreTrainedModel

    name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(name)
    except ImportError:
        return []
    found = [
        one
        for one in vars(module).values()
        if isinstance(one, type)
        and issubclass(one, PreTrainedModel)
        and one.__module__ == name
        and getattr(one, "config_class", None) is type(config)
        and "forward" in vars(one)
    ]
    # what is defined last is built of what is defined before
    return found[::-1]
