"""The README's example runs as it stands there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.pool import Pool

README = Path(__file__).parent.parent / "README.md"


def _run(folder: Path) -> int:
    import os

    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in blocks:
            exec(compile(block, str(README), "exec"), {})
    finally:
        os.chdir(before)
    return len(blocks)


def test_examples(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    assert ranks(2).run(_run, tmp_path) == [1, 1]
    assert (tmp_path / "out" / "model.safetensors").exists()
