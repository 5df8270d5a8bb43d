"""Attention of sequences that are cut over ranks is that of whole sequences, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import colrow
from colrow.collectives import Communicator, communicator
from colrow.parallel.context import Method, Order, SequenceShare, context_attention
from colrow.parallel.context.block import Block
from tests.pool import Pool

WIDTH = 8


def _world() -> Communicator:
    group = dist.group.WORLD
    assert group is not None
    return communicator(group)


def _inputs(
    length: int, heads: int, groups: int, value_width: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Query, key, value and a gradient of the output, of two whole sequences."""
    generator = torch.Generator().manual_seed(length * 100 + heads * 10 + groups)
    shapes = [(heads, WIDTH), (groups, WIDTH), (groups, value_width), (heads, value_width)]
    return [
        torch.randn((2, count, length, width), generator=generator, dtype=torch.float64).to(dtype)
        for count, width in shapes
    ]


def _whole(inputs: list[Tensor], is_causal: bool, scale: float | None) -> list[Tensor]:
    """Output and gradients on one device."""
    query, key, value = (one.clone().requires_grad_() for one in inputs[:3])
    output = F.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, enable_gqa=True
    )
    return [output.detach(), *torch.autograd.grad(output, (query, key, value), inputs[3])]


def _error_of(
    length: int,
    heads: int,
    groups: int,
    is_causal: bool,
    method: Method | None,
    order: Order,
    value_width: int = WIDTH,
    scale: float | None = None,
) -> float:
    """On a rank: the largest difference of this rank's part of the output and the gradients."""
    inputs = _inputs(length, heads, groups, value_width)
    ranks = _world()
    share = SequenceShare(length, ranks.size, order)
    places = share.places(ranks.rank)
    # not contiguous, as models give them
    query, key, value, gradient = (
        one[:, :, places].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for one in inputs
    )
    output = context_attention(
        query,
        key,
        value,
        ranks,
        share,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=True,
        method=method,
    )
    found = [output, *torch.autograd.grad(output, (query, key, value), gradient)]
    expected = [one[:, :, places] for one in _whole(inputs, is_causal, scale)]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape, (one.shape, other.shape)
    return max(
        float((one - other).abs().max()) if one.numel() else 0.0
        for one, other in zip(found, expected, strict=True)
    )


CASES = [
    # length, heads, key-value heads
    (12, 4, 4),
    (13, 6, 3),  # uneven tokens; groups that do not divide
    (7, 5, 1),
    (23, 4, 2),
    (3, 3, 3),  # pieces without a token
]


def _all_errors(method: Method | None, order: Order) -> dict[str, float]:
    return {
        f"{case} causal={is_causal}": _error_of(*case, is_causal, method, order)
        for case, is_causal in itertools.product(CASES, (True, False))
    }


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("method", ["ulysses", "ring"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_attention_of_whole_sequences(
    ranks: Callable[[int], Pool], size: int, method: Method, order: Order
) -> None:
    """Even and uneven lengths, fewer heads than ranks, fewer tokens than ranks."""
    for errors in ranks(size).run(_all_errors, method, order):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_takes_another_width_of_values_and_a_scale(ranks: Callable[[int], Pool], method: Method) -> None:
    """What no kernel takes is computed by the formula."""
    errors = ranks(3).run(_error_of, 11, 6, 3, True, method, "zigzag", 5, 0.3)
    assert max(errors) < 1e-12


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_formula_is_the_kernel(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the queries come in several chunks."""
    monkeypatch.setattr("colrow.parallel.context.block.QUERIES_PER_CHUNK", 4)
    query, key, value, gradient = _inputs(10, 6, 3, WIDTH)
    block = Block(is_causal, 0.3)
    output, log_sum = block.forward(query, key, value)
    gradients = block.backward(gradient, query, key, value, output, log_sum)
    monkeypatch.setattr("colrow.parallel.context.block._by_cpu_kernel", lambda *_: False)
    by_formula = block.forward(query, key, value)
    torch.testing.assert_close(by_formula, (output, log_sum), rtol=1e-12, atol=1e-12)
    found = block.backward(gradient, query, key, value, *by_formula)
    torch.testing.assert_close(found, gradients, rtol=1e-12, atol=1e-12)


def _half(method: Method) -> tuple[float, float]:
    """In bfloat16: the error of the output and of the gradients, and that of attention on one device."""
    inputs = _inputs(40, 4, 4, WIDTH, torch.bfloat16)
    ranks = _world()
    share = SequenceShare(40, ranks.size, "zigzag")
    places = share.places(ranks.rank)
    query, key, value, gradient = (one[:, :, places].contiguous().requires_grad_() for one in inputs)
    output = context_attention(query, key, value, ranks, share, is_causal=True, method=method)
    found = [output, *torch.autograd.grad(output, (query, key, value), gradient)]
    exact = _whole([one.double() for one in inputs], True, None)
    by_one = _whole(inputs, True, None)

    def error(ones: list[Tensor]) -> float:
        return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ones, exact, strict=True))

    exact_here = [one[:, :, places] for one in exact]
    mine = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact_here, strict=True))
    return mine, error(by_one)


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_half_precision_is_as_exact_as_on_one_device(ranks: Callable[[int], Pool], method: Method) -> None:
    """Blocks are added up in single precision."""
    for mine, by_one in ranks(2).run(_half, method):
        assert mine < 1.5 * by_one


def _is_repeated_to_the_bit(method: Method) -> bool:
    inputs = _inputs(21, 6, 3, WIDTH, torch.float32)
    ranks = _world()
    share = SequenceShare(21, ranks.size, "zigzag")
    places = share.places(ranks.rank)
    results = []
    for _ in range(2):
        given = [one[:, :, places].contiguous().requires_grad_() for one in inputs]
        output = context_attention(
            given[0], given[1], given[2], ranks, share, is_causal=True, enable_gqa=True, method=method
        )
        results.append([output, *torch.autograd.grad(output, given[:3], given[3])])
    return all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_is_deterministic(ranks: Callable[[int], Pool], method: Method) -> None:
    assert all(ranks(3).run(_is_repeated_to_the_bit, method))


def _counts(method: Method) -> tuple[dict[str, int], int]:
    """How often each operation was done, and the bytes that went."""
    inputs = _inputs(12, 4, 2, WIDTH)
    ranks = _world()
    share = SequenceShare(12, ranks.size, "zigzag")
    places = share.places(ranks.rank)
    colrow.reset_comm_stats()
    given = [one[:, :, places].contiguous().requires_grad_() for one in inputs]
    output = context_attention(
        given[0], given[1], given[2], ranks, share, is_causal=True, enable_gqa=True, method=method
    )
    output.backward(given[3])
    found: dict[str, int] = {}
    for (operation, _, _), tally in colrow.comm_stats().tallies.items():
        found[operation] = found.get(operation, 0) + tally.count
    return found, colrow.comm_stats().total.bytes


def test_counts_what_it_moves(ranks: Callable[[int], Pool]) -> None:
    """Ulysses: two exchanges in each pass. Ring: keys and values once in each, their gradients once more."""
    heads, groups, tokens = 4, 2, 4  # tokens of a rank
    per_head = 2 * tokens * WIDTH * 8
    counts, moved = zip(*ranks(3).run(_counts, "ulysses"), strict=True)
    assert all(one == {"all_to_all": 4} for one in counts)
    assert sum(moved) == 3 * 2 * (heads + 2 * groups + heads) * per_head
    counts, moved = zip(*ranks(3).run(_counts, "ring"), strict=True)
    assert all(one == {"shift": 2 + 2 + 3} for one in counts)
    assert set(moved) == {(2 + 2 + 3) * 2 * groups * per_head}


def _refusals() -> list[str]:
    ranks = _world()
    share = SequenceShare(8, ranks.size, "contiguous")
    tokens = share.counts[ranks.rank]
    four, one = torch.zeros(1, 4, tokens, WIDTH), torch.zeros(1, 1, tokens, WIDTH)
    texts = []
    cases: list[tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = [
        ((four, one, one), {"enable_gqa": True, "dropout_p": 0.1}),
        ((four, one, one), {}),
        ((four, four, one), {}),
        ((four[:, :, 1:], four[:, :, 1:], four[:, :, 1:]), {}),
        ((four, four, four), {"method": "tree"}),
    ]
    for given, options in cases:
        with pytest.raises(ValueError) as caught:
            context_attention(*given, ranks, share, **options)
        texts.append(str(caught.value))
    return texts


def test_refuses_what_it_cannot_do(ranks: Callable[[int], Pool]) -> None:
    dropped, grouped, unequal, shorter, unknown = ranks(2).run(_refusals)[0]
    assert "cannot drop attention weights" in dropped
    assert "4 heads do not fit 1 key-value heads" in grouped
    assert "do not fit each other" in unequal
    assert "this rank's share are 4 tokens" in shorter
    assert "'tree'" in unknown


def test_shares_have_every_token_once() -> None:
    for length, size, order in itertools.product(range(12), range(1, 5), ("contiguous", "zigzag")):
        share = SequenceShare(length, size, order)  # type: ignore[arg-type]
        places = [share.places(rank) for rank in range(size)]
        assert tuple(map(len, places)) == share.counts
        assert torch.equal(torch.cat(places).sort().values, torch.arange(length))
        assert max(share.counts) - min(share.counts) <= (1 if order == "contiguous" else 2)
        order_of_parts, place_in_parts = share.to_parts(), share.from_parts()
        if order_of_parts is not None and place_in_parts is not None:
            assert torch.equal(order_of_parts[place_in_parts], torch.arange(length))
