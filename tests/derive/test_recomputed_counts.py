"""Activation checkpointing: what backward passes do again is predicted, and is as little as it can be."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.pool import Pool, worker_mesh

LAYERS = 3


class Block(nn.Module):
    def __init__(self, dropout: float, norm_last: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(7)
        self.up, self.down = nn.Linear(7, 41), nn.Linear(41, 7)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.LayerNorm(7) if norm_last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(x + self.dropout(self.down(torch.tanh(self.up(self.norm(x))))))
        return result


class Blocks(nn.Module):
    """``recompute``: whole blocks, with PyTorch's older and newer form; or a part of the model's own code."""

    def __init__(self, recompute: str, dropout: float = 0.0, norm_last: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.blocks = nn.ModuleList(Block(dropout, norm_last) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        for block in self.blocks:
            assert isinstance(block, Block)
            if self.recompute == "inside":
                x = block.last(x + block.down(checkpoint(partial(_up, block), x, use_reentrant=False)))
            elif self.recompute:
                x = checkpoint(block, x, use_reentrant=self.recompute == "reentrant")
            else:
                x = block(x)
        return x


def _up(block: Block, x: Tensor) -> Tensor:
    return torch.tanh(block.up(block.norm(x)))


def _verify(size: int, build: Callable[[], nn.Module], example: Example, sequence: bool = False) -> Report:
    return verify_on_ranks(build, {"training": example}, worker_mesh(size), steps=1, sequence=sequence)


def _backward(report: Report) -> int:
    """Exits that are predicted for the backward pass."""
    assert report.plan.prediction is not None
    return sum(
        one.count
        for one in report.plan.prediction.collectives
        if one.direction == "backward" and one.label.startswith("exit")
    )


@pytest.mark.parametrize(
    ("build", "again"),
    [
        (partial(Blocks, ""), 0),
        (partial(Blocks, "newer"), 0),  # the sum is the last thing in a block, and nothing keeps it
        (partial(Blocks, "newer", dropout=0.3), LAYERS),
        (partial(Blocks, "newer", norm_last=True), LAYERS),
        (partial(Blocks, "reentrant"), LAYERS),
        (partial(Blocks, "inside", norm_last=True), 0),
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_blocks(ranks: Callable[[int], Pool], size: int, build: Callable[[], nn.Module], again: int) -> None:
    for report in ranks(size).run(_verify, size, build, Example((torch.rand(4, 5, 7),))):
        assert report.passed, str(report)
        assert _backward(report) == again


VOCABULARY = 67


def _llama(reentrant: bool) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=36,
        intermediate_size=41,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        use_cache=False,
    )
    return _recomputing(LlamaForCausalLM(config), reentrant)


def _gpt2(reentrant: bool) -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=36, n_layer=LAYERS, n_head=9, n_positions=32, use_cache=False
    )
    return _recomputing(GPT2LMHeadModel(config), reentrant)


def _recomputing(model: nn.Module, reentrant: bool) -> nn.Module:
    for layer in model.modules():
        if hasattr(layer, "gradient_checkpointing"):
            vars(layer).update(
                gradient_checkpointing=True,
                _gradient_checkpointing_func=partial(checkpoint, use_reentrant=reentrant),
            )
    return model


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(
    ("build", "reentrant", "again"),
    [
        (_llama, False, LAYERS),  # only that of attention: the other one is the block's last
        (_llama, True, 2 * LAYERS),
        (_gpt2, False, 2 * LAYERS),  # dropout keeps what it has dropped
    ],
)
def test_transformers(
    ranks: Callable[[int], Pool],
    build: Callable[[bool], nn.Module],
    reentrant: bool,
    again: int,
    sequence: bool,
) -> None:
    ids = torch.randint(0, VOCABULARY, (2, 9))
    example = Example((), {"input_ids": ids, "labels": ids})
    for report in ranks(2).run(_verify, 2, partial(build, reentrant), example, sequence):
        assert report.passed, str(report)
        if not sequence:
            assert _backward(report) == again
