"""Besides its shards, a rank holds one global tensor while saving and a piece of one while loading."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import pytest
import torch
from torch import nn

import colrow
from colrow import checkpoint
from colrow.plan import AxisSpec, HandPlan, column, row
from tests.pool import Pool, worker_mesh

_STATUS = Path("/proc/self/status")
_PLAN = HandPlan({"hidden": AxisSpec()}, {"0": column("hidden"), "1": row("hidden")})
_HIDDEN, _INPUTS = 4096, 4096
_MEGABYTES = 64
"""Of each of the model's two weights."""


class _Peak:
    """The most anonymous memory (not pages of files) of this process beyond that at the start."""

    def __enter__(self) -> _Peak:
        self._start = self._most = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _now(self) -> int:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def _watch(self) -> None:
        while not self._stop.wait(0.0005):
            self._most = max(self._most, self._now())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._most = max(self._most, self._now())
        self._stop.set()
        self._thread.join()

    @property
    def megabytes(self) -> float:
        return (self._most - self._start) / 1024


def _model(size: int) -> nn.Module:
    with checkpoint.parameters_on_meta():
        model = nn.Sequential(
            nn.Linear(_INPUTS, _HIDDEN, bias=False), nn.Linear(_HIDDEN, _INPUTS, bias=False)
        )
    return colrow.parallelize(model, worker_mesh(size), _PLAN)


def _measure(size: int, folder: Path) -> tuple[float, float]:
    model = _model(size)
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(torch.ones(parameter.shape)))
    with _Peak() as saving:
        checkpoint.save_pretrained(model, folder)
    other = _model(size)
    with _Peak() as loading:
        checkpoint.load_weights(other, folder)
    assert all(bool((parameter == 1).all()) for parameter in other.parameters())
    return saving.megabytes, loading.megabytes


@pytest.mark.skipif(not _STATUS.exists(), reason="reads /proc")
@pytest.mark.parametrize("size", [1, 2, 4])
def test_peak_memory(ranks: Callable[[int], Pool], tmp_path: Path, size: int) -> None:
    results = ranks(size).run(_measure, size, tmp_path)
    slack = 12
    shard = _MEGABYTES / size
    saving, loading = [[one[which] for one in results] for which in (0, 1)]
    assert 0.5 * _MEGABYTES < saving[0] < _MEGABYTES + slack  # the watch sees what there is
    assert all(one < shard + slack for one in saving[1:])
    # both weights' shards stay, and beside them one piece of a file is alive
    assert all(1.5 * shard < one < 3 * shard + slack for one in loading)
    assert size < 4 or all(one < _MEGABYTES for one in loading)
