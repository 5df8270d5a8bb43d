"""Attention over whole sequences of some heads on each rank, with an all-to-all before and after.

DeepSpeed Ulysses, Jacobs et al. 2023, https://arxiv.org/abs/2309.14509. What goes to a rank are whole groups:
a key-value head with the query heads that read it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from colrow.collectives import AllToAll, Communicator
from colrow.layout import Cut
from colrow.parallel.context.share import SequenceShare

_GROUPS, _TOKENS = 1, 3


def ulysses(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranks: Communicator,
    share: SequenceShare,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    label: str,
) -> Tensor:
    """[batch, heads, this rank's tokens, value width], V.

    Args:
        query: [batch, heads, this rank's tokens, width], V.
        key, value: [batch, key-value heads, this rank's tokens, width or value width], V.
        ranks: the group over which the sequence is cut.
        share: which tokens each rank has.
        attend: attention on whole sequences in their order, of any number of groups but none.
        label: names the exchanges.
    """
    groups, tokens = key.shape[1], share.counts
    repeats = query.shape[1] // groups
    cut = Cut.balanced(groups, ranks.size)
    to_heads = AllToAll(ranks, f"{label} to heads", _GROUPS, cut.counts, _TOKENS, tokens)
    # groups lie together, so that one exchange takes queries, keys and values
    parts = [query.unflatten(1, (groups, repeats)), key.unsqueeze(2), value.unsqueeze(2)]
    if query.shape[-1] == value.shape[-1]:
        whole = _in_order(to_heads(torch.cat(parts, 2)), share)
        queries, keys, values = whole.split([repeats, 1, 1], 2)
    else:
        queries, keys = _in_order(to_heads(torch.cat(parts[:2], 2)), share).split([repeats, 1], 2)
        values = _in_order(to_heads(parts[2]), share)
    # a rank without heads has nothing to attend with, but takes part in the exchanges of both passes
    output = (
        attend(queries.flatten(1, 2), keys.flatten(1, 2), values.flatten(1, 2))
        if cut.count(ranks.rank)
        else values.flatten(1, 2)
    )
    heads = tuple(count * repeats for count in cut.counts)
    to_tokens = AllToAll(ranks, f"{label} to tokens", 2, tokens, 1, heads)
    order = share.to_parts()
    return to_tokens(output if order is None else output.index_select(2, order.to(output.device)))


def _in_order(joined: Tensor, share: SequenceShare) -> Tensor:
    order = share.from_parts()
    return joined if order is None else joined.index_select(_TOKENS, order.to(joined.device))
