"""Scaled dot product attention in one operator."""

from __future__ import annotations

from colrow.axes.context import RuleContext
from colrow.axes.registry import rule


@rule(
    "aten.scaled_dot_product_attention",
    "aten._scaled_dot_product_attention_math",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_fused_attention_overrideable",
    linear=["value"],
)
def attention(op: RuleContext) -> None:
    """``query [batch..., heads, queries, features]``, ``key`` and ``value`` likewise.

    With fewer key-value heads, query heads are ``key-value heads x repeats``. Positions of keys and features
    of query and key meet in a softmax; with a causal mask the operator makes itself, so do the queries'.
    """
    query, key, value = (op.dimensions(name) for name in ("query", "key", "value"))
    for a, b, c in zip(query[:-3], key[:-3], value[:-3], strict=True):
        op.unify(a, b)
        op.unify(a, c)
    if len(query) >= 3:
        op.unify(key[-3], value[-3])
        _heads(op)
    op.unify(key[-2], value[-2])
    op.unify(query[-1], key[-1])
    op.block(key[-2], "attention over it")
    op.block(query[-1], "the scores' features")
    if op.argument("is_causal", False):
        op.block(query[-2], "a causal mask over it")
    result = [*query[:-1], value[-1]]
    op.set_output(result)
    bias = op.optional("attn_mask") or op.optional("attn_bias")
    if bias is not None:
        scores = [*query[:-1], key[-2]]
        for factor, tied in zip(reversed(op.dimensions(bias)), reversed(scores), strict=False):
            if factor.size != 1:
                op.unify(factor, tied)
    if op.name in _ONE_WIDTH:
        op.block(value[-1], "a kernel for one width of query, key and value")
    for index, output in enumerate(op.outputs[1:], start=1):
        if len(output.shape) == len(query):
            op.set_output([*query[:-1], key[-2]], index)  # attention weights
        elif len(output.shape) == len(query) - 1:
            rows = query[-2] if output.shape[-1] == query[-2].size else op.atom(output.shape[-1])
            op.set_output([*query[:-2], rows], index)  # logarithms of the sums of exponentials
        else:
            op.set_output(op.atoms(output.shape), index)  # random state


_ONE_WIDTH = (
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_cudnn_attention",
)


def _heads(op: RuleContext) -> None:
    query, key = op.dimensions("query")[-3], op.dimensions("key")[-3]
    if query.size == key.size:
        op.unify(query, key)
        return
    if key.size == 1:
        return
    text = "query heads across key-value heads"
    parts = op.split(query, [key.size, query.size // key.size], text)
    if parts is None:
        op.block(key, text)
    else:
        op.unify(parts[0], key)
