"""colrow with sequence parallelism: what lies between regions is cut along the sequence."""

from __future__ import annotations

from pathlib import Path

from ..shapes import Case
from .colrow import ColrowTrainer, parallelized, settings


def build(case: Case, folder: Path) -> ColrowTrainer:
    trainer = ColrowTrainer(parallelized(case, folder, sequence=True))
    trainer.notes = settings()
    return trainer
