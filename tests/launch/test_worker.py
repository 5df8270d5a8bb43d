"""A rank's program, where that needs no process of its own."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest

from colrow.launch import worker
from colrow.launch.process import Task
from colrow.launch.report import Success


def _task(target: str, **arguments: Any) -> Task:
    return Task(target, pickle.dumps(arguments), (), "")


@pytest.fixture(autouse=True)
def _first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")


def test_only_rank_0_returns_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    task = _task("os.path:join", **{"a": "left"})
    assert worker._run(task) == Success(pickle.dumps(os.path.join("left")))
    monkeypatch.setenv("RANK", "1")
    assert worker._run(task) == Success()


def test_results_that_cannot_be_pickled() -> None:
    with pytest.raises(TypeError, match=r"what tests\.launch\.jobs:unpicklable returns cannot be pickled"):
        worker._run(_task("tests.launch.jobs:unpicklable"))


def test_targets_that_do_not_exist() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"tests\.launch\.nowhere"):
        worker._run(_task("tests.launch.nowhere:nothing"))
    with pytest.raises(AttributeError, match="nothing"):
        worker._run(_task("tests.launch.jobs:nothing"))
