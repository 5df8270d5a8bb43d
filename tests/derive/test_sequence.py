"""What lies between regions cut along the sequence: models over real ranks equal the whole ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import colrow
from colrow.plan import Plan, derive_plan
from colrow.state import state_of
from colrow.trace import Example
from colrow.verify import Report, verify_on_ranks
from tests.apply.comparison import assemble, largest_error
from tests.benchmarks.builders import load
from tests.pool import Pool, worker_mesh

Ranks = Callable[[int], Pool]
WIDTH, FEATURES = 12, 20


def _verified(name: str, ranks: int) -> Report:
    model, inputs = load("listed").build(name)
    examples = {"training" if model.training else "evaluation": Example((), inputs)}
    return verify_on_ranks(model, examples, worker_mesh(ranks), sequence=True)


@pytest.mark.parametrize(
    ("name", "scattered", "whole"),
    [
        ("llama:labels", 4, 0),
        ("gpt2:labels", 4, 0),
        ("bert:labels", 3, 1),
        ("gpt-neox:labels", 2, 0),
        ("t5:labels", 10, 0),
        ("gemma3:labels", 4, 0),
        ("mixtral-loop:labels", 2, 2),
        ("deepseek-v3:labels", 4, 0),
    ],
)
def test_models(ranks: Ranks, name: str, scattered: int, whole: int) -> None:
    report = ranks(2).run(_verified, name, 2, timeout=120)[0]
    report.raise_if_different()
    along = [one.along for one in report.plan.exits]
    assert (len(along) - along.count(None), along.count(None)) == (scattered, whole)
    # another length, that two ranks cannot share evenly, was tried too
    assert any("sequence" in check.stage for check in report.checks)


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("name", ["llama-two-groups:labels", "gpt2"])
def test_uneven_parts(ranks: Ranks, name: str, size: int) -> None:
    report = ranks(size).run(_verified, name, size, timeout=120)[0]
    report.raise_if_different()
    assert all(one.along is not None for one in report.plan.exits)


class Block(nn.Module):
    """Norm, feed-forward and residual, with something done between."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.up, self.down = nn.Linear(WIDTH, FEATURES), nn.Linear(FEATURES, WIDTH)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.tanh(self.up(self.norm(x))))
        y = y * (1.0 + self.scale)  # computed from a parameter, which is none
        match self.between:
            case "cumulative":
                y = y.cumsum(1)
            case "length":
                y = y / y.size(1)
            case "mean":
                y = y - y.mean(1, keepdim=True)
            case "flattened":
                y = y.view(-1, WIDTH).tanh().view(x.shape)
            case "shifted":
                y = y + torch.cat([y[:, :1], y[:, :-1]], 1)
            case "positions":
                y = y * torch.arange(y.size(1), dtype=y.dtype)[None, :, None]
        return x + y


class Mixing(nn.Module):
    """Attention with one head less than nothing to cut: its values are cut inside."""

    def __init__(self, sequence: int) -> None:
        super().__init__()
        self.sequence = sequence
        self.value, self.out = nn.Linear(WIDTH, FEATURES), nn.Linear(FEATURES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.sequence == 0 else x
        weights = (x @ x.transpose(1, 2)).softmax(-1)
        y = self.out(weights @ self.value(x))
        return y.transpose(0, 1) if self.sequence == 0 else y


class Stack(nn.Module):
    """Mixing and feed-forward blocks in turn; the sequence is dimension 1, or 0."""

    def __init__(self, between: str = "", sequence: int = 1, recompute: bool = False, depth: int = 2) -> None:
        super().__init__()
        self.mixing = nn.ModuleList(Mixing(sequence) for _ in range(depth))
        self.blocks = nn.ModuleList(Block(between) for _ in range(depth))
        self.first, self.last = nn.Parameter(torch.rand(WIDTH)), nn.LayerNorm(WIDTH)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.first
        for mixing, block in zip(self.mixing, self.blocks, strict=True):
            h = h + mixing(h)
            h = checkpoint(block, h, use_reentrant=False) if self.recompute else block(h)
        return self.last(h)


def _pair(build: Callable[[], nn.Module], size: int, length: int = 8, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    original = build().double()
    cut = copy.deepcopy(original)
    x = torch.randn(2, length, WIDTH, dtype=torch.float64)
    colrow.parallelize(cut, worker_mesh(size), {"x": x}, **{"sequence": True, **options})
    return original, cut


def _plan(cut: nn.Module) -> Plan:
    plan = state_of(cut).plan
    assert isinstance(plan, Plan)
    return plan


def _same(original: nn.Module, cut: nn.Module, lengths: list[int], together: bool = False) -> None:
    """Results and gradients; with ``together`` all forwards come before all backwards."""
    generator = torch.Generator().manual_seed(2)

    def given(length: int) -> Tensor:
        return torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64)

    work = [(given(length), given(length)) for length in lengths]
    for model in (original, cut):
        waiting = []
        for x, cotangent in work:
            result = model(x)
            waiting.append((result, cotangent))
            if not together:
                result.backward(cotangent)
        for result, cotangent in waiting if together else ():
            result.backward(cotangent)
    with torch.no_grad():
        for x, _ in work:
            assert largest_error(cut(x), original(x)) < 1e-12
    expected = {name: one.grad for name, one in original.named_parameters() if one.grad is not None}
    local = {name: one.grad for name, one in cut.named_parameters() if one.grad is not None}
    assert list(local) == list(expected)
    # what a mean is taken off of loses its bias, whose gradient is zero but for rounding
    floor = 1e-3 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in assemble(cut, local).items():
        assert largest_error(gradient, expected[name], floor) < 1e-10, name


def _blocks(size: int, between: str, sequence: int) -> Plan:
    original, cut = _pair(lambda: Stack(between, sequence), size)
    _same(original, cut, [8, 7, 5])
    return _plan(cut)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("between", "gathered", "left"),
    [
        ("", 0, 0),
        ("flattened", 0, 0),
        ("cumulative", 2, 0),
        ("mean", 2, 0),
        ("shifted", 2, 0),
        # what computes with the length gets the whole from where that length is known
        ("length", 0, 2),
        ("positions", 0, 2),
    ],
)
def test_what_needs_the_whole_gets_it(
    ranks: Ranks, between: str, gathered: int, left: int, size: int
) -> None:
    plan = ranks(size).run(_blocks, size, between, 1)[0]
    assert sum(one.along is not None for one in plan.exits) == 4 - left
    gathers = [one for one in plan.sequence_gathers if one.gradient == "whole" and one.modules != ("",)]
    assert len(gathers) == gathered
    # what a block multiplies its parts with is computed from a parameter
    assert len([one for one in plan.partial_parameters if one.name.endswith(".scale")]) == 2 - left


def test_a_sequence_in_the_first_dimension(ranks: Ranks) -> None:
    plan = ranks(2).run(_blocks, 2, "", 0)[0]
    found = {one.module.split(".")[0]: one.along.dimension for one in plan.exits if one.along is not None}
    assert found == {"mixing": 1, "blocks": 0}


def _recomputed(size: int) -> None:
    original, cut = _pair(lambda: Stack(recompute=True), size)
    _same(original, cut, [8, 7, 9, 6], together=True)
    _same(original, cut, [8, 5])


@pytest.mark.parametrize("size", [2, 3])
def test_recomputation_after_calls_of_other_lengths(ranks: Ranks, size: int) -> None:
    ranks(size).run(_recomputed, size)


def _kept(size: int) -> list[int]:
    """Elements that autograd keeps, without a sequence and with one."""
    found = []
    for sequence in (False, True):
        _, cut = _pair(Stack, size, sequence=sequence)
        parameters = {one.data_ptr() for one in cut.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept, known: set[int] = parameters) -> Tensor:
            if tensor.data_ptr() not in known:
                kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = cut(torch.randn(2, 30, WIDTH, dtype=torch.float64))
        found.append(sum(kept.values()))
        result.sum().backward()
    return found


def test_less_is_kept(ranks: Ranks) -> None:
    without, along = ranks(2).run(_kept, 2)[0]
    assert along < 0.9 * without


def _counted(size: int) -> None:
    _, cut = _pair(Stack, size)
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    colrow.reset_comm_stats()
    cut(x).sum().backward()
    stats = colrow.comm_stats()
    prediction = _plan(cut).prediction
    assert prediction is not None
    for direction in ("forward", "backward"):
        for kind in ("all-reduce", "reduce-scatter", "all-gather"):
            counted = stats.where(operation=kind.replace("-", "_"), phase=direction).count
            predicted = sum(
                one.count
                for one in prediction.collectives
                if (one.mode, one.direction, one.kind) == ("training", direction, kind)
            )
            assert counted == predicted, (direction, kind)


def test_collectives_as_predicted(ranks: Ranks) -> None:
    ranks(2).run(_counted, 2)


def _generated(name: str, size: int) -> list[list[list[int]]]:
    model, inputs = load("listed").build(name)
    model.float().eval()
    original = copy.deepcopy(model)
    colrow.parallelize(model, worker_mesh(size), inputs, sequence=True)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    return [one.generate(inputs["input_ids"], **options).tolist() for one in (model, original)]


def test_fewer_tokens_than_ranks_without_gradients(ranks: Ranks) -> None:
    for found, expected in ranks(3).run(_generated, "llama", 3, timeout=120):
        assert found == expected


def _dropped(size: int) -> list[float]:
    class Dropping(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = x * self.first
            for mixing in self.mixing:
                h = h + self.drop(mixing(h))
            return h

    torch.manual_seed(1)
    model = Dropping().double()
    with torch.no_grad():
        for mixing in model.mixing:
            mixing.out.bias.fill_(1.0)
    x = torch.randn(1, 64, WIDTH, dtype=torch.float64)
    colrow.parallelize(model, worker_mesh(size), {"x": x}, sequence=True)
    assert [one.module for one in _plan(model).randomness] == ["drop"]
    result = model(torch.zeros_like(x))
    # each rank has half of the tokens: the halves would be alike if ranks drew the same numbers
    first, second = result.detach().chunk(2, 1)
    return [(first == second).double().mean().item(), float(result.detach().abs().sum())]


def test_dropout_differs_between_parts(ranks: Ranks) -> None:
    found = ranks(2).run(_dropped, 2)
    assert found[0] == found[1], "what is returned is the same on all ranks"
    assert found[0][0] < 0.8


def _file(folder: str) -> None:
    model, inputs = load("listed").build("gpt2")
    examples = {"evaluation": Example((), inputs)}
    plan = derive_plan(model, examples, 2, sequence=True)
    path = Path(folder) / f"{torch.distributed.get_rank()}.yaml"
    plan.save(path)
    again = Plan.load(path)
    assert again == plan
    without = derive_plan(model, examples, 2)
    assert "to parts of sequence[1]" in without.diff(plan)
    text = plan.explain()
    assert "exit: reduce-scatter forward" in text
    assert "entry: all-gather forward" in text
    report = verify_on_ranks(model, examples, worker_mesh(2), again, steps=1)
    report.raise_if_different()


def test_plans_as_files(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(_file, str(tmp_path))


def test_nothing_to_cut() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, FEATURES), nn.ReLU(), nn.Linear(FEATURES, WIDTH))
    examples = {"training": Example((torch.randn(4, WIDTH),))}
    with pytest.raises(colrow.PlanError, match=r"no sequence can be cut.*Leave sequence=True out"):
        derive_plan(model, examples, 2, sequence=True)
    assert derive_plan(model, examples, 2, sequence="auto") == derive_plan(model, examples, 2)


@pytest.mark.parametrize(("between", "chosen"), [("", True), ("cumulative", False)])
def test_chosen_where_it_communicates_hardly_more(between: str, chosen: bool) -> None:
    examples = {"training": Example((), {"x": torch.randn(2, 64, WIDTH)})}
    plan = derive_plan(Stack(between, depth=6), examples, 2, sequence="auto")
    assert any(one.along is not None for one in plan.exits) == chosen
