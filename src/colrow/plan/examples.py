"""Hand-written plans of three architectures of ``transformers``: examples to learn from and start with."""

from __future__ import annotations

from torch import nn

from colrow.errors import PlanError
from colrow.plan.hand import AxisSpec, HandPlan, LossSpec, column, replicated, row, vocab
from colrow.plan.plan import Plan

LLAMA = HandPlan(
    axes={
        # a unit is a key-value head with the query heads that read it
        "heads": AxisSpec("config.num_key_value_heads", every_rank=True),
        "mlp": AxisSpec(),
        "vocab": AxisSpec(),
    },
    styles={
        "**.embed_tokens": vocab("vocab"),
        "**.self_attn.{q,k,v}_proj": column("heads"),
        # Qwen 3 normalises each head's queries and keys by one weight for all heads
        "**.self_attn.{q,k}_norm": replicated(inside="heads"),
        "**.self_attn.o_proj": row("heads"),
        "**.mlp.{gate,up}_proj": column("mlp"),
        "**.mlp.down_proj": row("mlp"),
        "lm_head": column("vocab"),
    },
    loss=LossSpec("lm_head"),
    optional=frozenset({"lm_head", "**.self_attn.{q,k}_norm"}),
)
"""Llama and those built like it: Mistral, Qwen 2 and 3, SmolLM2."""

GPT2 = HandPlan(
    axes={
        "heads": AxisSpec("config.num_attention_heads", every_rank=True),
        "mlp": AxisSpec(),
        "vocab": AxisSpec(),
    },
    styles={
        "**.wte": vocab("vocab"),
        "**.attn.c_attn": column("heads", parts=3),
        "**.attn.c_proj": row("heads"),
        "**.mlp.c_fc": column("mlp"),
        "**.mlp.c_proj": row("mlp"),
        "lm_head": column("vocab"),
    },
    attributes={"**.attn.split_size": "heads"},
    loss=LossSpec("lm_head"),
    optional=frozenset({"lm_head"}),
)
"""GPT-2: Conv1D layers with packed queries, keys and values."""

BERT = HandPlan(
    axes={
        "heads": AxisSpec("config.num_attention_heads", every_rank=True),
        "mlp": AxisSpec(),
        "vocab": AxisSpec(),
    },
    styles={
        "**.word_embeddings": vocab("vocab"),
        "**.attention.self.{query,key,value}": column("heads"),
        "**.attention.output.dense": row("heads"),
        "**.layer.*.intermediate.dense": column("mlp"),
        "**.layer.*.output.dense": row("mlp"),
        "cls.predictions.decoder": column("vocab"),
    },
    loss=LossSpec("cls.predictions.decoder"),
    holders=("cls.predictions",),  # its bias is the decoder's, which adds it
    optional=frozenset({"cls.predictions.decoder"}),
)
"""BERT encoders, with or without the masked-language-model head."""

_BY_MODEL_TYPE = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gpt2": GPT2,
    "bert": BERT,
}


def hand_plan(model: nn.Module) -> HandPlan:
    """The example plan for a ``transformers`` model of a known type.

    Raises:
        PlanError: if there is none: write a :class:`HandPlan`.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _BY_MODEL_TYPE:
        raise PlanError(
            "",
            f"there is no hand-written plan for {type(model).__name__} (model type {model_type!r}), "
            f"only for {', '.join(_BY_MODEL_TYPE)}",
            "Write a colrow.plan.HandPlan and pass it.",
        )
    return _BY_MODEL_TYPE[model_type]


def default_plan(model: nn.Module, ranks: int) -> Plan:
    """The example plan of a model over ``ranks`` ranks; on one rank any model has a plan, that cuts nothing.

    Raises:
        PlanError: if there is no example for the model and more than one rank.
    """
    if ranks == 1 and getattr(getattr(model, "config", None), "model_type", None) not in _BY_MODEL_TYPE:
        return Plan(1)
    return hand_plan(model).resolve(model, ranks)
