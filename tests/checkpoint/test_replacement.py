"""A save that is killed at any moment leaves the old one or the new one in effect, never a mixture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from colrow.checkpoint.reader import SafetensorsFolder
from colrow.checkpoint.replacement import Replacement
from colrow.checkpoint.shards import Saved, _index, split_files
from colrow.checkpoint.writer import SafetensorsWriter
from colrow.layout import TensorLayout

_LAYOUT = TensorLayout((3,))


class _Killed(BaseException):
    pass


def _save(folder: Path, value: float, files: int, configuration: str) -> None:
    tensors = [Saved(f"w{i}", torch.full((3,), value), _LAYOUT) for i in range(6)]
    groups = split_files([one.spec for one in tensors], 12 * 6 // files)
    assert len(groups) == files
    with Replacement(folder, "model", files) as replacement:
        for name, specs in zip(replacement.names, groups, strict=True):
            with SafetensorsWriter(replacement.partial(name), specs) as writer:
                for spec in specs:
                    writer.tensor(spec.name).fill_(value)
                writer.finish()
        (replacement.configurations / "config.json").write_text(configuration)
        replacement.commit(_index(groups, replacement.names, None))


def _read(folder: Path, index_first: bool = False) -> tuple[set[float], str]:
    """All values, and the configuration, as a reader finds them that prefers one file or an index."""
    single = folder / "model.safetensors"
    hidden = folder / "hidden"
    if index_first and (folder / "model.safetensors.index.json").exists() and single.exists():
        single.rename(hidden)
    try:
        files = SafetensorsFolder(folder)
        values = {one for i in range(6) for one in files.read(f"w{i}", _LAYOUT, 0).tolist()}
    finally:
        if hidden.exists():
            hidden.rename(single)
    return values, (folder / "config.json").read_text()


def _kill_at(patch: pytest.MonkeyPatch, moment: int) -> Callable[[], bool]:
    """Nothing more reaches the disk from the given change of a name on; says whether it came to that."""
    changes = [0]

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            if changes[0] >= moment:
                changes.append(1)
                raise _Killed
            changes[0] += 1
            return function(*arguments, **options)

        return change

    for name in ("replace", "unlink", "rmdir", "mkdir", "posix_fallocate"):
        patch.setattr(os, name, guarded(getattr(os, name)))
    return lambda: len(changes) > 1


@pytest.mark.parametrize("configuration", ["old", "new"])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 1), (3, 3), (3, 2)])
def test_killed_at_every_moment(tmp_path: Path, before: int, after: int, configuration: str) -> None:
    outcomes = []
    for moment in range(100):
        folder = tmp_path / str(moment)
        _save(folder, 1.0, before, "old")
        with pytest.MonkeyPatch.context() as patch:
            was_killed = _kill_at(patch, moment)
            if moment % 2:  # every second time over what an earlier kill left
                with pytest.MonkeyPatch.context() as earlier:
                    _kill_at(earlier, moment // 2)
                    with pytest.raises(_Killed):
                        _save(folder, 1.0, before, "old")
                patch.undo()
                was_killed = _kill_at(patch, moment)
            try:
                _save(folder, 2.0, after, configuration)
            except _Killed:
                assert was_killed()
        if not was_killed():
            assert _read(folder) == _read(folder, True) == ({2.0}, configuration)
            heads = ["model.safetensors"] if after == 1 else ["model.safetensors.index.json"]
            others = {path.name for path in folder.iterdir()} - {*heads, "config.json"}
            assert len(others) == (0 if after == 1 else after)
            break
        for index_first in (False, True):
            try:
                found = _read(folder, index_first)
            except FileNotFoundError:
                # allowed only while the configuration changes, and what was there is kept
                assert configuration == "new"
                assert list(folder.glob("*.previous"))
                found = (set(), "")
            assert found in [({1.0}, "old"), ({2.0}, configuration), (set(), "")]
            outcomes.append(found[0] or {0.0})
        _save(folder, 3.0, after, "third")
        assert _read(folder) == _read(folder, True) == ({3.0}, "third")
        assert not [path for path in folder.iterdir() if path.suffix in (".partial", ".previous")]
        shards = list(folder.glob("model*-of-*.safetensors"))
        assert len(shards) == (0 if after == 1 else after)
    assert not was_killed()
    assert {1.0} in outcomes
    assert {2.0} in outcomes


def test_other_files_stay(tmp_path: Path) -> None:
    names = ["model.partial", "modelling.py", "tokenizer.json", "model-best.safetensors"]
    for name in names:
        (tmp_path / name).write_text("mine")
    _save(tmp_path, 1.0, 2, "old")
    _save(tmp_path, 2.0, 1, "old")
    assert [(tmp_path / name).read_text() for name in names] == ["mine"] * len(names)


def test_shard_names(tmp_path: Path) -> None:
    """A first save has the names that transformers gives; the next ones take turns with others."""
    found = []
    for value in (1.0, 2.0, 3.0):
        _save(tmp_path, value, 2, "same")
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        found.append(sorted(set(index["weight_map"].values())))
    assert found[0] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert found[1] == ["model-2-00001-of-00002.safetensors", "model-2-00002-of-00002.safetensors"]
    assert found[2] == found[0]


def test_one_save_at_a_time(tmp_path: Path) -> None:
    with Replacement(tmp_path, "model", 1), pytest.raises(OSError, match="another process is saving into"):
        Replacement(tmp_path, "optimizer", 1)
    _save(tmp_path, 1.0, 1, "free again")
