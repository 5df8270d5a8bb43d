"""Plans written by hand: a module with unusual names, unequal devices, patterns, ties, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import colrow
from colrow.layout import Cut
from colrow.plan import LLAMA, AxisSpec, HandPlan, LossSpec, column, replicated, row, vocab
from tests.apply.comparison import assemble, largest_error
from tests.pool import Pool, worker_mesh


class Loom(nn.Module):
    """Attention with packed [q | k | v] and a mixer packed [gate | up], under names nobody would guess."""

    def __init__(self, size: int, threads: int) -> None:
        super().__init__()
        self.threads, self.width = threads, size
        self.warp = nn.Linear(size, 3 * size)
        self.weft = nn.Linear(size, size)
        self.tension = nn.LayerNorm(size // threads)  # on each head's queries: inside the region
        self.bobbin = nn.Linear(size, 2 * 13)
        self.pedal = nn.Linear(13, size)
        self.comb = nn.LayerNorm(size)

    def forward(self, cloth: Tensor) -> Tensor:
        x = self.comb(cloth)
        q, k, v = self.warp(x).split(self.width, dim=-1)
        q, k, v = (t.view(*t.shape[:-1], self.threads, -1).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(self.tension(q), k, v, is_causal=True)
        cloth = cloth + self.weft(y.transpose(1, 2).flatten(2))
        gate, up = self.bobbin(cloth).chunk(2, dim=-1)
        return cloth + self.pedal(F.silu(gate) * up)


class Mill(nn.Module):
    def __init__(self, threads: int = 5) -> None:
        super().__init__()
        size = 4 * threads
        self.threads = threads
        self.yarn = nn.Embedding(37, size)
        self.looms = nn.ModuleList([Loom(size, threads) for _ in range(2)])
        self.shears = nn.Linear(size, 37)

    def forward(self, ids: Tensor, answers: Tensor | None = None) -> Any:
        cloth = self.yarn(ids)
        for loom in self.looms:
            cloth = loom(cloth)
        logits = self.shears(cloth)
        if answers is None:
            return logits
        # the class dimension in the middle, as F.cross_entropy wants it
        return {
            "loss": F.cross_entropy(logits.transpose(1, 2), answers, label_smoothing=0.1),
            "logits": logits,
        }


MILL = HandPlan(
    axes={"threads": AxisSpec("threads"), "mixer": AxisSpec(), "words": AxisSpec()},
    styles={
        "yarn": vocab("words"),
        "looms.*.warp": column("threads", parts=3),
        "looms.*.tension": replicated(inside="threads"),
        "**.weft": row("threads"),
        "**.bobbin": column("mixer", parts=2),
        "**.pedal": row("mixer"),
        "shears": column("words"),
    },
    attributes={"**.looms.*.threads": "threads", "**.looms.*.width": "threads"},
    loss=LossSpec("shears", axis="words", labels="answers"),
)


def _with_mixer_units(plan: HandPlan) -> HandPlan:
    """A packed dimension has a unit per feature of one part."""
    return HandPlan(
        plan.axes | {"mixer": AxisSpec(13)}, plan.styles, plan.attributes, plan.loss, plan.optional
    )


def _mill(size: int, threads: int, share: list[float] | None) -> dict[str, int]:
    mesh = worker_mesh(size)
    torch.manual_seed(4)
    original = Mill(threads).double()
    model = copy.deepcopy(original)
    plan = _with_mixer_units(MILL).resolve(model, size, share)
    assert "threads" in plan.explain()
    colrow.parallelize(model, mesh, plan)
    generator = torch.Generator().manual_seed(1)
    ids, answers = (torch.randint(37, (3, 6), generator=generator) for _ in range(2))
    answers[0, 0] = -100
    for _ in range(2):
        original.zero_grad()
        model.zero_grad()
        expected = original(ids, answers)
        colrow.reset_comm_stats()
        found = model(ids, answers)  # labels by position
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-12, atol=1e-12)
        expected["loss"].backward()
        found["loss"].backward()
        gradients = assemble(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        for name, parameter in original.named_parameters():
            assert parameter.grad is not None
            assert largest_error(gradients[name], parameter.grad) < 1e-9, name
        with torch.no_grad():
            assert largest_error(model(ids), original(ids)) < 1e-11
    return {
        phase: colrow.comm_stats().where(phase=phase, operation="all_reduce").count
        for phase in ("forward", "backward")
    }


@pytest.mark.parametrize(
    ("size", "threads", "share"),
    [(1, 5, None), (2, 5, None), (3, 5, None), (4, 5, None), (4, 4, None), (3, 7, [3, 3, 2]), (2, 5, [1, 4])],
)
def test_a_module_with_unusual_names(
    ranks: Callable[[int], Pool], size: int, threads: int, share: list[float] | None
) -> None:
    for counts in ranks(size).run(_mill, size, threads, share):
        if size > 1:
            # forward: lookup and 2 exits in each of 2 layers, with labels (and the loss's two) and without.
            # Backward: 2 entries a layer, the inner norms of all layers together, the logits layer's entry
            assert counts == {"forward": (1 + 4 + 2) + (1 + 4), "backward": 2 * 2 + 1 + 1}


def _copied() -> None:
    """A deep copy of a parallelized model computes, and takes gradients, on its own."""
    mesh = worker_mesh(2)
    torch.manual_seed(4)
    model = Mill().double()
    colrow.parallelize(model, mesh, _with_mixer_units(MILL))
    twin = copy.deepcopy(model)
    ids = torch.arange(6).view(1, 6)
    first = model(ids, ids)["loss"]
    second = twin(ids, ids)["loss"]
    assert torch.equal(first, second)
    second.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    first.backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), name
    assert colrow.state_of(twin).plan is colrow.state_of(model).plan


def test_deep_copies(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_copied)


def _refused(plan: HandPlan, model: nn.Module, ranks: int = 2) -> str:
    with pytest.raises(colrow.PlanError) as caught:
        plan.resolve(model, ranks)
    return str(caught.value)


def _plan(**changes: Any) -> HandPlan:
    fields = {
        "axes": MILL.axes | {"mixer": AxisSpec(13)},
        "styles": MILL.styles,
        "attributes": MILL.attributes,
        "loss": MILL.loss,
    }
    return HandPlan(**(fields | changes))  # type: ignore[arg-type]


def test_every_mistake_is_named() -> None:
    model = Mill()
    styles = MILL.styles
    assert "looms.*.wrap: the pattern matches no module" in _refused(
        _plan(styles=styles | {"looms.*.wrap": row("threads")}), model
    )
    assert "looms.0.comb: style 'column' needs a plain linear layer, not LayerNorm" in _refused(
        _plan(styles=styles | {"looms.0.comb": column("threads")}), model
    )
    assert "the axis 'thread' is not among ['threads'" in _refused(
        _plan(styles=styles | {"**.weft": row("thread")}), model
    )
    assert "the units of axis 'threads' are not at 'config.heads'" in _refused(
        _plan(axes=MILL.axes | {"threads": AxisSpec("config.heads")}), model
    )
    assert "20 indices cannot be cut into 7 equal units" in _refused(
        _plan(axes=MILL.axes | {"threads": AxisSpec(7)}), model
    )
    assert "60 features cannot be split into parts in proportion [1, 1, 1, 1, 1, 1, 1]" in _refused(
        _plan(styles=styles | {"looms.*.warp": column("threads", parts=7)}), model
    )
    assert "**.widths: the pattern matches no attribute" in _refused(
        _plan(attributes={"**.widths": "threads"}), model
    )
    assert "no row-parallel layer sums over them" in _refused(
        _plan(styles={key: style for key, style in styles.items() if key != "**.weft"}), model
    )
    every = {name: AxisSpec(spec.units, every_rank=True) for name, spec in _plan().axes.items()}
    message = _refused(_plan(axes=every), model, ranks=40)
    assert "no axis can be cut over 40 ranks" in message
    assert "its 5 units cannot give each of 40 ranks one" in message
    with pytest.raises(colrow.PlanError, match="share has 3 values for 2 ranks"):
        _plan().resolve(model, 2, [1, 1, 1])


def test_tied_parameters_must_be_cut_alike() -> None:
    model = Mill()
    model.shears.weight = model.yarn.weight
    plan = _plan().resolve(model, 2)
    assert plan.parameters["shears.weight"] == plan.parameters["yarn.weight"]
    other = _plan(
        axes=MILL.axes | {"mixer": AxisSpec(13), "others": AxisSpec()},
        styles=MILL.styles | {"yarn": vocab("others")},
    )
    assert "tied to yarn.weight, which is cut differently" in _refused(other, model)


def _llama(heads: int, groups: int) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=211,
                hidden_size=heads * 4,
                intermediate_size=341,
                num_hidden_layers=2,
                num_attention_heads=heads,
                num_key_value_heads=groups,
            )
        )


def test_plan_of_llama_as_data() -> None:
    """On the meta device: nine heads in three groups over two ranks go six and three."""
    plan = LLAMA.resolve(_llama(9, 3), 2)
    assert plan.axes["heads"].cut == Cut((0, 2, 3))
    assert plan.axes["mlp"].cut == Cut((0, 171, 341))
    assert plan.axes["vocab"].cut == Cut((0, 106, 211))
    layouts = {name: plan.tensor_layout(name, tuple(p.shape)) for name, p in _llama(9, 3).named_parameters()}
    prefix = "model.layers.0.self_attn"
    assert [layouts[f"{prefix}.q_proj.weight"].local_shape(rank) for rank in (0, 1)] == [(24, 36), (12, 36)]
    assert [layouts[f"{prefix}.k_proj.weight"].local_shape(rank) for rank in (0, 1)] == [(8, 36), (4, 36)]
    assert [layouts[f"{prefix}.o_proj.weight"].local_shape(rank) for rank in (0, 1)] == [(36, 24), (36, 12)]
    assert not layouts["model.layers.0.input_layernorm.weight"].is_sharded
    assert plan.entries[0].modules == tuple(f"{prefix}.{one}_proj" for one in "qkv")
    assert (len(plan.entries), len(plan.exits), len(plan.lookups)) == (5, 4, 1)


def test_an_axis_with_too_few_units_stays_whole_and_says_so() -> None:
    plan = LLAMA.resolve(_llama(9, 3), 4)
    assert "heads" not in plan.axes
    assert plan.notes == ("axis heads stays whole: its 3 units cannot give each of 4 ranks one",)
    assert plan.notes[0] in plan.explain()
    assert not any("self_attn" in name for name in plan.parameters)
