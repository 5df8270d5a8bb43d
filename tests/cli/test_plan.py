"""``colrow plan``: derives, prints, writes and compares."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from colrow.cli import main
from colrow.plan import Plan

SMALL = [
    "hidden_size=48",
    "intermediate_size=100",
    "num_hidden_layers=3",
    "num_attention_heads=6",
    "vocab_size=101",
]
LLAMA = ["plan", "transformers:LlamaConfig", *(word for one in SMALL for word in ("--set", one))]
LLAMA += ["--set", "num_key_value_heads=2"]


def test_a_table_with_cuts_memory_and_collectives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main([*LLAMA, "--tp", "2", "--out", str(tmp_path / "plan.yaml")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("LlamaForCausalLM in training and evaluation\n\nplan over 2 ranks: ")
    assert "model.layers.*.mlp.down_proj.weight[1]  x 3  100 units of 1  48 x 100" in shown
    # four all-reduces of a layer's output, one of two rows of ten tokens: 48 numbers of four bytes
    assert "exit model.layers.*.mlp.down_proj      2 x 10 x 48   3.8 kB      3  11.5 kB" in shown
    assert "built in " in shown
    assert "peak memory 0." in shown
    plan = Plan.load(tmp_path / "plan.yaml")
    assert plan.ranks == 2
    assert plan.explain() in shown

    assert main([*LLAMA, "--tp", "2", "--against", str(tmp_path / "plan.yaml")]) == 0
    assert capsys.readouterr().out.endswith(f"the same as {tmp_path / 'plan.yaml'}\n")

    changed = [*LLAMA, "--tp", "2", "--share", "3,1", "--against", str(tmp_path / "plan.yaml")]
    assert main(changed) == 1
    shown = capsys.readouterr().out
    assert "100 units cut 50 50 -> 100 units cut 75 25\n" in shown[shown.index("difference from") :]


def test_what_is_forbidden_stays_whole(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main([*LLAMA, "--tp", "2", "--forbid", "lm_head.weight"]) == 0
    assert "    lm_head.weight[0]" not in capsys.readouterr().out.splitlines()


def test_a_function_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys, torch\n"
        "from torch import nn\n"
        "def build(width=32):\n"
        "    model = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 16))\n"
        "    return model, {'input': torch.randn(3, 16)}\n"
        "import atexit\n"
        "atexit.register(lambda: print('loaded' if 'transformers' in sys.modules else 'free'))\n"
    )
    command = [sys.executable, "-m", "colrow", "plan", "mine:build", "--tp", "4", "--set", "width=24"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Sequential in training and evaluation" in done.stdout
    assert "6 x 4" not in done.stdout, "four ranks are few enough to be listed"
    assert " 24  6 6 6 6 " in done.stdout
    assert done.stdout.endswith("free\n"), "transformers is not needed for this"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "0"], "--tp must be a number of ranks, at least 1, not 0"),
        (["--tp", "2", "--share", "1,2,3"], "--share has 3 numbers for 2 ranks: give one for each"),
        (["--tp", "2", "--share", "a,b"], "--share must be numbers with commas, such as 3,3,2, not 'a,b'"),
        (["--tp", "2", "--set", "layers"], "--set needs NAME=VALUE, not 'layers'"),
        (["--tp", "2", "--against", "no.yaml"], "there is no plan no.yaml"),
        (["--tp", "2", "--set", "width=wide"], "cannot be called with these settings"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLROW_TRACEBACK", raising=False)
    model: Any = "torch.nn:Identity" if "width=wide" not in arguments else "tests.cli.test_plan:nothing"
    assert main(["plan", model, *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("colrow: ")
    assert message in shown


def nothing() -> None: ...
