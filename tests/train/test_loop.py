"""Whole runs on real ranks: the same numbers at every tp, resumed or not, validated or not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from colrow.plan import AxisSpec, HandPlan, LossSpec, column, row, vocab
from colrow.train.configuration import TrainConfiguration
from colrow.train.data import DataOrder
from colrow.train.folder import RunFolder
from colrow.train.metrics import read_records
from colrow.train.parse import parse
from colrow.train.prepare import open_sequences, prepare
from tests.pool import Pool, RankError
from tests.train.small import LLAMA, small

Ranks = Callable[[int], Pool]
DROPOUT = {"config": "LlamaConfig", "fields": {**LLAMA, "attention_dropout": 0.3}}


def _train(configuration: dict[str, Any], stop_after: int | None) -> dict[str, Any] | None:
    """In a worker: train, or be interrupted after so many steps."""
    from colrow.train import loop

    if stop_after is None:
        return loop.train(configuration, prepared=True)
    show = loop.Trainer._show

    def show_or_stop(self: loop.Trainer, *arguments: Any) -> None:
        if self.run.done > stop_after:
            raise InterruptedError
        show(self, *arguments)

    with mock.patch.object(loop.Trainer, "_show", show_or_stop), pytest.raises(InterruptedError):
        loop.train(configuration, prepared=True)
    return None


def _run(ranks: Ranks, configuration: TrainConfiguration, stop_after: int | None = None) -> RunFolder:
    prepare(configuration)
    results = ranks(configuration.mesh.ranks).run(_train, asdict(configuration), stop_after)
    assert all(result == results[0] for result in results)
    return RunFolder(configuration.run_folder)


def _losses(folder: RunFolder) -> list[float]:
    records = read_records(folder.metrics)
    assert [one["step"] for one in records] == list(range(1, len(records) + 1))
    return [one["loss"] for one in records]


def _validations(folder: RunFolder) -> list[tuple[int, float]]:
    return [(one["step"], one["loss"]) for one in read_records(folder.validation)]


def _weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(str(folder.model))
    return dict(model.state_dict())


def _equal_bits(first: RunFolder, second: RunFolder) -> None:
    assert _losses(first) == _losses(second)
    assert _validations(first) == _validations(second)
    ours, theirs = _weights(first), _weights(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert first.sample.read_text() == second.sample.read_text()


def test_losses_agree_at_every_tp(ranks: Ranks, tmp_path: Path) -> None:
    folders = {
        tp: _run(
            ranks,
            small(
                tmp_path,
                run_dir=str(tmp_path / f"tp{tp}"),
                mesh={"tp": tp},
                steps=50,
                precision="fp32",
                evaluate_every=25,
            ),
        )
        for tp in (1, 2, 3)
    }
    expected = _losses(folders[1])
    assert len(expected) == 50
    assert expected[-1] < expected[0] - 1.0
    for tp in (2, 3):
        assert _losses(folders[tp]) == pytest.approx(expected, abs=1e-5)
        assert [step for step, _ in _validations(folders[tp])] == [25, 50]
        for (_, ours), (_, theirs) in zip(_validations(folders[tp]), _validations(folders[1]), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
        for name, weight in _weights(folders[1]).items():
            torch.testing.assert_close(_weights(folders[tp])[name], weight, rtol=0, atol=1e-3)


def test_is_plain_pytorch(ranks: Ranks, tmp_path: Path) -> None:
    """The same run, written down with nothing of colrow but the order of the data."""
    configuration = small(tmp_path, mesh={"tp": 2}, micro_batch_size=3, optimizer={"max_norm": 0.7})
    folder = _run(ranks, configuration)
    training, _ = open_sequences(folder, configuration.data, 300)
    order = DataOrder(len(training), 4, seed=0)
    torch.manual_seed(0)
    special = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**special, **LLAMA), dtype=torch.float64)
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n]
    spared = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 4, 1.0, 3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12 - 1 - 3, 3e-4)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [3])
    for step, record in enumerate(read_records(folder.metrics)):
        batch = training.take(order.indices(step))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        assert record["lr"] == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        assert record["loss"] == pytest.approx(loss.item(), abs=2e-6)
        assert record["grad_norm"] == pytest.approx(norm.item(), abs=2e-5)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@pytest.mark.parametrize(
    ("tp", "changes"),
    [
        pytest.param(2, {"model": DROPOUT, "micro_batch_size": 3}, marks=pytest.mark.slow),
        (3, {"precision": "bf16", "model": DROPOUT}),
        (1, {"precision": "bf16-mixed", "checkpoint_activations": True}),
        pytest.param(
            2,
            {"optimizer": {"schedule": "constant"}, "model": {**DROPOUT, "config": "Qwen3Config"}},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    ranks: Ranks, tmp_path: Path, tp: int, changes: dict[str, Any]
) -> None:
    changes = {"precision": "fp32", **changes, "mesh": {"tp": tp}, "checkpoint_every": 4}
    whole = _run(ranks, small(tmp_path, run_dir=str(tmp_path / "whole"), **changes))
    interrupted = _run(ranks, small(tmp_path, **changes), stop_after=6)
    assert len(_losses(interrupted)) == 6
    assert interrupted.checkpoints.joinpath("latest").read_text() == "step-000004"
    resumed = _run(ranks, small(tmp_path, resume=True, **changes))
    _equal_bits(resumed, whole)
    # dropout was drawn: without it the same run has other losses
    if "model" in changes:
        dry = {**changes, "model": {**changes["model"], "fields": LLAMA}, "run_dir": str(tmp_path / "dry")}
        assert _losses(_run(ranks, small(tmp_path, **dry), stop_after=2)) != _losses(whole)[:2]


def test_resuming_at_another_tp(ranks: Ranks, tmp_path: Path) -> None:
    whole = _run(ranks, small(tmp_path, run_dir=str(tmp_path / "whole"), checkpoint_every=4))
    _run(ranks, small(tmp_path, mesh={"tp": 3}, checkpoint_every=4), stop_after=5)
    resumed = _run(ranks, small(tmp_path, mesh={"tp": 2}, checkpoint_every=4, resume=True))
    assert _losses(resumed) == pytest.approx(_losses(whole), abs=1e-6)
    assert len(_losses(resumed)) == 12


@pytest.mark.parametrize(
    ("data", "micro_batch_size"), [pytest.param("zero1", 1, marks=pytest.mark.slow), ("fsdp", None)]
)
def test_replicas(ranks: Ranks, tmp_path: Path, data: str, micro_batch_size: int | None) -> None:
    """Two replicas, cut over two ranks each, are one process; they go on on other meshes, and from them."""
    whole = _run(ranks, small(tmp_path, run_dir=str(tmp_path / "whole"), checkpoint_every=4))
    replicas = {"tp": 2, "dp": 2, "data": data}
    options: dict[str, Any] = {"checkpoint_every": 4, "micro_batch_size": micro_batch_size}
    _run(ranks, small(tmp_path, mesh=replicas, **options), stop_after=5)
    _run(ranks, small(tmp_path, mesh={"tp": 3}, resume=True, checkpoint_every=2), stop_after=7)
    resumed = _run(ranks, small(tmp_path, mesh=replicas, resume=True, **options))
    assert _losses(resumed) == pytest.approx(_losses(whole), abs=1e-6)
    assert len(_losses(resumed)) == 12
    for (_, ours), (_, theirs) in zip(_validations(resumed), _validations(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    for name, weight in _weights(whole).items():
        torch.testing.assert_close(_weights(resumed)[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "mesh",
    [
        {"pp": 2, "schedule": "zbv"},
        pytest.param({"pp": 2, "tp": 2}, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "dp": 2, "data": "zero1"}, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "dp": 2, "data": "fsdp", "schedule": "gpipe"}, marks=pytest.mark.slow),
    ],
)
def test_stages(ranks: Ranks, tmp_path: Path, mesh: dict[str, Any]) -> None:
    """A pipeline is one process; it goes on at the same layout, after one that has all layers."""
    fields = {"fields": {**LLAMA, "num_hidden_layers": 4, "tie_word_embeddings": True}}
    options: dict[str, Any] = {"model": fields, "checkpoint_every": 4}
    whole = _run(ranks, small(tmp_path, run_dir=str(tmp_path / "whole"), **options))
    staged = {**options, "mesh": mesh, "micro_batches": 2}
    _run(ranks, small(tmp_path, **staged), stop_after=5)
    _run(
        ranks,
        small(tmp_path, mesh={"tp": 2}, resume=True, **{**options, "checkpoint_every": 2}),
        stop_after=7,
    )
    resumed = _run(ranks, small(tmp_path, resume=True, **staged))
    assert _losses(resumed) == pytest.approx(_losses(whole), abs=1e-6)
    assert len(_losses(resumed)) == 12
    for (_, ours), (_, theirs) in zip(_validations(resumed), _validations(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    for name, weight in _weights(whole).items():
        torch.testing.assert_close(_weights(resumed)[name], weight, rtol=0, atol=1e-6)
    held = json.loads(resumed.ranks.read_text())
    assert sum(one["parameters"] for one in held["ranks"]) < 1.5 * held["one_process"][
        "parameters"
    ] * mesh.get("dp", 1)
    assert all(one["step_bytes"].keys() >= {"pp"} and one["step_bytes"]["pp"] > 0 for one in held["ranks"])
    assert all(0 <= one["waited_share"] < 1 for one in held["ranks"])
    if mesh.get("data") == "zero1":  # gradients of float64 weights on both replicas, AdamW's means on one
        assert sum(one["training_bytes"] - 3 * one["parameter_bytes"] for one in held["ranks"]) == 0


def test_resuming_a_finished_run_and_extending_it(ranks: Ranks, tmp_path: Path) -> None:
    constant = {"schedule": "constant"}
    finished = _run(ranks, small(tmp_path, steps=6, optimizer=constant))
    before = _losses(finished), finished.sample.read_text()
    _run(ranks, small(tmp_path, steps=6, optimizer=constant, resume=True))
    assert (_losses(finished), finished.sample.read_text()) == before
    extended = _run(ranks, small(tmp_path, steps=9, optimizer=constant, resume=True))
    whole = _run(ranks, small(tmp_path, steps=9, optimizer=constant, run_dir=str(tmp_path / "whole")))
    assert _losses(extended) == _losses(whole)


def test_resume_without_a_checkpoint_begins_anew(ranks: Ranks, tmp_path: Path) -> None:
    _run(ranks, small(tmp_path, steps=5), stop_after=4)
    begun = _run(ranks, small(tmp_path, steps=5, resume=True))
    _equal_bits(begun, _run(ranks, small(tmp_path, steps=5, run_dir=str(tmp_path / "whole"))))


@pytest.mark.slow
def test_validation_and_checkpoints_do_not_disturb_training(ranks: Ranks, tmp_path: Path) -> None:
    often = {"evaluate_every": 2, "checkpoint_every": 3, "evaluate_sequences": 3}
    disturbed = _run(ranks, small(tmp_path, mesh={"tp": 2}, model=DROPOUT, **often))
    quiet = _run(
        ranks,
        small(
            tmp_path,
            mesh={"tp": 2},
            model=DROPOUT,
            run_dir=str(tmp_path / "quiet"),
            data={"validation_fraction": 0.05},
        ),
    )
    assert _losses(disturbed) == _losses(quiet)
    assert [step for step, _ in _validations(disturbed)] == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in _validations(quiet)] == [5, 10, 12]


def test_what_a_run_leaves(ranks: Ranks, tmp_path: Path) -> None:
    configuration = small(tmp_path, mesh={"tp": 2}, steps=20, checkpoint_every=6, precision="fp32")
    folder = _run(ranks, configuration)
    assert sorted(one.name for one in folder.checkpoints.iterdir()) == [
        "latest",
        "step-000018",
        "step-000020",
    ]
    # the model loads without colrow, and has the loss that was reported
    model = AutoModelForCausalLM.from_pretrained(str(folder.model)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder.model))
    assert model.config.vocab_size == len(tokenizer) == 300
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    _, validation = open_sequences(folder, configuration.data, 300)
    assert validation is not None
    batch = validation.take(range(len(validation)))
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss.item()
    assert _validations(folder)[-1][1] == pytest.approx(loss, abs=1e-5)
    perplexity = read_records(folder.validation)[-1]["perplexity"]
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    # the sample is what that model writes
    assert folder.sample.read_text().startswith("bo")
    assert len(tokenizer(folder.sample.read_text())["input_ids"]) > 2
    assert folder.curve.read_bytes().startswith(b"\x89PNG")
    assert list(folder.tensorboard.glob("events*"))
    assert parse([str(folder.configuration)]) == configuration
    held = json.loads(folder.ranks.read_text())
    whole = sum(one.numel() for one in model.parameters())
    assert held["one_process"]["parameters"] == whole
    assert held["one_process"]["training_bytes"] == 16 * whole
    assert sum(one["parameters"] for one in held["ranks"]) >= whole
    assert all(0.4 * whole < one["parameters"] < 0.7 * whole for one in held["ranks"])
    for one in read_records(folder.metrics):
        assert 0 < one["comm_fraction"] < 1
        assert one["tokens_per_second"] > 0


def test_greedy_sample_is_that_of_the_loaded_model(ranks: Ranks, tmp_path: Path) -> None:
    folder = _run(
        ranks, small(tmp_path, mesh={"tp": 3}, precision="fp32", sample={"temperature": 0.0, "tokens": 12})
    )
    model = AutoModelForCausalLM.from_pretrained(str(folder.model)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder.model))
    ids = tokenizer("bo", return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert folder.sample.read_text() == tokenizer.decode(written[0], skip_special_tokens=True) + "\n"


def test_fine_tuning_goes_on_from_the_folders_weights(ranks: Ranks, tmp_path: Path) -> None:
    first = _run(ranks, small(tmp_path, steps=30, run_dir=str(tmp_path / "first")))
    fine = {"config": None, "fields": {}, "path": str(first.model)}
    second = _run(ranks, small(tmp_path, mesh={"tp": 2}, model=fine, checkpoint_every=4), stop_after=7)
    # the first step's loss is before the step: that of the model it started from
    last, begin = _losses(first)[-1], _losses(second)[0]
    assert abs(last - begin) < 0.5 < _losses(first)[0] - begin
    resumed = _run(ranks, small(tmp_path, mesh={"tp": 2}, model=fine, checkpoint_every=4, resume=True))
    whole = _run(ranks, small(tmp_path, mesh={"tp": 2}, model=fine, run_dir=str(tmp_path / "whole")))
    _equal_bits(resumed, whole)


@pytest.mark.slow
def test_minutes_become_a_number_of_steps(ranks: Ranks, tmp_path: Path) -> None:
    budget = {"steps": None, "minutes": 0.02, "optimizer": {"warmup_steps": 10}, "mesh": {"tp": 2}}
    folder = _run(ranks, small(tmp_path, **budget, checkpoint_every=10), stop_after=10)
    steps = json.loads((folder.checkpoints / "step-000010" / "state.json").read_text())["steps"]
    assert steps > 10
    again = parse([str(folder.configuration)])
    assert (again.steps, again.minutes) == (steps, None)
    _run(ranks, small(tmp_path, **budget, checkpoint_every=10, resume=True))
    assert len(_losses(folder)) == steps
    fixed = {**budget, "steps": steps, "minutes": None, "run_dir": str(tmp_path / "fixed")}
    _equal_bits(folder, _run(ranks, small(tmp_path, **fixed)))


def test_a_loss_that_is_not_finite_stops_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    wild = small(tmp_path, mesh={"tp": 2}, precision="fp32", optimizer={"learning_rate": 1e30})
    with pytest.raises(RankError, match=r"ValueError: the loss of step \d+ is (nan|inf): lower optimizer"):
        _run(ranks, wild)


def _prepare_late(configuration: dict[str, Any]) -> str:
    from colrow.train.loop import train

    try:
        train(configuration, prepared=False)
    except (ValueError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def test_under_a_launcher_the_first_rank_prepares(ranks: Ranks, tmp_path: Path) -> None:
    configuration = asdict(small(tmp_path, mesh={"tp": 2}, steps=4))
    assert ranks(2).run(_prepare_late, configuration) == ["trained", "trained"]
    # a mistake is told once, and ends all ranks
    told, silent = ranks(2).run(_prepare_late, configuration)
    assert told.startswith("ValueError: ")
    assert "already holds a run" in told
    assert silent == "SystemExit: 2"


OPT = HandPlan(
    axes={
        "heads": AxisSpec("config.num_attention_heads", every_rank=True),
        "mlp": AxisSpec(),
        "vocab": AxisSpec(),
    },
    styles={
        "**.embed_tokens": vocab("vocab"),
        "**.self_attn.{q,k,v}_proj": column("heads"),
        "**.self_attn.out_proj": row("heads"),
        "**.layers.*.fc1": column("mlp"),
        "**.layers.*.fc2": row("mlp"),
        "lm_head": column("vocab"),
    },
    attributes={"**.self_attn.num_heads": "heads"},
    loss=LossSpec("lm_head"),
)
"""How one would cut it by hand."""


@pytest.mark.slow
def test_derived_and_hand_written_plans(ranks: Ranks, tmp_path: Path) -> None:
    """A plan is derived unless one is named; either way the losses are those of one process."""
    fields = {
        "hidden_size": 24,
        "word_embed_proj_dim": 24,
        "ffn_dim": 41,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    }
    folders = []
    for tp, plan in ((1, None), (2, f"{__name__}:OPT"), (2, None)):
        model = {"config": "OPTConfig", "fields": fields, "plan": plan}
        run_dir = str(tmp_path / f"run{len(folders)}")
        folders.append(_run(ranks, small(tmp_path, run_dir=run_dir, mesh={"tp": tp}, model=model)))
    for folder in folders[1:]:
        assert _losses(folder) == pytest.approx(_losses(folders[0]), abs=1e-5)
    for plan, message in (
        ("tests.train.test_loop:OPTS", r"model\.plan must be package\.module:NAME"),
        ("tests.train.test_loop:Ranks", r"not a colrow\.plan\.HandPlan"),
    ):
        model = {"config": "OPTConfig", "fields": fields, "plan": plan}
        with pytest.raises(ValueError, match=message):
            prepare(small(tmp_path, run_dir=str(tmp_path / "refused"), mesh={"tp": 2}, model=model))
