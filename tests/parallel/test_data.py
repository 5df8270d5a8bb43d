"""Replicas of a cut model train as one model on one device does with all their data."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from transformers import LlamaConfig, LlamaForCausalLM

import colrow
from colrow.checkpoint.pretrained import load_weights
from colrow.parallel.data import Kind
from tests.apply.comparison import largest_error
from tests.apply.double import in_double
from tests.pool import Pool, worker_mesh

VOCABULARY, LENGTH, MICRO_BATCHES, REPLICAS = 61, 9, 2, 2
IGNORED = -100


def _llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=20,
        intermediate_size=33,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=1,  # two ranks share it
        head_dim=4,
        tie_word_embeddings=True,
    )
    return in_double(LlamaForCausalLM(config))


def _batch(step: int) -> tuple[Tensor, Tensor]:
    """Ids and labels of both replicas' micro-batches [replicas, micro-batches, rows, length].

    How many labels count differs between replicas and between micro-batches.
    """
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (REPLICAS, MICRO_BATCHES, 2, LENGTH), generator=generator)
    labels = ids.clone()
    labels[0, 0, :, 3:] = IGNORED
    labels[1, 1, 1] = IGNORED
    return ids, labels


def _mean(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The mean loss, in which ignored labels do not count, and how many do."""
    return model(input_ids=ids, labels=labels).loss, int((labels[:, 1:] != IGNORED).sum())


def _train_whole(model: nn.Module, steps: range, optimizer: torch.optim.Optimizer) -> list[float]:
    """All data on one device, the mean over all tokens; the norms of the gradients."""
    norms = []
    for step in steps:
        ids, labels = (one.flatten(0, 2) for one in _batch(step))
        optimizer.zero_grad()
        _mean(model, ids, labels)[0].backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
    return norms


def _train(model: nn.Module, mesh: DeviceMesh, steps: range, optimizer: torch.optim.Optimizer) -> list[float]:
    replica = mesh.get_local_rank("dp")
    norms = []
    for step in steps:
        ids, labels = (one[replica] for one in _batch(step))
        tokens = int((labels[..., 1:] != IGNORED).sum())
        weight = colrow.token_weight(mesh, tokens)
        optimizer.zero_grad()
        for index in range(MICRO_BATCHES):
            is_last = index == MICRO_BATCHES - 1
            with nullcontext() if is_last else colrow.no_gradient_sync(model):
                mean, count = _mean(model, ids[index], labels[index])
                (mean * count * weight).backward()
        norms.append(float(colrow.clip_grad_norm_(model, 0.1)))
        optimizer.step()
    return norms


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def _optimizer(model: nn.Module, mesh: DeviceMesh, kind: str) -> torch.optim.Optimizer:
    if kind == "zero1":
        groups = [{"params": [one], "lr": 1e-3} for one in model.parameters()]
        return colrow.zero_redundancy_optimizer(groups, torch.optim.AdamW, mesh)
    return _adam(model)


def _cut(kind: Kind) -> tuple[nn.Module, DeviceMesh]:
    mesh = worker_mesh(tp=2, dp=REPLICAS)
    ids = torch.randint(VOCABULARY, (2, LENGTH))
    model = colrow.parallelize(_llama(), mesh, {"input_ids": ids, "labels": ids})
    return colrow.data_parallel(model, mesh, kind), mesh


def _equal(kind: str, folder: Path) -> None:
    whole = _llama()
    reference = _adam(whole)
    model, mesh = _cut("fsdp" if kind == "fsdp" else "ddp")
    optimizer = _optimizer(model, mesh, kind)
    parameters = colrow.count_parameters(model)
    assert parameters.total == sum(one.numel() for one in whole.parameters())
    if kind == "fsdp":
        ranks = 2 * REPLICAS
        assert parameters.local < 1.6 * parameters.total / ranks  # what is whole on tp ranks is small
    expected = _train_whole(whole, range(2), reference)
    found = _train(model, mesh, range(2), optimizer)
    for one, other in zip(found, expected, strict=True):
        assert math.isclose(one, other, rel_tol=1e-9)
    colrow.check_replicas(model)
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        own = sum(one["exp_avg"].numel() for one in optimizer.optim.state.values())
        assert own < 0.7 * parameters.local
    model(input_ids=_batch(0)[0][0, 0])  # leaves what FSDP has gathered for it
    colrow.save_pretrained(model, folder)
    colrow.save_optimizer(model, optimizer, folder / "optimizer")

    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, parameter in whole.named_parameters():
        assert largest_error(saved.get_parameter(name).detach(), parameter.detach()) < 1e-9, name

    if kind == "fsdp":
        with pytest.raises(ValueError, match="FSDP has cut this model's parameters once more"):
            colrow.unshard(model)

    # another model goes on from what was saved
    model, mesh = _cut("fsdp" if kind == "fsdp" else "ddp")
    load_weights(model, folder)
    optimizer = _optimizer(model, mesh, kind)
    colrow.load_optimizer(model, optimizer, folder / "optimizer")
    expected = _train_whole(whole, range(2, 3), reference)
    found = _train(model, mesh, range(2, 3), optimizer)
    assert math.isclose(found[0], expected[0], rel_tol=1e-9)
    colrow.save_pretrained(model, folder)
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, parameter in whole.named_parameters():
        assert largest_error(saved.get_parameter(name).detach(), parameter.detach()) < 1e-9, name


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero1"])
def test_equal_to_one_device(ranks: Callable[[int], Pool], kind: str, tmp_path: Path) -> None:
    ranks(4).run(_equal, kind, tmp_path)


def _means_of_means() -> float:
    """How far off the gradient is if every replica takes the mean over its own tokens."""
    whole, (model, mesh) = _llama(), _cut("ddp")
    ids, labels = _batch(0)
    _mean(whole, ids.flatten(0, 2), labels.flatten(0, 2))[0].backward()
    replica = mesh.get_local_rank("dp")
    _mean(model, ids[replica].flatten(0, 1), labels[replica].flatten(0, 1))[0].backward()
    norm = nn.utils.get_total_norm([one.grad for one in whole.parameters() if one.grad is not None])
    return abs(float(colrow.global_grad_norm(model)) / float(norm) - 1)


def test_the_weights_of_tokens_matter(ranks: Callable[[int], Pool]) -> None:
    assert min(ranks(4).run(_means_of_means)) > 1e-3


def _no_tokens() -> str:
    mesh = worker_mesh(tp=1, dp=2)
    try:
        colrow.token_weight(mesh, 0)
    except ValueError as error:
        return str(error)
    return ""


def test_a_step_without_tokens(ranks: Callable[[int], Pool]) -> None:
    for message in ranks(2).run(_no_tokens):
        assert "all labels are ignored" in message


def _different_replicas(kind: Kind) -> None:
    mesh = worker_mesh(tp=1, dp=2)
    colrow.manual_seed(0, mesh)  # another seed on each replica
    model = colrow.parallelize(nn.Linear(3, 2), mesh, (torch.rand(4, 3),))
    with pytest.raises(colrow.PlanError, match=r"weight: the ranks hold different weights"):
        colrow.data_parallel(model, mesh, kind)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_replicas_of_different_weights(ranks: Callable[[int], Pool], kind: Kind) -> None:
    ranks(2).run(_different_replicas, kind)


def _wrong_calls() -> None:
    mesh = worker_mesh(tp=2, dp=1)
    with pytest.raises(ValueError, match="has not been parallelized"):
        colrow.data_parallel(nn.Linear(2, 2), mesh)
    with pytest.raises(ValueError, match="kind must be 'ddp' or 'fsdp'"):
        colrow.data_parallel(nn.Linear(2, 2), mesh, "zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no dimension dp"):
        colrow.data_parallel(nn.Linear(2, 2), mesh["tp"])
    model = colrow.parallelize(nn.Linear(2, 2), mesh, (torch.rand(4, 2),))
    sharded = colrow.data_parallel(model, mesh, "fsdp")
    with pytest.raises(ValueError, match="FSDP has divided these parameters"):
        colrow.zero_redundancy_optimizer(sharded.parameters(), torch.optim.SGD, mesh, lr=0.1)


def test_wrong_calls(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_wrong_calls)
