"""Guesses where data decides: numbers that fit together, as if tokens were routed evenly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colrow.trace import Trace, TraceError, trace

EXPERTS, CHOSEN, WIDTH, TOKENS = 4, 2, 6, 5


class Experts(nn.Module):
    """A mixture of experts; ``combine(self, x, scores)`` says how tokens get to experts and back."""

    def __init__(self, combine: Callable[..., Tensor]) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self, x, self.router(x).softmax(-1))


def sorted_and_split(self: Experts, x: Tensor, scores: Tensor) -> Tensor:
    """Tokens are sorted by expert and split by how many each one gets."""
    _, chosen = scores.topk(CHOSEN, -1)
    gates = torch.zeros_like(scores).scatter(1, chosen, 1)
    sizes = gates.long().sum(0).tolist()
    order = chosen.flatten().argsort()
    parts = x[order // CHOSEN].split(sizes)
    results = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
    return torch.zeros_like(x).index_add(0, order // CHOSEN, torch.cat(results))


def counted_by_numpy(self: Experts, x: Tensor, scores: Tensor) -> Tensor:
    """As in the first published code of DeepSeek: counts as an array, experts without tokens skipped."""
    chosen = scores.topk(CHOSEN, -1)[1]
    counts = chosen.new_zeros(len(x), EXPERTS)
    counts.scatter_(1, chosen, 1)
    order = chosen.view(-1).argsort()
    picked, start, results = x[order // CHOSEN], 0, []
    for number, count in enumerate(counts.sum(0).cpu().numpy()):
        if count == 0:
            continue
        results.append(self.experts[number](picked[start : start + int(count)]))
        start += int(count)
    return torch.zeros_like(x).index_add(0, order // CHOSEN, torch.cat(results))


def counted_with_bincount(self: Experts, x: Tensor, scores: Tensor) -> Tensor:
    """Where the tokens of an expert end is read number by number."""
    chosen = scores.argmax(-1)
    order = chosen.argsort()
    ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0)
    picked, start, results = x[order], 0, []
    for expert, end in zip(self.experts, ends, strict=True):
        results.append(expert(picked[start : int(end)]))
        start = int(end)
    return torch.cat(results)[order.argsort()]


def looped(self: Experts, x: Tensor, scores: Tensor) -> Tensor:
    """A loop over experts that leaves out those that nobody chose."""
    chosen = scores.topk(CHOSEN, -1)[1]
    result = torch.zeros_like(x)
    for number, expert in enumerate(self.experts):
        mask = (chosen == number).any(-1)
        if mask.any():
            result[mask] += expert(x[mask])
    return result


def traced(combine: Callable[..., Tensor], **options: Any) -> Trace:
    return trace(Experts(combine), (torch.randn(TOKENS, WIDTH),), **options)


@pytest.mark.parametrize("combine", [sorted_and_split, counted_by_numpy, counted_with_bincount, looped])
def test_every_expert_gets_tokens_and_all_tokens_get_experts(combine: Callable[..., Tensor]) -> None:
    with pytest.raises(TraceError, match="needs the data"):
        traced(combine)
    record = traced(combine, routing="guess")
    assert any("guessed" in warning for warning in record.warnings)
    rows = [call.inputs[0][1].shape[0] for call in record.modules if call.path.startswith("experts.")]
    assert len(rows) == EXPERTS
    assert all(rows)
    assert sum(rows) == TOKENS * (1 if combine is counted_with_bincount else CHOSEN)
    assert record.outputs[0][1].shape == (TOKENS, WIDTH)


def test_what_is_guessed_is_not_known() -> None:
    record = traced(looped, routing="guess")
    made = [value for value in record.values if value.producer is not None]
    unknown = [value for value in made if value.dtype == torch.bool]
    assert unknown
    assert all(value.content is None for value in unknown)


def test_a_guess_that_nothing_is_chosen_is_not_made() -> None:
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.linear(x)
            return self.linear(hidden[hidden.sum(-1).isinf()])

    record = trace(Picked(), (torch.randn(TOKENS, WIDTH),), routing="guess")
    assert record.outputs[0][1].shape == (2, WIDTH)
