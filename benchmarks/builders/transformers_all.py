"""Every model type of transformers at small size, in float64.

Names are those of configuration classes with a head, ``LlamaConfig:causal-lm``, or alone, ``SwinConfig``: the
class that transformers lists first for it. With ``:labels`` at the end the model is given labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from colrow.model import calls_for, load

HEADS = {
    "causal-lm": "CausalLM",
    "seq2seq-lm": "Seq2SeqLM",
    "masked-lm": "MaskedLM",
    "image-classification": "ImageClassification",
    "image-text-to-text": "ImageTextToText",
    "speech-seq2seq": "SpeechSeq2Seq",
    "ctc": "CTC",
    "audio-classification": "AudioClassification",
    "object-detection": "ObjectDetection",
    "semantic-segmentation": "SemanticSegmentation",
    "depth-estimation": "DepthEstimation",
    "sequence-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
    "question-answering": "QuestionAnswering",
}
"""What stands for ``AutoModelFor...``."""
MAIN = tuple(HEADS)[:8]
"""Heads that :func:`names` lists; the others can be asked for."""
SEED = 0


def names() -> list[str]:
    """Every configuration class with each of its main heads; alone, if it has none."""
    found = []
    for name, configuration in sorted(_configurations().items()):
        heads = [head for head in MAIN if configuration.model_type in _mapping(head)._model_mapping]
        found += [f"{name}:{head}" for head in heads] or [name]
    return found


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in float64 on the CPU, in training mode if it is given labels, and the keywords of a call.

    Raises:
        KeyError: if there is no such configuration or head, or the model takes no labels.
        ValueError: if there is no small model of it, or no way to call it was found.
    """
    base, *parts = name.split(":")
    mode = "training" if "labels" in parts else "evaluation"
    heads = [part for part in parts if part != "labels"]
    found = load(f"transformers:{base}", device="cpu", shrink=True, seed=SEED)
    model: Any = found.model
    examples = found.examples
    if heads:
        model_class = _model_class(type(model.config), heads[0])
        if model_class is None:
            raise KeyError(f"{base} has no model for {heads[0]}")
        if model_class is not type(model):
            torch.manual_seed(SEED)
            model = model_class(type(model.config).from_dict(model.config.to_dict())).eval()
            examples = calls_for(model, SEED)
    inputs = dict(examples[mode].keywords)
    if mode == "training" and "labels" not in inputs:
        raise KeyError(f"{type(model).__name__} takes no labels")
    if model._can_set_experts_implementation():
        # the default, one product of all groups, has no kernel for float64
        model.set_experts_implementation("batched_mm")
    return model.double().train(mode == "training"), {key: _double(value) for key, value in inputs.items()}


def _double(item: Any) -> Any:
    return item.double() if isinstance(item, Tensor) and item.is_floating_point() else item


def _configurations() -> dict[str, type[PreTrainedConfig]]:
    """Configuration classes by name; those whose modules need what is not installed are left out."""
    found: dict[str, type[PreTrainedConfig]] = {}
    for kind in CONFIG_MAPPING:
        try:
            configuration = CONFIG_MAPPING[kind]
        except ImportError:
            continue
        found[configuration.__name__] = configuration
    return found


def _model_class(configuration: type[PreTrainedConfig], head: str) -> type[PreTrainedModel] | None:
    found = _mapping(head).get(configuration, None)
    return found[0] if isinstance(found, list | tuple) else found


def _mapping(head: str) -> Any:
    """From configuration classes to model classes; by the types' names as long as nothing is imported."""
    return getattr(modeling_auto, f"AutoModelFor{HEADS[head]}")._model_mapping
