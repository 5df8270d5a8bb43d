"""Small runs for the tests: a text, and configurations that train on it in moments."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from colrow.train.configuration import TrainConfiguration
from colrow.train.parse import from_dictionary

LLAMA = {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 50,
    "max_position_embeddings": 64,
}
"""9 heads in 3 groups, 50 features: neither divides by two ranks in whole groups, nor by three."""


def write_text(folder: Path, words: int = 6000) -> Path:
    """Pseudo-random sentences, with some order to learn."""
    chosen = random.Random(0)
    vocabulary = [
        "".join(chosen.choices("bcdfghjklmnprstvw", k=2)) + chosen.choice("aeiou") for _ in range(60)
    ]
    text = " ".join(vocabulary[min(59, int(chosen.expovariate(0.1)))] for _ in range(words))
    path = folder / "text.txt"
    path.write_text(text)
    return path


def small(folder: Path, **changes: Any) -> TrainConfiguration:
    """A run in ``folder / "run"`` on a text in ``folder``; nested changes as ``optimizer={...}``."""
    path = folder / "text.txt"
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "steps": 12,
        "batch_size": 4,
        "precision": "fp64",
        "evaluate_every": 5,
        "checkpoint_every": None,
        "timeout": 60.0,
        "model": {"config": "LlamaConfig", "fields": dict(LLAMA)},
        "data": {
            "text": str(path if path.exists() else write_text(folder)),
            "vocab_size": 300,
            "sequence_length": 16,
            "validation_fraction": 0.05,
        },
        "optimizer": {"warmup_steps": 3, "learning_rate": 3e-3},
        "sample": {"prompt": "bo", "tokens": 8},
    }
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
    return from_dictionary(values)
