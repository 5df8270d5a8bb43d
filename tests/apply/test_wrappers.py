"""Parallelized models inside what others put around them, and in the modes of autograd."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import colrow
from colrow.plan import LLAMA
from tests.apply.comparison import assemble, largest_error
from tests.apply.double import in_double
from tests.pool import Pool, worker_mesh


def _llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=20,
        intermediate_size=33,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=5,
        tie_word_embeddings=True,
    )
    return in_double(LlamaForCausalLM(config))


def _batch(seed: int, rows: int = 2) -> Tensor:
    return torch.randint(61, (rows, 8), generator=torch.Generator().manual_seed(seed))


def _data_parallel() -> None:
    """dp x tp: DDP averages over replicas, colrow clips, AdamW steps; as one process with the whole batch."""
    mesh = worker_mesh(tp=2, dp=2)
    original, model = _llama(), _llama()
    colrow.parallelize(model, mesh, LLAMA)
    wrapped = DistributedDataParallel(model, process_group=mesh.get_group("dp"))
    optimizers = [torch.optim.AdamW(one.parameters(), lr=1e-3) for one in (original, wrapped)]
    replica = mesh.get_local_rank("dp")
    for step in range(3):
        ids = _batch(step, 4)
        expected = original(ids, labels=ids).loss
        own = ids[2 * replica : 2 * replica + 2]
        found = wrapped(own, labels=own).loss
        for loss, optimizer in zip((expected, found), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        ours = colrow.clip_grad_norm_(wrapped, 0.1)
        theirs = nn.utils.clip_grad_norm_(original.parameters(), 0.1)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
        for optimizer in optimizers:
            optimizer.step()
    weights = assemble(model, dict(model.named_parameters()))
    for name, parameter in original.named_parameters():
        assert largest_error(weights[name], parameter.detach()) < 1e-8
    assert colrow.count_parameters(wrapped) == colrow.count_parameters(model)


def test_data_parallel(ranks: Callable[[int], Pool]) -> None:
    ranks(4).run(_data_parallel)


def _compiled(training: bool) -> None:
    mesh = worker_mesh(2)
    plain, model = _llama().train(training), _llama().train(training)
    colrow.parallelize(plain, mesh, LLAMA)
    colrow.parallelize(model, mesh, LLAMA)
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(2):
        ids = _batch(seed)
        if not training:
            with torch.no_grad():
                torch.testing.assert_close(compiled(ids).logits, plain(ids).logits, rtol=1e-9, atol=1e-9)
            continue
        losses = [one(ids, labels=ids).loss for one in (plain, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
        for loss in losses:
            loss.backward()
        for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert largest_error(b.grad, a.grad) < 1e-9, name
        torch.testing.assert_close(colrow.global_grad_norm(compiled), colrow.global_grad_norm(plain))


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compile(ranks: Callable[[int], Pool], training: bool) -> None:
    ranks(2).run(_compiled, training, timeout=240.0)


class Adapter(nn.Module):
    """As PEFT does: holds the model under another name and adds a parameter of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, ids: Tensor) -> Tensor:
        return self.base_model(ids, labels=ids).loss * self.scale  # type: ignore[no-any-return]


def _wrapped() -> None:
    mesh = worker_mesh(2)
    original, model = Adapter(_llama()), Adapter(_llama())
    colrow.parallelize(model.base_model, mesh, LLAMA)
    for one in (original, model):
        one(_batch(0)).backward()
    ours, theirs = colrow.clip_grad_norm_(model, 1.0), nn.utils.clip_grad_norm_(original.parameters(), 1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    assert colrow.count_parameters(model).total == sum(p.numel() for p in original.parameters())
    with pytest.raises(ValueError, match="has not been parallelized"):
        colrow.state_of(nn.Linear(2, 2))


def test_a_wrapper_with_parameters_of_its_own(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_wrapped)


def _modes() -> None:
    mesh = worker_mesh(2)
    original, model = _llama(), _llama()
    colrow.parallelize(model, mesh, LLAMA)
    ids = _batch(0)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-9, atol=1e-9)
        model(ids, labels=ids)
    # gradient accumulation: two forwards before and between backwards
    for one in (original, model):
        first, second = one(ids, labels=ids).loss, one(_batch(1), labels=_batch(1)).loss
        second.backward()
        first.backward()
        for layer in one.model.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = lambda f, *a, **k: checkpoint(f, *a, use_reentrant=True, **k)
        one.train()
        one(ids, labels=ids).loss.backward()
    gradients = assemble(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, parameter in original.named_parameters():
        assert parameter.grad is not None
        assert largest_error(gradients[name], parameter.grad) < 1e-9, name
    # a module's dtype may change afterwards
    model.to(torch.bfloat16)
    assert model(ids).logits.dtype == torch.bfloat16


def test_modes_of_autograd(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_modes)


def _memory() -> int:
    """After a step, and after a forward whose results are gone, no activation is alive."""
    mesh = worker_mesh(2)
    model = _llama()
    colrow.parallelize(model, mesh, LLAMA)
    ids = _batch(0)
    kept = {id(parameter) for parameter in model.parameters()}

    def alive() -> int:
        gc.collect()
        # torch.compile keeps fake tensors of other tests alive
        tensors = [one for one in gc.get_objects() if type(one) is Tensor and one.grad_fn is not None]
        return len([one for one in tensors if id(one) not in kept])

    before = alive()
    model(ids, labels=ids).loss.backward()
    after_step = alive()
    model(ids)
    return max(after_step, alive()) - before


def test_no_activation_is_kept_alive(ranks: Callable[[int], Pool]) -> None:
    assert ranks(2).run(_memory) == [0, 0]


def _optimizers(size: int) -> None:
    """Parameters are plain tensors: every implementation of an optimizer takes them."""
    mesh = worker_mesh(size)
    for make in (
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
        lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True),
    ):
        original, model = _llama(), _llama()
        colrow.parallelize(model, mesh, LLAMA)
        for one in (original, model):
            optimizer = make(one.parameters())
            for seed in range(3):
                optimizer.zero_grad()
                one(_batch(seed), labels=_batch(seed)).loss.backward()
                optimizer.step()
        weights = assemble(model, dict(model.named_parameters()))
        for name, parameter in original.named_parameters():
            assert largest_error(weights[name], parameter.detach()) < 1e-11, name
        colrow.check_replicas(model)


@pytest.mark.parametrize("size", [2, 3])
def test_implementations_of_optimizers(ranks: Callable[[int], Pool], size: int) -> None:
    ranks(size).run(_optimizers, size)
