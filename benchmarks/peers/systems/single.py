"""One process without parallelism."""

from __future__ import annotations

from pathlib import Path

from ..shapes import Case
from .models import plain_model
from .trainer import Trainer


def build(case: Case, folder: Path) -> Trainer:
    return Trainer(plain_model(case, folder))
