"""``colrow train`` as users run it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from colrow.cli.train import run
from colrow.train.metrics import read_records
from colrow.train.parse import to_yaml
from tests.train.small import small

EXAMPLES = Path(__file__).parents[2] / "examples"


def _colrow(
    *arguments: str, launcher: tuple[str, ...] = (), cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    program = [sys.executable, *launcher, "-m", "colrow", "train", *arguments]
    return subprocess.run(program, capture_output=True, text=True, env=environment, timeout=120, cwd=cwd)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(to_yaml(small(tmp_path, precision="fp32", steps=4, sample={"tokens": 4})))
    return str(path)


@pytest.mark.parametrize("tp", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_tiny_example(tmp_path: Path, tp: int) -> None:
    done = _colrow(str(EXAMPLES / "tiny.yaml"), "--mesh.tp", str(tp), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "tiny"
    for part in (
        f"over tp={tp} ranks",
        "step 1/50  loss ",
        "step 50/50  loss ",
        "left 0:00",
        "validation after step 50",
    ):
        assert part in done.stdout
    for part in (
        *(f"rank {rank}" for rank in range(tp)),
        "one process",
        "In the beginning",
        f"model in {folder.relative_to(tmp_path)}",
    ):
        assert part in done.stdout
    losses = [one["loss"] for one in read_records(folder / "metrics.jsonl")]
    assert len(losses) == 50
    assert losses[-1] < losses[0] - 1.0
    assert AutoModelForCausalLM.from_pretrained(str(folder / "model")).num_parameters() > 200_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "step", "overwrite", "said"),
    [
        (1, 5, False, "resuming after step 3"),
        (1, 5, True, "resuming after step 3"),  # which is not for the ranks that are started again
        (0, 2, False, "nothing to resume"),  # the one that writes files, before there is a checkpoint
    ],
)
def test_a_killed_rank_is_started_again(
    file: str, tmp_path: Path, rank: int, step: int, overwrite: bool, said: str
) -> None:
    """The run goes on from its last checkpoint, of three steps; what was done since is done again."""
    options = [
        "--mesh.tp",
        "2",
        "--steps",
        "7",
        "--checkpoint_every",
        "3",
        "--overwrite",
        str(overwrite).lower(),
    ]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    command = [sys.executable, *launcher, "-m", "tests.train.killed", str(rank), str(step), file, *options]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [one["step"] for one in records] == list(range(1, 8))
    whole = _colrow(file, *options[:-2], "--run_dir", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    expected = read_records(tmp_path / "whole" / "metrics.jsonl")
    assert [one["loss"] for one in records] == [one["loss"] for one in expected]


def test_the_bible_example_is_valid(tmp_path: Path) -> None:
    from colrow.train.parse import parse
    from colrow.train.prepare import prepare

    lines = prepare(
        parse(
            [
                str(EXAMPLES / "bible.yaml"),
                "--run_dir",
                str(tmp_path / "run"),
                "--data.max_characters",
                "400000",
            ]
        )
    )
    assert "over tp=2 ranks" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh.tp", "0"], "mesh.tp=0 must be at least 1"),
        (["--data.text", "/nowhere"], "there is no text file or folder /nowhere"),
        (["--model.config", "LamaConfig"], "did you mean LlamaConfig"),
    ],
)
def test_mistakes_are_errors_of_the_user(
    file: str, tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_rank(*arguments: object) -> None:
        raise AssertionError("a rank was started")

    monkeypatch.setattr("colrow.launch.launch", no_rank)
    with pytest.raises(ValueError, match=message):
        run([file, *arguments])
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_one_line(file: str) -> None:
    done = _colrow(file, "--optimiser.lr", "3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "colrow: there is no option --optimiser.lr: did you mean optimizer.learning_rate?\n"


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from colrow.train.parse import parse\ntry: parse(['--help'])\nexcept SystemExit: pass\n"
    )
    program += "assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--optimizer.learning_rate" in done.stdout


@pytest.mark.slow
def test_under_torchrun(file: str, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = _colrow(file, "--mesh.tp", "2", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("over tp=2 ranks") == 1
    assert "step 4/4" in done.stdout
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 4
