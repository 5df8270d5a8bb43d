"""What all engines ask of a mesh: which ranks share a batch, and which one speaks for them."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from colrow.mesh import coordinate, size_of

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
