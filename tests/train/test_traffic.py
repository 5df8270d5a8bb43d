"""The bytes that a run reports, beside those that torch was told to communicate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import colrow
from colrow.train.configuration import MeshConfiguration
from colrow.train.traffic import Traffic
from tests.parallel.experts.models import VOCABULARY, mixtral
from tests.pool import Pool, worker_mesh

_REDUCE_AND_GATHER = ("allreduce_", "_allgather_base_", "_reduce_scatter_base_")


class _Communicated(TorchDispatchMode):
    """Bytes of the largest tensor of each of torch's own collectives, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        if function.namespace == "c10d":
            tensors = [one for one in torch.utils._pytree.tree_leaves(arguments) if isinstance(one, Tensor)]
            name = function._schema.name.removeprefix("c10d::")
            self.bytes[name] += max(one.numel() * one.element_size() for one in tensors)
        return function(*arguments, **(keywords or {}))


def _llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _measured(
    build: Callable[[], nn.Module], mesh: dict[str, Any], micro_batches: int, syncs: bool = True
) -> tuple[dict[str, int], Counter[str], dict[str, int]]:
    """In a worker: what a step is said to communicate, what torch did, and bytes of its parameters."""
    configuration = MeshConfiguration(**mesh)
    shape = {name: size for name, size in mesh.items() if name != "data"}
    ranks = worker_mesh(**{"tp": 1, **shape})
    ids = torch.arange(4 * 6).view(4, 6) % VOCABULARY
    batch = {"input_ids": ids, "labels": ids}
    torch.manual_seed(0)
    model = colrow.parallelize(build(), ranks, batch)
    if configuration.pp > 1:
        model = colrow.pipeline_parallel(model, ranks, batch, micro_batches=2)
    model = colrow.data_parallel(model, ranks, "fsdp" if configuration.data == "fsdp" else "ddp")
    traffic = Traffic(model, ranks, configuration, micro_batches)
    for _ in range(2):  # in the first step torch prepares, too
        model.zero_grad()
        traffic.begin()
        with _Communicated() as communicated:
            for number in range(micro_batches):
                is_last = syncs and number == micro_batches - 1
                with nullcontext() if is_last else colrow.no_gradient_sync(model):
                    if isinstance(model, colrow.Pipeline):
                        model.step(batch)
                    else:
                        model(**batch).loss.backward()
        traffic.end()
    sizes = {name: one.numel() * one.element_size() for name, one in model.named_parameters()}
    return traffic.bytes, communicated.bytes, sizes


@pytest.mark.parametrize(
    ("build", "mesh", "micro_batches"),
    [
        (_llama, {"dp": 2, "data": "fsdp"}, 2),
        (mixtral, {"ep": 2, "data": "ddp"}, 1),
        (mixtral, {"ep": 2, "data": "fsdp"}, 1),
        pytest.param(mixtral, {"ep": 2, "dp": 2, "data": "fsdp"}, 2, marks=pytest.mark.slow),
    ],
)
def test_replicas(
    ranks: Callable[[int], Pool], build: Callable[[], nn.Module], mesh: dict[str, Any], micro_batches: int
) -> None:
    """Experts have no replicas on a mesh of ``ep`` alone, and FSDP gathers what is no layer's once."""
    size = mesh.get("dp", 1) * mesh.get("ep", 1)
    said, done, _ = ranks(size).run(_measured, build, mesh, micro_batches)[0]
    assert said["replicas"] == pytest.approx(sum(done[name] for name in _REDUCE_AND_GATHER), rel=0.02)


def test_experts_and_stages(ranks: Callable[[int], Pool]) -> None:
    """Gradients of replicas are not those of ``ep``; what stages share is sent along ``pp``."""
    mesh = {"pp": 2, "ep": 2}
    averaged, _, sizes = ranks(4).run(_measured, mixtral, mesh, 1)[0]
    apart, _, _ = ranks(4).run(_measured, mixtral, mesh, 1, False)[0]
    assert averaged["ep"] == pytest.approx(apart["ep"], abs=100)  # which gradients there are is told
    assert averaged["replicas"] == sum(size for name, size in sizes.items() if ".experts." not in name)
    embedding = next(size for name, size in sizes.items() if name.endswith("embed_tokens.weight"))
    residual_stream = 4 * 6 * 12 * 8
    assert embedding + residual_stream <= averaged["pp"] < embedding + residual_stream + 200
