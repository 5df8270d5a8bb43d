"""Language models and classifiers of transformers with labels, so that each computes its own loss."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this file may be loaded by path, from anywhere

import transformers_all as everything

LABELLED = ("causal-lm", "seq2seq-lm", "masked-lm", "image-classification", "speech-seq2seq")


def names() -> list[str]:
    """Those with a head that takes labels of one form."""
    return [f"{name}:labels" for name in everything.names() if name.partition(":")[2] in LABELLED]


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """See :func:`transformers_all.build`."""
    return everything.build(name)
