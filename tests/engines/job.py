"""A model and a text to fine-tune it on, the examples as users start them, and plain PyTorch beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import colrow
from colrow.train.text import read_documents
from colrow.train.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
BATCH = 8
MAX_NORM = 0.1
IGNORED = -100


def write_job(folder: Path, dtype: torch.dtype, lines: int = 6 * BATCH) -> tuple[Path, Path]:
    """A folder with a small model and its tokenizer, and a file with sentences of unequal length."""
    text = read_documents("bible", 20_000)[0]
    sentences = [one.strip() for one in text.split(". ") if 20 < len(one) < 200][:lines]
    assert len(sentences) == lines
    tokenizer = train_tokenizer([text], 320)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=40,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=5,  # 3 for one rank, 2 for the other
        num_key_value_heads=5,
        head_dim=8,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        use_cache=False,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(sentences) + "\n")
    return folder / "model", folder / "text.txt"


def run_example(
    name: str,
    ranks: int,
    *arguments: str | Path,
    in_double: bool = True,
    environment: dict[str, str] | None = None,
) -> str:
    """What ``torchrun --nproc-per-node RANKS examples/engines/NAME.py ARGUMENTS`` prints."""
    program = ROOT / "examples" / "engines" / f"{name}.py"
    lines = program.read_text().splitlines()
    assert len(lines) <= 40
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    wrapped = ["-m", "tests.engines.in_double", str(program)] if in_double else [str(program)]
    path = os.pathsep.join([str(ROOT), str(Path(colrow.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, *launcher, *wrapped, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def numbers_in(printed: str) -> list[tuple[float, float]]:
    """Of the lines ``loss NUMBER norm NUMBER``."""
    words = [line.split() for line in printed.splitlines() if line.startswith("loss ")]
    return [(float(loss), float(norm)) for _, loss, _, norm in words]


def batch_of(tokenizer: Any, lines: list[str]) -> dict[str, Tensor]:
    """Ids and labels [lines, longest]; padding is no label."""
    batch = tokenizer(lines, padding=True, return_tensors="pt")
    return {
        "input_ids": batch.input_ids,
        "labels": batch.input_ids.masked_fill(batch.attention_mask == 0, IGNORED),
    }


def train_plainly(
    folder: Path, batches: Iterable[list[str]], rates: Iterable[float], weight_decay: float = 0.01
) -> tuple[nn.Module, list[tuple[float, float]]]:
    """The whole model in one process, plain PyTorch: one step with AdamW for each batch of lines.

    Returns:
        The model, and each step's loss and norm of the gradient before clipping.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay)
    numbers = []
    for lines, rate in zip(batches, rates, strict=False):
        optimizer.param_groups[0]["lr"] = rate
        loss = model(**batch_of(tokenizer, lines)).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        assert norm > MAX_NORM  # or it would not matter whether it is right
        optimizer.step()
        optimizer.zero_grad()
        numbers.append((loss.item(), norm.item()))
    return model, numbers


def largest_difference(model: nn.Module, folder: Path) -> float:
    """Of any weight of ``model`` from that in the folder, which plain transformers loads."""
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert saved.dtype == model.dtype
    pairs = zip(model.named_parameters(), saved.named_parameters(), strict=True)
    differences = [(one - other).abs().max().item() for (name, one), (also, other) in pairs if name == also]
    assert len(differences) == len(list(model.parameters()))
    return max(differences)
