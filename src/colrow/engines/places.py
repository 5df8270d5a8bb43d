"""What all engines ask of a mesh: which ranks share a batch, and which one speaks for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colrow.collectives import Communicator
from colrow.mesh import coordinate, size_of
from colrow.replicas import first_difference

_TAKEN = ("dp", "tp")


def require_replicas_and_parts(mesh: DeviceMesh, engine: str) -> None:
    """Engines know ranks that have different data, and are told here of those that share theirs.

    Raises:
        ValueError: if the mesh has no dimension ``dp`` or ``tp``, or others that are larger than 1.
    """
    names = mesh.mesh_dim_names or ()
    others = [name for name in names if name not in _TAKEN and size_of(mesh, name) > 1]
    if others or any(name not in names for name in _TAKEN):
        raise ValueError(
            f"{engine} takes a mesh from colrow.init_mesh(tp=..., dp=...), not one of {', '.join(names)}"
        )


def speaks_for_replica(mesh: DeviceMesh) -> bool:
    """Whether this rank is the first of those that compute with one batch."""
    return coordinate(mesh, "tp") == 0


def require_same_batch(values: Iterable[Any], ranks: Communicator) -> None:
    """The ranks of a replica compute with one batch: else their parts are of different models' gradients.

    Args:
        values: what this rank's batch holds; tensors of them are compared.
        ranks: the tensor-parallel group. One collective of two numbers for each tensor.

    Raises:
        ValueError: if the batches differ; on all ranks.
    """
    tensors = [one for one in values if isinstance(one, Tensor)]
    if first_difference(tensors, ranks, "compare the ranks' batches") is not None:
        raise ValueError(
            f"the {ranks.size} ranks of a replica have different batches, which trains no model: let "
            "samplers and loaders divide data over dp alone, and seed what draws random numbers alike on all "
            "ranks of a tp group"
        )
