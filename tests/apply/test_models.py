"""Hand plans on transformers models: exact at any degree, whatever number of heads, features and ids."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import colrow
from colrow.plan import BERT, GPT2, LLAMA, HandPlan
from tests.apply.comparison import Batch, assemble, compare, largest_error
from tests.apply.double import in_double
from tests.plans import hand_plan
from tests.pool import Pool, worker_mesh

SIZES = [1, 2, 3, 4]
LAYERS = 2


def _llama(heads: int, groups: int, tied: bool, bias: bool = False) -> nn.Module:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=heads * 4,
        intermediate_size=341,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        initializer_range=0.2,
    )
    return _spread(LlamaForCausalLM(config))


def _qwen3() -> nn.Module:
    torch.manual_seed(11)
    config = Qwen3Config(
        vocab_size=211,
        hidden_size=20,
        intermediate_size=41,
        num_hidden_layers=LAYERS,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return _spread(Qwen3ForCausalLM(config))


def _gpt2(heads: int, tied: bool, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(11)
    config = GPT2Config(
        vocab_size=211,
        n_embd=heads * 4,
        n_layer=LAYERS,
        n_head=heads,
        n_inner=341,
        n_positions=64,
        tie_word_embeddings=tied,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
        attn_implementation=attention,
        bos_token_id=1,
        eos_token_id=1,
    )
    return _spread(GPT2LMHeadModel(config))


def _bert(heads: int, tied: bool) -> nn.Module:
    torch.manual_seed(11)
    config = BertConfig(
        vocab_size=211,
        hidden_size=heads * 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        intermediate_size=341,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    return _spread(BertForMaskedLM(config))


def _spread(model: nn.Module) -> nn.Module:
    """Norm weights and biases away from 1 and 0, else an error in them would not show; all in float64."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return in_double(model)


def _causal_batches() -> list[Batch]:
    """Three batches of different shapes; ignored labels; padding on the left."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for rows, length in [(2, 9), (3, 7), (2, 12)]:
        ids = torch.randint(3, 211, (rows, length), generator=generator)
        labels = ids.clone()
        labels[0, :4] = -100
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return batches


CASES: dict[str, tuple[Callable[[], nn.Module], HandPlan]] = {
    "llama 4/4": (partial(_llama, 4, 4, False), LLAMA),
    "llama 5/5 tied": (partial(_llama, 5, 5, True), LLAMA),
    "llama 9/3 tied": (partial(_llama, 9, 3, True), LLAMA),
    "llama 9/3 biases": (partial(_llama, 9, 3, False, True), LLAMA),
    "qwen3 10/5, q and k norms": (_qwen3, LLAMA),
    "gpt2 5 tied": (partial(_gpt2, 5, True), GPT2),
    "gpt2 5 eager": (partial(_gpt2, 5, True, "eager"), GPT2),
    "gpt2 4 untied": (partial(_gpt2, 4, False), GPT2),
    "bert 5 tied": (partial(_bert, 5, True), BERT),
    "bert 4 untied": (partial(_bert, 4, False), BERT),
}


def _case(size: int, name: str) -> dict[str, Any]:
    build, plan = CASES[name]
    return compare(size, build, lambda model: plan, _causal_batches)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_model_equals_the_original(ranks: Callable[[int], Pool], size: int, name: str) -> None:
    for communicated in ranks(size).run(_case, size, name):
        if size == 1:
            assert communicated["total"] == 0
            continue
        # 9/3 heads over 4 ranks: attention stays whole, and so needs no reduction
        regions = LAYERS * (1 if size == 4 and "9/3" in name else 2)
        forward = regions + 1 + 2  # exits; the embedding's lookup; the loss's maximum and sum
        backward = regions + 1  # entries; the logits layer's
        if name.startswith("qwen3"):
            backward += 1  # the norms of queries and keys, all together
        assert communicated["forward"] == forward, communicated["stats"]
        assert communicated["backward"] == backward, communicated["stats"]
        assert communicated["total"] == forward + backward, communicated["stats"]
        if name.startswith("llama"):
            # the last batch has 2 x 12 tokens; the loss sends 1 and then 2 numbers per token
            hidden = 4 * int(name.split()[1].split("/")[0])
            reductions = forward - 2 + backward
            assert communicated["bytes"] == 8 * 24 * (hidden * reductions + 3), communicated["stats"]


def _generation(size: int, name: str) -> list[list[int]]:
    mesh = worker_mesh(size)
    build, plan = CASES[name]
    original, model = build().double().eval(), build().double().eval()
    colrow.parallelize(model, mesh, plan)
    ids = torch.randint(3, 211, (2, 5), generator=torch.Generator().manual_seed(1))
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    expected = original.generate(ids, **options)  # type: ignore[operator]
    found = model.generate(ids, **options)  # type: ignore[operator]
    assert torch.equal(found, expected)
    assert len(set(found[0].tolist())) > 3
    return found.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", ["llama 9/3 tied", "gpt2 5 tied"])
def test_cached_generation_is_identical(ranks: Callable[[int], Pool], size: int, name: str) -> None:
    results = ranks(size).run(_generation, size, name)
    assert all(result == results[0] for result in results)


def _outputs_with_labels() -> None:
    mesh = worker_mesh(2)
    original, model = _llama(4, 4, False).double(), _llama(4, 4, False).double()
    config = model.config
    colrow.parallelize(model, mesh, LLAMA)
    batch = _causal_batches()[0]
    expected, found = original(**batch), model(**batch)
    assert model.config is config
    assert model.config.vocab_size == 211
    assert isinstance(found.logits, colrow.ShardedLogits)
    with pytest.raises(AttributeError, match="were not gathered"):
        found.logits.argmax(-1)
    assert found.logits.local.shape[-1] in (106, 105)
    assert largest_error(found.logits.gather(), expected.logits) < 1e-12
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple[1], colrow.ShardedLogits)
    # labels given by position; a sum over all items instead of a mean, as the Trainer asks for
    torch.testing.assert_close(
        model(**batch, num_items_in_batch=7).loss, original(**batch, num_items_in_batch=7).loss
    )
    # a loss outside of the model, on gathered logits: gradients are the same too
    ids = batch["input_ids"]
    for one in (original, model):
        one.zero_grad()
        logits = one(ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = assemble(model, {name: p.grad for name, p in model.named_parameters()})  # type: ignore[misc]
    for name, parameter in original.named_parameters():
        assert parameter.grad is not None
        assert largest_error(gradients[name], parameter.grad) < 1e-9


def test_outputs_with_labels(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_outputs_with_labels)


def _local_logits() -> None:
    mesh = worker_mesh(2)
    original, model = _llama(4, 4, True).double(), _llama(4, 4, True).double()
    colrow.parallelize(model, mesh, LLAMA, logits="local")
    ids = _causal_batches()[0]["input_ids"]
    logits = model(ids).logits
    loss = colrow.cross_entropy(logits[:, :-1], ids[:, 1:], mesh, vocabulary=211)
    expected = torch.nn.functional.cross_entropy(
        original(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_local_logits(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_local_logits)


def _mixing() -> None:
    """A model that normalises its logits before a loss of its own: a shard would give wrong numbers."""
    mesh = worker_mesh(2)

    class Softmaxed(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
            hidden = self.model(input_ids).last_hidden_state
            logits = self.lm_head(hidden)
            if labels is None:
                return logits
            return torch.nn.functional.nll_loss(logits.softmax(-1).log().flatten(0, 1), labels.flatten())

    plain = _llama(4, 4, False)
    torch.manual_seed(11)
    model = Softmaxed(plain.config)
    colrow.parallelize(model, mesh, LLAMA)
    ids = _causal_batches()[0]["input_ids"]
    assert model(ids).shape[-1] == 211
    with pytest.raises(colrow.PlanError, match="calls softmax"):
        model(ids, ids)
    assert model(ids).shape[-1] == 211  # the error left nothing behind
    assert model.config.vocab_size == 211


def test_a_loss_that_would_be_wrong_is_refused(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_mixing)


def _frozen() -> dict[str, int]:
    """Frozen weights stay frozen; nothing is communicated for gradients that nobody asked for."""
    mesh = worker_mesh(2)
    original, model = _llama(4, 4, False).double(), _llama(4, 4, False).double()
    for one in (original, model):
        one.requires_grad_(False)
        one.model.layers[1].mlp.requires_grad_(True)
    fired = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: fired.append(1))
    colrow.parallelize(model, mesh, hand_plan(model))
    batch = _causal_batches()[0]
    colrow.reset_comm_stats()
    original(**batch).loss.backward()
    model(**batch).loss.backward()
    assert fired
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("layers.1.mlp" in name)
        assert (parameter.grad is not None) == parameter.requires_grad
    found = model.model.layers[1].mlp.down_proj.weight.grad
    rank = colrow.state_of(model).communicator.rank
    layout = colrow.state_of(model).layouts["model.layers.1.mlp.down_proj.weight"]
    expected = original.model.layers[1].mlp.down_proj.weight.grad
    assert largest_error(found, layout.slice(expected, rank)) < 1e-10
    return {"backward": colrow.comm_stats().where(phase="backward").count}


def test_frozen_weights_and_hooks(ranks: Callable[[int], Pool]) -> None:
    # one entry only: the logits layer's. The MLP's own input needs no gradient
    assert ranks(2).run(_frozen) == [{"backward": 1}] * 2


def _ties() -> None:
    mesh = worker_mesh(3)
    model = _llama(9, 3, True)
    colrow.parallelize(model, mesh, LLAMA)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    count = colrow.count_parameters(model)
    assert count.total == sum(p.numel() for p in _llama(9, 3, True).parameters())
    assert count.local == sum(p.numel() for p in model.parameters())
    assert count.local_bytes == 8 * count.local
    assert 0.3 < count.local / count.total < 0.4


def test_ties_and_counts(ranks: Callable[[int], Pool]) -> None:
    ranks(3).run(_ties)


def _errors() -> None:
    mesh = worker_mesh(2)
    model = _llama(4, 4, False)
    with pytest.raises(ValueError, match="has not been parallelized"):
        colrow.clip_grad_norm_(model, 1.0)
    torch.manual_seed(torch.distributed.get_rank())
    different = LlamaForCausalLM(model.config)
    with pytest.raises(colrow.PlanError, match="the ranks hold different weights"):
        colrow.parallelize(different, mesh, LLAMA)
    with pytest.raises(colrow.PlanError, match="the plan is for 3 ranks, the mesh has 2"):
        colrow.parallelize(model, mesh, LLAMA.resolve(model, 3))
    other = _llama(5, 5, False)
    with pytest.raises(colrow.PlanError, match="the plan was made for another model"):
        colrow.parallelize(other, mesh, LLAMA.resolve(model, 2))
    colrow.parallelize(model, mesh, LLAMA)
    with pytest.raises(colrow.PlanError, match="parallelized already"):
        colrow.parallelize(model, mesh, LLAMA)


def test_errors(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_errors)
