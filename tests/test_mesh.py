"""Mesh: what is refused, who is where, whose timeout holds, and joining again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import colrow
from colrow.collectives import communicator
from colrow.mesh import coordinate, replicas, size_of
from tests.collectives import crew
from tests.pool import Pool


@pytest.mark.parametrize("size", [0, -1, 2.0, "2", None, True])
@pytest.mark.parametrize("name", ["tp", "dp", "pp", "ep", "cp"])
def test_sizes_that_are_no_number_of_ranks(name: str, size: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of ranks, at least 1, not"):
        colrow.init_mesh(**{name: size})


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), "5", None])
def test_timeouts_that_are_no_seconds(timeout: Any) -> None:
    with pytest.raises(ValueError, match="timeout must be positive seconds"):
        colrow.init_mesh(timeout=timeout)


def test_device_that_is_unknown() -> None:
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', not 'tpu'"):
        colrow.init_mesh(device="tpu")


@pytest.mark.parametrize(
    ("world", "choices"),
    [
        ("1", r"What fits 1: dp=1 tp=1\. Start more: torchrun --nproc-per-node 3"),
        ("4", r"What fits 4: dp=4 tp=1, dp=2 tp=2, dp=1 tp=4\.$"),
        ("7", r"What fits 7: dp=7 tp=1, dp=1 tp=7\.$"),
    ],
)
def test_another_number_of_ranks(monkeypatch: pytest.MonkeyPatch, world: str, choices: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=rf"dp=1 x tp=3 needs 3 ranks, but this job has {world}\. {choices}"):
        colrow.init_mesh(tp=3)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("world", "choices"),
    [
        ("8", "What fits 8: pp=2 dp=4 tp=1, pp=2 dp=2 tp=2, pp=2 dp=1 tp=4."),
        ("3", "What fits 3: dp=3 tp=1, dp=1 tp=3."),  # two stages do not divide three ranks
    ],
)
def test_another_number_of_ranks_with_stages(
    monkeypatch: pytest.MonkeyPatch, world: str, choices: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    message = f"pp=2 x dp=1 x tp=3 needs 6 ranks, but this job has {world}. {choices}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        colrow.init_mesh(tp=3, pp=2)


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_environment(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    complete = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29599"}
    for name, value in complete.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"{missing} is not set although RANK is"):
        colrow.init_mesh()


def _timeout(group: dist.ProcessGroup) -> float:
    backend = group._get_backend(torch.device("cpu"))
    return backend.options._timeout / timedelta(seconds=1)


def _layout(tp: int, dp: int) -> list[Any]:
    colrow.init_mesh(tp=tp, dp=dp, timeout=30)
    mesh = colrow.init_mesh(tp=tp, dp=dp, timeout=17)  # again: new groups, the new timeout
    assert mesh.mesh_dim_names == ("dp", "tp")
    groups = [mesh.get_group("tp"), mesh.get_group("dp")]
    for name in ("tp", "dp"):
        communicator(mesh[name]).barrier()
    own = torch.tensor([float(dist.get_rank())])
    sums = [communicator(mesh[name]).all_reduce(own).item() for name in ("tp", "dp")]
    ranks = [list(communicator(group).global_ranks) for group in groups]
    return [ranks, [_timeout(group) for group in groups], sums]


@pytest.mark.parametrize(
    ("tp", "dp", "layout"),
    [
        (2, 2, [[[0, 1], [0, 2]], [[0, 1], [1, 3]], [[2, 3], [0, 2]], [[2, 3], [1, 3]]]),
        (1, 3, [[[0], [0, 1, 2]], [[1], [0, 1, 2]], [[2], [0, 1, 2]]]),
        (3, 1, [[[0, 1, 2], [0]], [[0, 1, 2], [1]], [[0, 1, 2], [2]]]),
    ],
)
def test_layout_and_timeouts(
    ranks: Callable[[int], Pool], tp: int, dp: int, layout: list[list[list[int]]]
) -> None:
    """tp is innermost: neighbouring ranks hold the slices of one model."""
    ranks(1)
    ends = crew.run(_layout, tp, dp, size=tp * dp)
    for end, (tp_ranks, dp_ranks) in zip(ends, layout, strict=True):
        assert end.code == 0
        groups, timeouts, sums = end.result
        assert groups == [tp_ranks, dp_ranks]
        assert timeouts == [17.0, 17.0]
        assert sums == [float(sum(tp_ranks)), float(sum(dp_ranks))]


def _named() -> list[Any]:
    mesh = colrow.init_mesh(tp=2, ep=2, pp=2, timeout=30)
    groups = [mesh["pp"], mesh["ep"], replicas(mesh), mesh["tp"]]
    for group in groups:
        communicator(group).barrier()
    assert (size_of(mesh, "pp"), size_of(mesh, "cp")) == (2, 1)
    assert (coordinate(mesh, "ep"), coordinate(mesh, "cp")) == (dist.get_rank() // 2 % 2, 0)
    rows = [list(communicator(group).global_ranks) for group in groups]
    return [mesh.mesh_dim_names, rows, colrow.mesh_table(mesh)]


def test_named_dimensions(ranks: Callable[[int], Pool]) -> None:
    """Those of one rank are left out, dp and tp are not; experts' ranks have data of their own."""
    ranks(1)
    ends = crew.run(_named, size=8)
    table = """\
           tp=0  tp=1
pp=0 ep=0     0     1
pp=0 ep=1     2     3
pp=1 ep=0     4     5
pp=1 ep=1     6     7"""
    for rank, end in enumerate(ends):
        names, rows, shown = end.result
        assert names == ["pp", "dp", "ep", "tp"]
        first = rank // 4 * 4
        expected = [[rank % 4, rank % 4 + 4], [first + rank % 2, first + rank % 2 + 2]]
        assert rows == [*expected, expected[1], [rank // 2 * 2, rank // 2 * 2 + 1]]
        assert shown == table


def _several() -> tuple[list[int], int]:
    mesh = colrow.init_mesh(dp=2, ep=2, timeout=30)
    shared = replicas(mesh)
    communicator(shared).barrier()
    assert communicator(replicas(mesh)) is communicator(shared)
    colrow.manual_seed(5, mesh)
    return list(communicator(shared).global_ranks), int(torch.randint(1 << 60, ()))


def test_replicas_along_several_dimensions(ranks: Callable[[int], Pool]) -> None:
    """One group for their gradients, and random numbers of their own."""
    ranks(1)
    results = [end.result for end in crew.run(_several, size=4)]
    assert [group for group, _ in results] == [[0, 1, 2, 3]] * 4
    assert len({number for _, number in results}) == 4


def _twice(rounds: int) -> list[float]:
    """Join, leave and join again; the launcher's store remembers the first time."""
    results = []
    for _ in range(rounds):
        mesh = colrow.init_mesh(tp=2, timeout=20)
        results.append(communicator(mesh).all_reduce(torch.ones(1)).item())
        dist.destroy_process_group()
    return results


@pytest.mark.parametrize("hosts", [False, True])
def test_again_after_destroy_process_group(ranks: Callable[[int], Pool], hosts: bool) -> None:
    ranks(1)
    for end in crew.run(_twice, 3, size=2, first_rank_hosts=hosts):
        assert end.result == [2.0] * 3, end


ALONE = """
import os, torch, torch.distributed as dist, colrow
from colrow.collectives import communicator
mesh = colrow.init_mesh()
assert (mesh.shape, dist.get_backend()) == ((1, 1), "gloo")
assert torch.equal(communicator(mesh).all_reduce(torch.ones(2)), torch.ones(2))
assert colrow.init_mesh().shape == (1, 1)
dist.destroy_process_group()
colrow.init_mesh(timeout=5)
assert not [thread for thread in __import__("threading").enumerate() if thread.name.startswith("colrow")]
"""


def test_alone_without_any_environment() -> None:
    """No variables, no network, no thread; joined twice, and again after leaving."""
    program = [sys.executable, "-c", ALONE]
    done = subprocess.run(program, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
