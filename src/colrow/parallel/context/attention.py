"""Scaled dot product attention of sequences that are cut over ranks."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.collectives import Group, communicator
from colrow.parallel.context.ring import Ring
from colrow.parallel.context.share import SequenceShare
from colrow.parallel.context.ulysses import ulysses

Method = Literal["ulysses", "ring"]


def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Group,
    share: SequenceShare,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    method: Method | None = None,
    label: str = "attention",
) -> Tensor:
    """``F.scaled_dot_product_attention`` of which every rank has the tokens of its share, without a mask.

    Args:
        query: [batch..., heads, this rank's tokens, width], V.
        key, value: [batch..., key-value heads, this rank's tokens, width or value width], V. With three
            dimensions the first counts as heads.
        group: process group, mesh or communicator over which sequences are cut.
        share: which tokens each rank has.
        is_causal: a token attends to those before it in the sequence and itself.
        scale: by which scores are multiplied; default: 1 / square root of the width.
        enable_gqa: there may be fewer key-value heads than heads.
        dropout_p: share of the weights that is dropped; with ``"ulysses"`` only.
        method: ``"ulysses"``: an all-to-all gives each rank whole sequences of some heads, and another one
            returns them. ``"ring"``: keys and values travel from rank to rank. Default: Ulysses where there
            are as many key-value heads as ranks.
        label: names the exchanges in errors and statistics.

    Returns:
        [batch..., heads, this rank's tokens, value width], V.

    Raises:
        ValueError: if shapes, share and group do not fit, or the method cannot drop weights.
    """
    ranks = communicator(group)
    if method is not None and method not in get_args(Method):
        raise ValueError(f"method must be 'ulysses', 'ring' or None, not {method!r}")
    tokens = share.counts[ranks.rank] if share.ranks == ranks.size else -1
    _check(query, key, value, tokens, enable_gqa, label)
    if ranks.size == 1:
        return F.scaled_dot_product_attention(
            query, key, value, None, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (one.to(dtype) for one in (query, key, value))
    shape = (*query.shape[:-1], value.shape[-1])
    query, key, value = (_with_batch(one) for one in (query, key, value))
    if method is None:
        method = "ulysses" if key.shape[1] >= ranks.size else "ring"
    if method == "ulysses":

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            is_grouped = queries.shape[1] != keys.shape[1]
            return F.scaled_dot_product_attention(
                queries, keys, values, None, dropout_p, is_causal, scale=scale, enable_gqa=is_grouped
            )

        return ulysses(query, key, value, ranks, share, attend, label).view(shape)
    if dropout_p:
        raise ValueError(
            f"{label}: ring attention, which serves fewer key-value heads than ranks, cannot drop attention "
            "weights: set the model's attention dropout to 0, or cut sequences over fewer ranks"
        )
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return Ring(ranks, share, is_causal, factor, label).attend(query, key, value).view(shape)


def _with_batch(tensor: Tensor) -> Tensor:
    """[batch, heads, tokens, width]."""
    return tensor.unsqueeze(0) if tensor.dim() == 3 else tensor.flatten(0, -4)


def _check(query: Tensor, key: Tensor, value: Tensor, tokens: int, enable_gqa: bool, label: str) -> None:
    shapes = " ".join(str(list(one.shape)) for one in (query, key, value))
    if not query.dim() == key.dim() == value.dim() >= 3 or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"{label}: query, key and value do not fit each other: {shapes}")
    if key.shape[:-1] != value.shape[:-1] or query.shape[:-3] != key.shape[:-3]:
        raise ValueError(f"{label}: query, key and value do not fit each other: {shapes}")
    if any(one.shape[-2] != tokens for one in (query, key)):
        raise ValueError(
            f"{label}: this rank's share are {tokens} tokens, but query, key and value are {shapes}"
        )
    heads, groups = query.shape[-3], key.shape[-3]
    if heads != groups and not (enable_gqa and groups and heads % groups == 0):
        raise ValueError(
            f"{label}: {heads} heads do not fit {groups} key-value heads (enable_gqa={enable_gqa})"
        )
