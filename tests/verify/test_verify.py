"""Models that are equal are found to be, in every comparison."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.plan import BERT, GPT2, LLAMA, AxisSpec, HandPlan, PredictedCollective, Prediction, column, row
from colrow.trace import Example
from colrow.verify import Check, Report, VerificationError, verify_on_ranks
from tests.pool import Pool, worker_mesh
from tests.verify import models
from tests.verify.planted import changed_reduction

CASES = {
    "llama": (models.llama, LLAMA),
    "qwen3": (models.qwen3, LLAMA),
    "gpt2": (models.gpt2, GPT2),
    "bert": (models.bert, BERT),
}


def _verify(size: int, name: str, options: dict[str, Any]) -> Report:
    build, plan = CASES[name]
    return verify_on_ranks(build, models.tokens(), worker_mesh(size), plan, **options)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_equal(ranks: Callable[[int], Pool], size: int, name: str) -> None:
    reports = ranks(size).run(_verify, size, name, {"steps": 2})
    for report in reports:
        assert report.passed, str(report)
        report.raise_if_different()
        assert [str(check) for check in report.checks] == [str(check) for check in reports[0].checks]
        assert max(check.error for check in report.checks) < 1e-11
        if size in (2, 3):
            assert report.share_cut > 0.8
        compared = {(check.stage, check.kind) for check in report.checks}
        for kind in ("outputs", "gradients"):
            for stage in (
                "training",
                "training, loss alone",
                "training, batch 2 to 3, sequence 9 to 6",
                "step 2",
            ):
                assert (stage, kind) in compared
        assert ("after 2 steps", "parameters") in compared
        assert ("after 2 steps", "replicas") in compared
        names = {
            check.name for check in report.checks if (check.stage, check.kind) == ("training", "outputs")
        }
        assert names == {"loss", "logits"}


def test_single_precision(ranks: Callable[[int], Pool]) -> None:
    for report in ranks(2).run(_verify, 2, "llama", {"steps": 1, "dtype": torch.float32}):
        assert report.passed, str(report)
        # rounding shows, and stays below the tolerance by far
        assert 1e-9 < max(check.error for check in report.checks) < 1e-4


def _share(size: int) -> Report:
    mesh = worker_mesh(size)
    return verify_on_ranks(models.gpt2, models.tokens(), mesh, GPT2, share=[3, 1], steps=0)


def test_shares_of_unequal_devices(ranks: Callable[[int], Pool]) -> None:
    report = ranks(2).run(_share, 2)[0]
    assert report.passed, str(report)
    assert report.plan.axes["mlp"].cut.counts == (31, 10)
    assert not any("step" in check.stage for check in report.checks)


PERCEPTRON = HandPlan(
    axes={"features": AxisSpec()}, styles={"first": column("features"), "second": row("features")}
)


class Features(nn.Module):
    """Vectors in and out, dropout of two kinds, a frozen bias, batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 11)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(11, 5)
        self.norm = nn.BatchNorm1d(5)
        self.second.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.first(x)), 0.5, self.training)
        return self.norm(self.second(self.drop(hidden)))  # type: ignore[no-any-return]


def _modes(size: int) -> Report:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    examples = {"evaluation": Example((x,)), "training": Example(keywords={"x": x + 1})}
    return verify_on_ranks(Features(), examples, worker_mesh(size), PERCEPTRON)


@pytest.mark.parametrize("size", [2, 3])
def test_modes_inputs_and_statistics(ranks: Callable[[int], Pool], size: int) -> None:
    for report in ranks(size).run(_modes, size):
        assert report.passed, str(report)
        by_kind: dict[tuple[str, str], set[str]] = {}
        for check in report.checks:
            by_kind.setdefault((check.stage, check.kind), set()).add(check.name)
        assert "input 0" in by_kind["evaluation", "gradients"]
        assert "input x" in by_kind["training", "gradients"]
        assert "second.bias" not in by_kind["training", "gradients"]
        assert by_kind["training, batch 5 to 6", "outputs"] == {"output"}
        assert by_kind["after 3 steps", "buffers"] == {"norm.running_mean", "norm.running_var"}


class Particular(nn.Module):
    """Takes batches of one size only, and cannot be differentiated by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 11)
        self.second = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 2:
            raise RuntimeError("two rows, please")
        x.mul_(2.0)
        return self.second(self.first(x))  # type: ignore[no-any-return]


def _particular(size: int, rows: int) -> Report:
    return verify_on_ranks(Particular, {"x": torch.ones(rows, 6)}, worker_mesh(size), PERCEPTRON)


def test_what_the_original_refuses_is_not_compared(ranks: Callable[[int], Pool]) -> None:
    report = ranks(2).run(_particular, 2, 2)[0]
    assert report.passed, str(report)
    assert any("no second size was compared" in note and "two rows, please" in note for note in report.notes)
    with pytest.raises(
        AssertionError, match=r"OriginalRaised: the original model raised, training, forward: .*two rows"
    ):
        ranks(2).run(_particular, 2, 3)


def _predicted(size: int, lookups: int) -> Report:
    plan = LLAMA.resolve(models.llama(), size)
    # two layers with two regions each; 2 x 9 tokens of 36 features in double precision, numbers of the loss
    tokens, hidden = 18, 36 * 8
    one = PredictedCollective("training", "forward", "all-reduce", "exit", (2, 9, 36), tokens * hidden, 4)
    collectives = (
        one,
        replace(one, label="lookup", count=lookups),
        replace(one, label="loss", shape=(18,), bytes=tokens * 8, count=1),
        replace(one, label="loss", shape=(18, 2), bytes=tokens * 16, count=1),
        replace(one, direction="backward", label="enter", count=5),
    )
    plan = replace(plan, prediction=Prediction(collectives, (0, ()), (0, ())))
    return verify_on_ranks(models.llama, models.tokens(), worker_mesh(size), plan, steps=0)


def test_predicted_collectives_are_counted(ranks: Callable[[int], Pool]) -> None:
    report = ranks(2).run(_predicted, 2, 1)[0]
    assert report.passed, str(report)
    counted = [check for check in report.checks if check.kind == "collectives"]
    assert [check.name for check in counted] == ["all-reduce backward", "all-reduce forward"]
    report = ranks(2).run(_predicted, 2, 2)[0]
    assert [check.name for check in report.failed] == ["all-reduce forward"]
    assert report.exact
    assert not report.passed
    assert "8 predicted, 7 counted" in str(report)


def _wrong(size: int) -> Report:
    plan = LLAMA.resolve(models.qwen3(), size)
    return verify_on_ranks(
        models.qwen3, models.tokens(), worker_mesh(size), replace(plan, partial_parameters=())
    )


def test_reports_travel_and_print(ranks: Callable[[int], Pool]) -> None:
    report = ranks(2).run(_wrong, 2)[0]
    same = pickle.loads(pickle.dumps(report))
    assert str(same) == str(report)
    assert same.as_dictionary() == report.as_dictionary()
    found = json.loads(json.dumps(report.as_dictionary(), allow_nan=False))
    assert found["passed"] is False
    assert found["difference"]["direction"] == "backward"
    assert len(found["checks"]) == len(report.checks)
    with pytest.raises(VerificationError, match=r"first difference: backward, module model.layers") as caught:
        report.raise_if_different()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(report)
    lines = str(report).splitlines()
    assert any(line.startswith("training: gradients") and line.endswith("DIFFERENT") for line in lines)


def test_nothing_compared_is_nothing_proven() -> None:
    plan = LLAMA.resolve(models.llama(), 1)
    report = Report("M", 1, "float64", plan, 0.0, (), (), None, 0.0, 0.0)
    assert not report.exact
    assert not Check("", "", "", math.nan, 1.0).passed


def _refused(size: int) -> None:
    mesh, tokens = worker_mesh(size), models.tokens()
    with pytest.raises(ValueError, match=r"or torch\.float32"):
        verify_on_ranks(models.llama, tokens, mesh, LLAMA, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="steps must be"):
        verify_on_ranks(models.llama, tokens, mesh, LLAMA, steps=-1)
    with pytest.raises(ValueError, match="share is for plans"):
        verify_on_ranks(models.llama, tokens, mesh, LLAMA.resolve(models.llama(), 2), share=[1, 2])
    with pytest.raises(ValueError, match="give the model's inputs"):
        verify_on_ranks(models.llama, {}, mesh, LLAMA)


def test_arguments_that_cannot_be_used(ranks: Callable[[int], Pool]) -> None:
    ranks(2).run(_refused, 2)


def _verify_steep(size: int, error: float) -> Report:
    x = torch.rand(4, 6, dtype=torch.float64)
    with changed_reduction("exit down", lambda tensor: tensor * (1 + error) if error else tensor):
        return verify_on_ranks(models.Steep, Example((x,)), worker_mesh(size))


def test_steps_after_the_first_are_compared_from_equal_parameters(ranks: Callable[[int], Pool]) -> None:
    for report in ranks(2).run(_verify_steep, 2, 0.0):
        assert report.passed, str(report)
        (note,) = (one for one in report.notes if one.startswith("step 2"))
        assert "step 2: was compared from equal parameters" in note
        assert "in scale of the" in note


def test_steps_from_equal_parameters_hide_no_error(ranks: Callable[[int], Pool]) -> None:
    for report in ranks(2).run(_verify_steep, 2, 1e-6):
        stages = {check.stage for check in report.failed}
        assert {"step 1", "step 2", "step 3"} <= stages
        assert not [note for note in report.notes if "equal parameters" in note]


def _verify_shares(size: int) -> Report:
    return verify_on_ranks(models.Shares, Example((torch.rand(4, 6),)), worker_mesh(size))


def test_gradients_that_are_zero_but_for_rounding(ranks: Callable[[int], Pool]) -> None:
    for report in ranks(2).run(_verify_shares, 2):
        assert report.passed, str(report)


def _complex(size: int) -> Report:
    return verify_on_ranks(models.Filtered, {"x": torch.randn(2, 3, 12)}, worker_mesh(size), steps=2)


def test_complex_weights(ranks: Callable[[int], Pool]) -> None:
    for report in ranks(3).run(_complex, 3):
        assert report.passed, str(report)
        assert report.share_cut > 0.6
