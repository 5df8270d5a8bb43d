"""Calls of models whose sequences are cut: results, recomputation, and what is not as in the examples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import colrow
from colrow.parallel.context import ShardedSequence
from tests.apply.comparison import largest_error
from tests.parallel.context.models import (
    VOCABULARY,
    Nano,
    batch_of,
    error_of_gradients,
    llama_ring,
    llama_ulysses,
    mesh_of,
    named,
)
from tests.pool import Pool


def _recomputed(reentrant: bool) -> tuple[float, float]:
    """Two forwards of different lengths before their backwards."""
    original: Any = llama_ring()
    model: Any = llama_ring()
    model.config.use_cache = False
    model = colrow.parallelize(model, mesh_of(cp=2), batch_of(0, 9))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    batches = [batch_of(0, 13), batch_of(1, 10)]
    losses = [model(**batch).loss for batch in batches]
    expected = [original(**batch).loss for batch in batches]
    sum(losses).backward()
    sum(expected).backward()
    return float((losses[0] - expected[0]).detach().abs()), error_of_gradients(model, original)


def test_is_recomputed_with_its_own_tokens(ranks: Callable[[int], Pool]) -> None:
    """Activation checkpointing knows the length of each forward, also after another one."""
    for reentrant in (False, True):
        for loss, gradients in ranks(2).run(_recomputed, reentrant):
            assert loss < 1e-12
            assert gradients < 1e-9


def _results() -> dict[str, Any]:
    mesh = mesh_of(cp=2)
    original, model = llama_ring(), llama_ring()
    batch = batch_of(0, 13)
    mask = torch.ones_like(batch["input_ids"])
    example = {**batch_of(0, 9), "attention_mask": mask[:, :9]}
    model = colrow.parallelize(model, mesh, example)
    output = model(**batch)
    assert isinstance(output.logits, ShardedSequence)
    part = output.logits.local
    assert isinstance(part, Tensor)
    places = output.logits.share.places(mesh.get_local_rank("cp"))
    expected = original(**batch).logits.detach()
    found: dict[str, Any] = {
        "part": largest_error(part.detach(), expected[:, places]),
        "whole": largest_error(output.logits.gather().detach(), expected),
        "with mask": largest_error(model(**batch, attention_mask=mask).loss, original(**batch).loss),
    }
    try:
        output.logits.argmax(-1)
    except AttributeError as error:
        found["message"] = str(error)
    ids = {"input_ids": batch["input_ids"]}
    (model(**ids).logits ** 2).mean().backward()
    (original(**ids).logits ** 2).mean().backward()
    found["own loss"] = error_of_gradients(model, original)
    found["copy"] = float((copy.deepcopy(model)(**batch).loss - output.loss).detach().abs())
    colrow.unshard(model)
    found["unshard"] = float((model(**batch).loss - output.loss).detach().abs())
    return found


def test_gives_results_of_all_tokens(ranks: Callable[[int], Pool]) -> None:
    """With labels on request; without them at once, for a loss of the caller's own."""
    for found in ranks(2).run(_results):
        assert ".local, or .gather()" in found.pop("message")
        assert max(found.values()) < 1e-9, found


def _embedded() -> tuple[float, float]:
    original, model = llama_ring(), llama_ring()
    labels = batch_of(0, 13)["labels"]
    given = torch.randn(2, 13, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = colrow.parallelize(model, mesh_of(cp=2), {"inputs_embeds": given[:, :9], "labels": labels[:, :9]})
    ones = [given.clone().requires_grad_() for _ in range(2)]
    losses = [
        each(inputs_embeds=one, labels=labels).loss for each, one in zip((model, original), ones, strict=True)
    ]
    sum(losses).backward()
    gradients = [one.grad for one in ones]
    assert gradients[0] is not None
    assert gradients[1] is not None
    return float((losses[0] - losses[1]).detach().abs()), largest_error(gradients[0], gradients[1])


def test_gradients_of_arguments_are_whole(ranks: Callable[[int], Pool]) -> None:
    for loss, gradient in ranks(2).run(_embedded):
        assert loss < 1e-12
        assert gradient < 1e-9


class _Centred(Nano):
    """Gives logits less their mean over the tokens, where nothing is to be learned."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits, loss = super().forward(ids, targets)
        return (logits, loss) if targets is not None else (logits - logits.mean(1, keepdim=True), None)


def _message(call: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return "no error"


def _refusals() -> dict[str, str]:
    mesh = mesh_of(cp=2)
    rank, batch = mesh.get_local_rank("cp"), batch_of(0, 12)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 6:] = 0
    example = {**batch_of(0, 9), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    model = colrow.parallelize(llama_ring(), mesh, example)
    found = {
        "batches": _message(lambda: model(**batch_of(rank, 12))),
        "short": _message(lambda: model(**batch_of(0, 3))),
        "padding": _message(lambda: model(**batch, attention_mask=mask)),
        "argument": _message(lambda: model(**batch, position_ids=torch.arange(12)[None])),
    }
    centred = _Centred(heads=2).double()
    colrow.parallelize(centred, mesh, named(centred, batch_of(0, 9)))
    found["course"] = _message(lambda: centred(batch["input_ids"]))
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
    )
    window = colrow.parallelize(MistralForCausalLM(config), mesh, batch_of(0, 9))
    found["window"] = _message(lambda: window(**batch_of(0, 24)))
    found["heads"] = _message(
        lambda: colrow.parallelize(llama_ring(), mesh, batch_of(0, 9), context="ulysses")
    )
    return found


def test_refuses_calls_that_are_not_as_in_the_examples(ranks: Callable[[int], Pool]) -> None:
    """On all ranks alike, before anything is computed."""
    for found in ranks(2).run(_refusals):
        assert "given different batches" in found["batches"]
        assert "1 of 3 tokens" in found["short"]
        assert "attention_mask is not 1 everywhere" in found["padding"]
        assert "position_ids, which it was not in the examples" in found["argument"]
        assert "2 attentions and 0 losses" in found["course"]
        assert "test_calls.py" in found["course"]
        assert "sliding_window" in found["window"]
        assert "Use context='ring'" in found["heads"]


def _positions() -> tuple[float, str]:
    """Recorded with a cache and called without: only then transformers looks for several sequences in one."""
    mesh = mesh_of(cp=2)
    original, model = llama_ulysses(), llama_ulysses()

    def batch(positions: Tensor) -> dict[str, Any]:
        return {**batch_of(0, len(positions)), "position_ids": positions.expand(2, -1).contiguous()}

    colrow.parallelize(model, mesh, batch(torch.arange(9)))
    for one in (original, model):
        one.config.use_cache = False  # type: ignore[union-attr]
    plain = batch(torch.arange(12))
    difference = float((model(**plain).loss - original(**plain).loss).detach().abs())
    # they begin anew where the second rank's tokens begin: each rank sees positions without a break
    return difference, _message(lambda: model(**batch(torch.arange(12) % 6)))


def test_positions_that_begin_anew(ranks: Callable[[int], Pool]) -> None:
    for difference, message in ranks(2).run(_positions):
        assert difference < 1e-12
        assert "position_ids does not count on from token to token" in message
