"""The comparison with peers: turns and report with systems that only pretend, and a short real run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from benchmarks.peers.group import SystemFailure, worker_environment
from benchmarks.peers.report import Spread, details, markdown, ratio, results
from benchmarks.peers.rounds import LOSS_STEPS, UNCOUNTED, Outcome, Turn, run_case
from benchmarks.peers.shapes import DTYPES, SHAPES, Case
from benchmarks.peers.systems import PROGRAMS, System
from benchmarks.peers.systems.counting import counted
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.pool import Pool, worker_mesh

ROOT = Path(__file__).parents[2]
CASE = Case(SHAPES["tiny"], "fp32", 2)
FIELDS = ["median_ms", "cpu_ms", "peak_mb", "bytes", "collectives", "error"]


def systems(*names: str) -> list[System]:
    return [System.parse(name) for name in names]


class Pretended:
    """A system that answers at once; writes down what it was asked into a log that all share."""

    def __init__(self, name: str, log: list[str], loss: float, milliseconds: list[float], fails: str) -> None:
        self.name, self.log, self.loss, self.fails = name, log, loss, fails
        self.milliseconds = iter(milliseconds)
        self.closed = False

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        count = arguments.get("count")
        self.log.append(f"{self.name} {do}" + (f" {count}" if count else ""))
        if do == self.fails or (self.fails == "turn" and count not in (None, LOSS_STEPS)):
            raise SystemFailure("it broke")
        if do == "build":
            return [{"notes": []}] * 2
        if do == "report":
            return [
                {"peak_mb": 5.0, "collectives": 2, "bytes": 64},
                {"peak_mb": 7.0, "collectives": 2, "bytes": 64},
            ]
        assert count is not None
        step = 0.0 if count == LOSS_STEPS else next(self.milliseconds) / 1e3
        # the first step of a turn is slow, and the second rank is the slower one
        first = {"seconds": [9.0] + [step / 2] * (count - 1), "cpu_seconds": [9.0] + [0.002] * (count - 1)}
        second = {"seconds": [9.0] + [step] * (count - 1), "cpu_seconds": [9.0] + [0.004] * (count - 1)}
        common = {"cpu_total": 0.0, "losses": [self.loss] * count}
        return [first | common, second | common]

    def printed(self, start: str) -> list[str]:
        return [f"{start}something chosen"] if self.name.startswith("colrow") else []

    def close(self) -> None:
        self.closed = True


def pretend(
    names: list[str],
    rounds: int,
    *,
    losses: dict[str, float] | None = None,
    times: dict[str, list[float]] | None = None,
    fails: dict[str, str] | None = None,
) -> tuple[dict[str, Outcome], list[str], dict[str, Pretended]]:
    log: list[str] = []
    made: dict[str, Pretended] = {}

    def start(system: System, case: Case) -> Pretended:
        name = system.name
        made[name] = Pretended(
            name,
            log,
            (losses or {}).get(name, 2.0),
            (times or {}).get(name, [10.0] * rounds),
            (fails or {}).get(name, ""),
        )
        return made[name]

    outcomes = run_case(CASE, systems(*names), rounds, 4, start, lambda text: None)
    return outcomes, log, made


def test_turns_are_interleaved_and_each_round_begins_with_another_system() -> None:
    _, log, made = pretend(["single_1_thread", "colrow", "dtensor"], 3)
    turns = [entry.split()[0] for entry in log if entry.endswith(f"steps {4 + UNCOUNTED}")]
    assert turns == [
        *("single_1_thread", "colrow", "dtensor"),
        *("colrow", "dtensor", "single_1_thread"),
        *("dtensor", "single_1_thread", "colrow"),
    ]
    assert log[:6:2] == ["single_1_thread build", "colrow build", "dtensor build"]
    assert log[1:6:2] == [f"{name} steps {LOSS_STEPS}" for name in ("single_1_thread", "colrow", "dtensor")]
    assert all(one.closed for one in made.values())


def test_a_turn_is_the_slowest_rank_without_its_first_step() -> None:
    outcomes, *_ = pretend(["colrow"], 2, times={"colrow": [10.0, 20.0]})
    assert [turn.milliseconds for turn in outcomes["colrow"].turns] == pytest.approx([10.0, 20.0])
    assert outcomes["colrow"].turns[0].cpu_milliseconds == pytest.approx(3.0)  # the ranks' mean
    assert (outcomes["colrow"].peak_mb, outcomes["colrow"].collectives, outcomes["colrow"].bytes) == (
        7.0,
        2,
        64,
    )


@pytest.mark.parametrize("when", ["build", "turn", "report"])
def test_a_system_that_fails_loses_only_itself(when: str) -> None:
    outcomes, _, made = pretend(["single_1_thread", "megatron", "colrow"], 3, fails={"megatron": when})
    assert outcomes["megatron"].error == "it broke"
    assert made["megatron"].closed
    assert len(outcomes["megatron"].turns) == (3 if when == "report" else 0)
    for name in ("single_1_thread", "colrow"):
        assert outcomes[name].error == ""
        assert len(outcomes[name].turns) == 3
    if when != "report":
        assert results({CASE: outcomes})["tiny"]["megatron"] == {
            **dict.fromkeys(FIELDS),
            "error": "it broke",
        }


@pytest.mark.parametrize(
    ("loss", "same"), [(2.0, True), (2.0001, True), (2.001, False), (1.999, False), (math.nan, False)]
)
def test_other_losses_are_a_different_model(loss: float, same: bool) -> None:
    outcomes, *_ = pretend(["colrow", "single_1_thread", "dtensor"], 1, losses={"dtensor": loss})
    said = outcomes["dtensor"].error
    assert (said == "") == same
    assert outcomes["colrow"].error == outcomes["single_1_thread"].error == ""
    if not same:
        assert said.startswith("different model: loss ")
        assert "that of single_1_thread is 2.000000" in said
        assert results({CASE: outcomes})["tiny"]["dtensor"]["median_ms"] == pytest.approx(10.0)
        assert "- dtensor *: different model" in markdown({CASE: outcomes}, {})


def test_a_reference_that_is_wrong_does_not_pass_for_right() -> None:
    outcomes, *_ = pretend(["colrow", "single_1_thread"], 1, losses={"single_1_thread": math.nan})
    assert all(outcome.error.startswith("different model") for outcome in outcomes.values())


def test_the_limit_may_have_any_loss() -> None:
    outcomes, *_ = pretend(["single_1_thread", "limit"], 1, losses={"limit": 5.0})
    assert outcomes["limit"].error == ""


def test_ratios_are_taken_round_by_round() -> None:
    slow = [10.0, 20.0, 40.0, 10.0, 10.0]  # a machine that is slow for a while slows both
    outcomes, *_ = pretend(
        ["colrow", "dtensor"], 5, times={"colrow": slow, "dtensor": [2.0 * one for one in slow[:4]] + [50.0]}
    )
    spread = ratio(outcomes["colrow"], outcomes["dtensor"])
    assert spread is not None
    assert (spread.median, spread.low, spread.high) == pytest.approx((0.5, 0.5, 0.5))
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    text = markdown({CASE: outcomes}, {"cores": 2})
    assert "| colrow / it |" in text
    assert "- colrow: something chosen" in text
    assert "0.50 (0.50-0.50)" in text


def test_results_have_one_form() -> None:
    outcomes, *_ = pretend(list(PROGRAMS), 2)
    found = results({CASE: outcomes})
    assert list(found) == ["tiny"]
    assert list(found["tiny"]) == list(PROGRAMS)
    for numbers in found["tiny"].values():
        assert list(numbers) == FIELDS
        assert numbers == {
            "median_ms": pytest.approx(10.0),
            "cpu_ms": pytest.approx(3.0),
            "peak_mb": 7.0,
            "bytes": 64,
            "collectives": 2,
            "error": None,
        }
    everything = json.loads(json.dumps(details({CASE: outcomes}, {"cores": 2})))
    assert everything["cases"]["tiny"]["systems"]["colrow"]["ratio_to"]["limit"]["median"] == pytest.approx(
        1.0
    )


def test_variants_of_colrow_have_columns_of_their_own() -> None:
    outcomes, *_ = pretend(["colrow", "colrow[COLROW_GEMM=mkl]", "dtensor"], 2)
    head = next(line for line in markdown({CASE: outcomes}, {}).splitlines() if line.startswith("| system"))
    assert "| colrow / it | colrow[COLROW_GEMM=mkl] / it |" in head


def test_a_busy_machine_is_admitted() -> None:
    outcome = Outcome(turns=[Turn(1.0, 1.0, 0.4), Turn(1.0, 1.0, 0.2)])
    assert "other programs took 30% of the cores" in markdown({CASE: {"colrow": outcome}}, {})
    quiet = Outcome(turns=[Turn(1.0, 1.0, 0.01)])
    assert "Not quiet" not in markdown({CASE: {"colrow": quiet}}, {})


def test_names_of_systems() -> None:
    variant = System.parse("colrow[COLROW_GEMM=mkl,COLROW_TRANSPORT=gloo]")
    assert variant.settings == (("COLROW_GEMM", "mkl"), ("COLROW_TRANSPORT", "gloo"))
    given = worker_environment(variant, 1, 4321, CASE, {"FROM": "all"})
    assert (given["COLROW_GEMM"], given["RANK"], given["WORLD_SIZE"], given["FROM"]) == (
        "mkl",
        "1",
        "2",
        "all",
    )
    alone = worker_environment(System.parse("single_2_threads"), 0, 4321, CASE, {})
    assert alone["OMP_NUM_THREADS"] == "2"
    for wrong in ("collrow", "colrow[COLROW_GEMM]", "colrow[=mkl]", "colrow]"):
        with pytest.raises(ValueError, match=r"there is no system|settings are written as"):
            System.parse(wrong)


def test_cases_have_names_of_their_own() -> None:
    cases = [Case(shape, dtype, tp) for shape in SHAPES.values() for dtype in DTYPES for tp in (2, 4)]
    assert len({case.key for case in cases}) == len(cases)
    assert Case(SHAPES["gpt"], "fp32", 2).key == "gpt"
    assert Case(SHAPES["gpt"], "bf16", 4).key == "gpt-bf16-tp4"
    for case in cases:
        assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
    assert {SHAPES[name].tokens for name in ("gpt_64", "llama_64")} == {64}
    assert SHAPES["tiny"].tokens == 8


def _count(size: int) -> list[tuple[int, int]]:
    """What is counted of some collectives on this rank, as (collectives, bytes)."""
    mesh = worker_mesh(size)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    x = torch.ones(4, 8)
    found = []
    with counted() as moved:
        dist.all_reduce(x)
        dist.barrier()
        dist.all_reduce(x, group=alone)  # reaches nobody
    found.append((moved.collectives, moved.bytes))
    with counted() as moved:
        dist.all_gather_into_tensor(x.new_empty(4 * size, 8), x)
        dist.reduce_scatter_tensor(x.new_empty(4, 8), x.repeat(size, 1))
    found.append((moved.collectives, moved.bytes))
    sharded = distribute_tensor(torch.ones(4 * size, 8, requires_grad=True), mesh["tp"], [Shard(0)])
    with counted() as moved:
        (sharded.redistribute(placements=[Replicate()]) * 2).to_local().sum()
    found.append((moved.collectives, moved.bytes))
    return found


def test_collectives_of_all_kinds_are_counted_once(ranks: Callable[[int], Pool]) -> None:
    whole = 4 * 8 * 4
    for size in (2, 3):
        for found in ranks(size).run(_count, size):
            assert found == [(1, whole), (2, 2 * size * whole), (1, size * whole)]


@pytest.mark.slow
def test_a_short_run(tmp_path: Path) -> None:
    """The real program on the smallest model, with what is installed for the tests."""
    command = [sys.executable, str(ROOT / "benchmarks" / "peers" / "run.py"), "--existing"]
    command += ["--out", str(tmp_path / "out"), "--folder", str(tmp_path / "folder"), "--shapes", "tiny"]
    command += ["--dtype", "fp32", "--tp", "2", "--rounds", "2", "--steps", "2"]
    names = ["colrow", "dtensor", "single_1_thread", "limit"]
    done = subprocess.run([*command, "--systems", *names], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found) == ["tiny"]
    assert list(found["tiny"]) == names
    for numbers in found["tiny"].values():
        assert list(numbers) == FIELDS
        assert numbers["error"] is None
        assert numbers["median_ms"] > 0
        assert numbers["cpu_ms"] > 0
        assert 0 < numbers["peak_mb"] < 500
    # 4 layers with 2 exits and 2 entries, embedding, logits layer, and the loss's two
    assert found["tiny"]["colrow"]["collectives"] == 20
    assert found["tiny"]["colrow"]["bytes"] > 18 * 8 * 64 * 4
    assert found["tiny"]["dtensor"]["collectives"] == 33  # one for each column-parallel layer's backward
    for name in ("single_1_thread", "limit"):
        assert (found["tiny"][name]["collectives"], found["tiny"][name]["bytes"]) == (0, 0)
    everything = json.loads((tmp_path / "out" / "details.json").read_text())
    measured = everything["cases"]["tiny"]["systems"]
    losses = {name: measured[name]["losses"] for name in names}
    assert losses["colrow"] == pytest.approx(losses["single_1_thread"], rel=1e-5)
    assert losses["limit"] != pytest.approx(losses["single_1_thread"], rel=1e-2)  # so the comparison can fail
    assert len(measured["colrow"]["turns"]) == 2
    assert (tmp_path / "out" / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert any("ranks communicate" in note for note in measured["colrow"]["notes"])
    text = (tmp_path / "out" / "results.md").read_text()
    assert all(f"| {name} |" in text for name in names)
