"""Tensors that are read in parts have the numbers of those that are read whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from colrow.checkpoint.stored import Box, StoredTensor, as_stored

SHAPE = (3, 4, 5)


def _tensors(reads: list[Box]) -> list[tuple[StoredTensor, Tensor]]:
    def stored(plain: Tensor) -> StoredTensor:
        def read(box: Box) -> Tensor:
            reads.append(box)
            return plain[tuple(slice(low, high) for low, high in box)]

        return StoredTensor(SHAPE, torch.float64, read)

    return [(stored(plain), plain) for plain in (torch.randn(SHAPE, dtype=torch.float64) for _ in range(3))]


MOVES: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "stack": lambda given: torch.stack(given),
    "stack last": lambda given: torch.stack(given, dim=-1),
    "cat": lambda given: torch.cat(given, dim=1),
    "cat of stacks": lambda given: torch.cat([torch.stack(given), torch.stack(given[::-1])], dim=2),
    "chunk": lambda given: torch.chunk(given[0], 2, dim=1)[1].contiguous(),
    "split": lambda given: torch.split(given[0], [1, 3], dim=1)[1],
    "narrow": lambda given: given[0].narrow(2, 1, 3),
    "transpose": lambda given: given[0].transpose(0, 2),
    "permute": lambda given: given[0].permute(2, 0, 1).clone(),
    "matrix": lambda given: given[0].narrow(0, 1, 1).flatten(0, 1).t(),
    "every second": lambda given: given[0][:, ::2],
    "reshape": lambda given: torch.cat(given).reshape(9, 2, 2, 5).transpose(1, 2),
    "sum": lambda given: given[0] + given[1],
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_moves(move: Callable[[list[Tensor]], Tensor]) -> None:
    torch.manual_seed(0)
    pairs = _tensors([])
    expected = move([plain for _, plain in pairs])
    found = as_stored(move([stored for stored, _ in pairs]))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(found.whole(), expected)
    for _ in range(20):
        box = tuple(tuple(sorted(torch.randint(size + 1, (2,)).tolist())) for size in expected.shape)
        assert torch.equal(found.part(box), expected[tuple(slice(*one) for one in box)])


def test_only_what_is_wanted_is_read() -> None:
    reads: list[Box] = []
    first, second, third = (stored for stored, _ in _tensors(reads))
    merged = torch.cat([torch.stack([first, second]), torch.stack([second, third])], dim=1)
    assert isinstance(merged, StoredTensor)
    assert not reads
    merged.part(((1, 2), (2, 4), (0, 4), (1, 3)))
    assert reads == [((2, 3), (0, 4), (1, 3)), ((0, 1), (0, 4), (1, 3))]
