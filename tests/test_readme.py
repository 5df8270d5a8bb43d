"""The README's examples run as they stand there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pool import Pool

README = Path(__file__).parent.parent / "README.md"


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def _run(folder: Path, *blocks: str) -> float:
    """Run the blocks one after the other; the loss that they end with."""
    names: dict[str, Any] = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in blocks:
            exec(compile(block, str(README), "exec"), names)
    finally:
        os.chdir(before)
    return float(names["loss"].detach())


def test_the_library(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    ranks(2).run(_run, tmp_path, _blocks()[0])
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_all_dimensions(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    """With the model and the ids of the first example."""
    library, together = _blocks()
    imports, _, rest = library.partition("mesh = ")
    model = rest[rest.index("torch.manual_seed") : rest.index("model = colrow.parallelize")]
    whole = _run(tmp_path, imports + model + "loss = model(input_ids=ids, labels=ids).loss")
    for found in ranks(8).run(_run, tmp_path, imports + model, together, timeout=120):
        assert found == pytest.approx(whole, rel=1e-5)
