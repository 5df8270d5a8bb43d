"""What a parallelized model remembers: its mesh, its plan, and the global layout of each parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.collectives import Communicator
from colrow.layout import TensorLayout
from colrow.modules import names_by_parameter
from colrow.plan import Plan

_ATTRIBUTE = "_colrow_state"


@dataclass(frozen=True)
class ParallelState:
    """Attached to the model by ``colrow.parallelize``.

    Attributes:
        mesh: the device mesh.
        communicator: the tensor-parallel group.
        plan: what was applied.
        layouts: by fully qualified name, tied names included, the layout of every parameter.
    """

    mesh: DeviceMesh
    communicator: Communicator
    plan: Plan
    layouts: dict[str, TensorLayout]

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank belongs to the first of the model's replicas: the one that writes files."""
        names = self.mesh.mesh_dim_names or ()
        return all(self.mesh.get_local_rank(name) == 0 for name in names if name != "tp")

    def __deepcopy__(self, memo: dict[int, object]) -> ParallelState:
        return self  # immutable, and process groups cannot be copied


@dataclass(frozen=True)
class PlacedParameter:
    """A parameter once, however many names it has.

    Attributes:
        name: its first name.
        names: all its names.
        parameter: the local tensor.
        layout: where it lies in the global tensor.
    """

    name: str
    names: tuple[str, ...]
    parameter: nn.Parameter
    layout: TensorLayout


def attach_state(model: nn.Module, state: ParallelState) -> None:
    """Keep ``state`` on ``model``."""
    setattr(model, _ATTRIBUTE, state)


def parallel_module(model: nn.Module) -> nn.Module:
    """The module that was parallelized: ``model``, or what DDP or ``torch.compile`` wrapped.

    Raises:
        ValueError: if there is none.
    """
    inner: object = model
    while isinstance(inner, nn.Module):
        if _ATTRIBUTE in vars(inner):
            return inner
        inner = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
    raise ValueError(f"this {type(model).__name__} has not been parallelized: call colrow.parallelize first")


def is_parallelized(model: nn.Module) -> bool:
    """Whether ``model`` carries a state."""
    return _ATTRIBUTE in vars(model)


def state_of(model: nn.Module) -> ParallelState:
    """The state of a parallelized model, also through DDP's and ``torch.compile``'s wrappers.

    Raises:
        ValueError: if the model has not been parallelized.
    """
    state: ParallelState = getattr(parallel_module(model), _ATTRIBUTE)
    return state


def placed_parameters(model: nn.Module) -> Iterator[PlacedParameter]:
    """Each parameter of a parallelized model once, tied ones under all their names, in the model's order."""
    module, state = parallel_module(model), state_of(model)
    names = names_by_parameter(module)
    for name, parameter in module.named_parameters():
        yield PlacedParameter(name, tuple(names[id(parameter)]), parameter, state.layouts[name])
