"""Buffers that a plan cuts are stored whole, as parameters are, and read at any degree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import colrow
from colrow.checkpoint.pretrained import load_weights
from tests.pool import Pool, worker_mesh


class Scaled(nn.Module):
    """A buffer with one number for each hidden feature."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 10), nn.Linear(10, 4)
        self.register_buffer("scale", torch.rand(10))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)) * self.scale)


def _whole() -> Scaled:
    torch.manual_seed(0)
    return Scaled()


def _save(folder: Path) -> None:
    model = colrow.parallelize(_whole(), worker_mesh(2), (torch.rand(3, 4),))
    assert colrow.state_of(model).layouts["scale"].is_sharded
    colrow.save_pretrained(model, folder)


def _load(size: int, folder: Path) -> None:
    """Into a model whose buffer is another."""
    x, original = torch.rand(3, 4), _whole()
    other = _whole()
    other.scale = torch.zeros(10)
    model = colrow.parallelize(other, worker_mesh(size), (x,))
    load_weights(model, folder)
    assert torch.allclose(model(x), original(x), atol=1e-6)


def test_cut_buffers(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    ranks(2).run(_save, tmp_path)
    found, expected = load_file(tmp_path / "model.safetensors"), _whole().state_dict()
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert torch.equal(found[name], one), name
    for size in (1, 3):
        ranks(size).run(_load, size, tmp_path)
