"""Attention of some queries to some keys, with what it takes to put such blocks together.

Blocks over different keys are put together by the logarithms of their sums of exponentials. The backward of
one block is that of the whole attention for its keys, if it is given the whole's output and logarithms.
Numbers are those of torch's own kernels where one gives logarithms; else of the formula, for some queries at
a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_aten: Any = torch.ops.aten

QUERIES_PER_CHUNK = 512
"""The formula's scores are made for so many queries at a time."""

_WIDEST_FLASH = 256


@dataclass(frozen=True)
class Block:
    """How queries attend to keys.

    Attributes:
        is_causal: the n-th query attends to the first n keys only, of which there are as many as queries.
        scale: by which scores are multiplied.
    """

    is_causal: bool
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The output and the logarithms of the sums of exponentials.

        Args:
            query: [batch, heads, queries, width].
            key: [batch, key-value heads, keys, width], at least one key; heads are a multiple of these.
            value: [batch, key-value heads, keys, value width].

        Returns:
            [batch, heads, queries, value width] in the queries' dtype, and [batch, heads, queries] in single
            precision at least.
        """
        if _by_cpu_kernel(query, value):
            output, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, self.is_causal, scale=self.scale
            )
            return output, log_sum
        if _by_flash_kernel(query, value):
            found = _aten._scaled_dot_product_flash_attention(
                query, key, value, 0.0, self.is_causal, False, scale=self.scale
            )
            return found[0], found[1]
        return self._forward_by_formula(query, key, value)

    def backward(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of query, key and value that come from this block.

        Args:
            gradient: of the whole attention's output.
            query, key, value: as given to :meth:`forward`.
            output, log_sum: of the whole attention, of these queries.
        """
        if _by_cpu_kernel(query, value):
            found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, query, key, value, output, log_sum, 0.0, self.is_causal, scale=self.scale
            )
            return found[0], found[1], found[2]
        if _by_flash_kernel(query, value):
            no_seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # nothing is dropped
            found = _aten._scaled_dot_product_flash_attention_backward(
                gradient,
                query,
                key,
                value,
                output,
                log_sum,
                None,
                None,
                query.shape[2],
                key.shape[2],
                0.0,
                self.is_causal,
                no_seed,
                no_seed,
                scale=self.scale,
            )
            return found[0], found[1], found[2]
        return self._backward_by_formula(gradient, query, key, value, output, log_sum)

    # ---------------------------------------------------------------- the formula

    def _forward_by_formula(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(query.dtype)
        grouped = _grouped(query, key.shape[1])
        keys, values = key.to(wide).unsqueeze(2), value.to(wide).unsqueeze(2)
        outputs, sums = [], []
        for first in range(0, grouped.shape[3], QUERIES_PER_CHUNK):
            scores = self._scores(grouped[:, :, :, first : first + QUERIES_PER_CHUNK], keys, first)
            log_sum = scores.logsumexp(-1)
            outputs.append((scores - log_sum.unsqueeze(-1)).exp_() @ values)
            sums.append(log_sum)
        output = torch.cat(outputs, 3).flatten(1, 2).to(query.dtype)
        return output, torch.cat(sums, 3).flatten(1, 2)

    def _backward_by_formula(
        self, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide, groups = wide_dtype(query.dtype), key.shape[1]
        grouped, gradients = _grouped(query, groups), _grouped(gradient, groups).to(wide)
        sums = log_sum.unflatten(1, (groups, -1)).to(wide)
        products = (gradients * _grouped(output, groups).to(wide)).sum(-1)
        keys, values = key.to(wide).unsqueeze(2), value.to(wide).unsqueeze(2)
        of_query = torch.empty_like(grouped, dtype=wide)
        of_key, of_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(value, dtype=wide)
        for first in range(0, grouped.shape[3], QUERIES_PER_CHUNK):
            part = slice(first, first + QUERIES_PER_CHUNK)
            queries, given = grouped[:, :, :, part], gradients[:, :, :, part]
            weights = (self._scores(queries, keys, first) - sums[:, :, :, part, None]).exp_()
            of_value += (weights.mT @ given).sum(2)
            of_scores = (given @ values.mT - products[:, :, :, part, None]) * weights * self.scale
            of_query[:, :, :, part] = of_scores @ keys
            of_key += (of_scores.mT @ queries.to(wide)).sum(2)
        return (
            of_query.flatten(1, 2).to(query.dtype),
            of_key.to(key.dtype),
            of_value.to(value.dtype),
        )

    def _scores(self, queries: Tensor, keys: Tensor, first: int) -> Tensor:
        """[batch, key-value heads, repeats, queries, keys], of the queries from the ``first`` on."""
        scores = (queries.to(keys.dtype) @ keys.mT).mul_(self.scale)
        if self.is_causal:
            rows = torch.arange(first, first + queries.shape[3], device=queries.device)
            columns = torch.arange(keys.shape[3], device=queries.device)
            scores.masked_fill_(columns > rows[:, None], -math.inf)
        return scores


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which blocks are added up: single precision at least."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _grouped(heads: Tensor, groups: int) -> Tensor:
    """[batch, key-value heads, repeats, tokens, width] of [batch, heads, tokens, width]."""
    return heads.unflatten(1, (groups, -1))


def _by_cpu_kernel(query: Tensor, value: Tensor) -> bool:
    return query.is_cpu and query.shape[-1] == value.shape[-1]


def _by_flash_kernel(query: Tensor, value: Tensor) -> bool:
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= _WIDEST_FLASH
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
