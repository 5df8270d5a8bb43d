"""A save that fails on one rank fails on all, at once; replicas neither write nor return too early."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh

import colrow
from colrow import checkpoint
from colrow.checkpoint import pretrained
from colrow.checkpoint.writer import SafetensorsWriter
from colrow.collectives import communicator
from colrow.layout import TensorLayout
from tests.checkpoint.perceptron import cut, whole
from tests.pool import Pool, worker_mesh


def _fail(error: Exception) -> Callable[..., None]:
    def raising(*arguments: Any, **options: Any) -> None:
        raise error

    return raising


def _failing(folder: Path, case: str) -> tuple[str, str, float]:
    """How each rank of 2 x 2 fails, and that the ranks are still in step afterwards."""
    mesh = worker_mesh(2, 2)
    model = cut(mesh)
    target = folder
    patch: Any = mock.patch.object(pretrained, "_save_configurations")
    full = _fail(OSError(errno.ENOSPC, "No space left on device"))
    if case == "folder is a file":
        target = folder / "file"
        target.touch()
    elif case == "dtype":
        model.register_buffer("spectrum", torch.ones(2, dtype=torch.complex128))
    elif case == "disk full":
        patch = mock.patch.object(SafetensorsWriter, "_map", full)
    elif case == "disk fails":
        patch = mock.patch.object(SafetensorsWriter, "finish", full)
    elif case == "tensor":
        patch = mock.patch.object(TensorLayout, "place", _fail(RuntimeError("does not fit")))
    elif case == "configuration":
        patch = mock.patch.object(pretrained, "_save_configurations", _fail(TypeError("not serialisable")))
    begin = time.perf_counter()
    with patch, pytest.raises(Exception, match=r"\w") as caught:
        checkpoint.save_pretrained(model, target, bytes_per_file=100)
    seconds = time.perf_counter() - begin
    checkpoint.save_pretrained(cut(mesh), folder / "good")
    return type(caught.value).__name__, str(caught.value), seconds


@pytest.mark.parametrize(
    ("case", "own", "others", "reported"),
    [
        ("folder is a file", "FileExistsError", "OSError", "FileExistsError"),
        ("disk full", "OSError", "OSError", "OSError: [Errno 28] No space left on device"),
        ("disk fails", "OSError", "OSError", "OSError: [Errno 28] No space left on device"),
        ("tensor", "RuntimeError", "OSError", "RuntimeError: does not fit"),
        ("configuration", "TypeError", "OSError", "TypeError: not serialisable"),
        ("dtype", "ValueError", "ValueError", "complex128, which safetensors cannot store"),
    ],
)
def test_all_ranks_fail_with_the_cause(
    ranks: Callable[[int], Pool], tmp_path: Path, case: str, own: str, others: str, reported: str
) -> None:
    results = ranks(4).run(_failing, tmp_path, case)
    assert [kind for kind, _, _ in results] == [own, others, others, others]
    assert reported in f"{results[0][0]}: {results[0][1]}"
    assert all(reported in text for _, text, _ in results[1:])
    if case != "dtype":
        assert all("failed on rank 0, which reported" in text for _, text, _ in results[1:])
    assert all(seconds < 20 for _, _, seconds in results)  # none waited for the others' timeout of 60
    left = [path.name for path in tmp_path.iterdir() if path.name != "file"]
    assert left == ["good"]
    found = load_file(tmp_path / "good" / "model.safetensors")
    assert torch.equal(found["0.weight"], whole()[0].weight)


def _not_replicas(folder: Path) -> None:
    mesh = worker_mesh(2, 2)
    model = cut(mesh, 6 + 2 * mesh.get_local_rank("dp"))
    with pytest.raises(ValueError, match="must be replicas of one model"):
        checkpoint.save_pretrained(model, folder)


def test_other_models_along_dp(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    ranks(4).run(_not_replicas, tmp_path)
    assert not list(tmp_path.iterdir())


def _slow(seconds: float) -> Any:
    finish = SafetensorsWriter.finish

    def later(writer: SafetensorsWriter) -> None:
        time.sleep(seconds)
        finish(writer)

    return mock.patch.object(SafetensorsWriter, "finish", later)


def _replicas(folder: Path, sliced: bool) -> tuple[bool, bool, bool]:
    mesh = worker_mesh(2, 2)
    model = cut(mesh["tp"] if sliced else mesh)
    optimizer = torch.optim.SGD(model.parameters())
    with _slow(0.7):
        checkpoint.save_pretrained(model, folder)
        saved = (folder / "model.safetensors").exists()
        checkpoint.save_optimizer(model, optimizer, folder)
    return colrow.state_of(model).is_first_replica, saved, (folder / "optimizer.safetensors").exists()


@pytest.mark.parametrize("sliced", [False, True])
def test_replicas(ranks: Callable[[int], Pool], tmp_path: Path, sliced: bool) -> None:
    """Also if the model was given the tp dimension alone, one replica writes, and the others wait for it."""
    results = ranks(4).run(_replicas, tmp_path, sliced)
    assert results == [(True, True, True)] * 2 + [(False, True, True)] * 2
    assert torch.equal(load_file(tmp_path / "model.safetensors")["2.weight"], whole()[2].weight)


def _strangers(folder: Path) -> str:
    """Two meshes that do not know of each other, one folder."""
    mesh = worker_mesh(2, 2)
    alone = DeviceMesh.from_group(mesh.get_group("tp"), "cpu", mesh_dim_names=("tp",))
    model = cut(alone)
    for name in ("tp", "dp"):
        communicator(mesh[name]).barrier()
    try:
        with _slow(1.0):
            checkpoint.save_pretrained(model, folder)
    except OSError as error:
        return str(error)
    return "saved"


def test_two_groups_save_into_one_folder(ranks: Callable[[int], Pool], tmp_path: Path) -> None:
    results = ranks(4).run(_strangers, tmp_path)
    failed = results[:2] if results[2] == "saved" else results[2:]
    assert sorted(results, key=lambda text: text == "saved")[2:] == ["saved", "saved"]
    assert all("another process is saving into" in text for text in failed)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["2.weight"], whole()[2].weight)
