"""The hand-written example plans by the types of models that tests build."""

from __future__ import annotations

from torch import nn

from colrow.plan import BERT, GPT2, LLAMA, HandPlan

_BY_MODEL_TYPE = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gpt2": GPT2,
    "bert": BERT,
}


def hand_plan(model: nn.Module) -> HandPlan:
    """The example plan for a transformers model of one of these types."""
    return _BY_MODEL_TYPE[model.config.model_type]  # type: ignore[union-attr]
