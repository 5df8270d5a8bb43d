"""Hand-written plans of three architectures of ``transformers``: examples to learn from and start with."""

from __future__ import annotations

from colrow.plan.hand import AxisSpec, HandPlan, LossSpec, column, replicated, row, vocab

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
