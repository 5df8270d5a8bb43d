"""What a parallelized model remembers: its mesh, its plan, and the global layout of each parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.collectives import Communicator
from colrow.layout import TensorLayout
from colrow.mesh import root_mesh
from colrow.modules import names_by_parameter
from colrow.plan import Plan
from colrow.undo import Undo

if TYPE_CHECKING:
    from colrow.apply.sequence import SequenceLength

_ATTRIBUTE = "_colrow_state"


@dataclass(frozen=True)
class PipelineShare:
    """What a rank of a pipeline knows of the whole model, of which it holds some parameters.

    Attributes:
        communicator: the ranks along ``pp``.
        holders: by first name of every parameter of the model, the ranks along ``pp`` that hold it.
        parameter_names: all names of all parameters.
        element_sizes: by the same names, bytes of an element.
        buffers: by name of every buffer, the rank along ``pp`` whose buffer counts.
    """

    communicator: Communicator
    holders: dict[str, tuple[int, ...]]
    parameter_names: frozenset[str]
    element_sizes: dict[str, int]
    buffers: dict[str, int]

    @property
    def names(self) -> frozenset[str]:
        """Names of what other ranks may hold."""
        return self.parameter_names | self.buffers.keys()

    def owns_buffer(self, name: str) -> bool:
        """Whether it is this rank's buffer that counts."""
        return self.buffers.get(name, self.communicator.rank) == self.communicator.rank

    def is_first_holder(self, name: str) -> bool:
        """Whether of the ranks that hold a parameter this is the first: the one on which it counts."""
        return self.holders.get(name, (self.communicator.rank,))[0] == self.communicator.rank


@dataclass(frozen=True)
class ExpertGroup:
    """The experts that ranks divide.

    Attributes:
        ranks: along ``ep``.
        attributes: by the path of each module with experts, the numbers of experts that it had.
    """

    ranks: Communicator
    attributes: dict[str, dict[str, int]]


@dataclass(frozen=True)
class ReplicaGroups:
    """The ranks that train the same parts of a model together, each on its own part of the data.

    Attributes:
        shared: those that hold the same parameters but experts.
        of_experts: those that hold the same experts.
    """

    shared: Communicator
    of_experts: Communicator


@dataclass(frozen=True)
class ParallelState:
    """Attached to the model by ``colrow.parallelize``.

    Attributes:
        mesh: the device mesh.
        communicator: the tensor-parallel group.
        plan: what was applied.
        layouts: by fully qualified name, tied names included, the layout of every parameter and of every
            buffer that is cut.
        undo: what takes back all but the cutting of parameters.
        pipeline: where the other parameters are, if this rank has some stages of the model only.
        experts: what the ranks of ``ep`` divide, if there are such ranks.
        lengths: by name, those of the sequences that are cut between regions.
        replicas: of the model, once :func:`colrow.data_parallel` has been called.
    """

    mesh: DeviceMesh
    communicator: Communicator
    plan: Plan
    layouts: dict[str, TensorLayout]
    undo: Undo
    pipeline: PipelineShare | None = None
    experts: ExpertGroup | None = None
    lengths: Mapping[str, SequenceLength] = field(default_factory=dict)
    replicas: ReplicaGroups | None = None

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank belongs to the first of the model's replicas: the one that writes files.

        That is the group with the first rank of the whole mesh, also if ``mesh`` is one dimension of it; of a
        pipeline, with the first of the ranks that have the same stages.
        """
        root = root_mesh(self.mesh)
        ranks = root.mesh
        if self.pipeline is not None:
            ranks = ranks.select((root.mesh_dim_names or ()).index("pp"), self.pipeline.communicator.rank)
        return int(ranks.flatten()[0]) in self.communicator.global_ranks

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
        experts: the ranks that divide its experts, if they do.
    """

    name: str
    names: tuple[str, ...]
    parameter: nn.Parameter
    layout: TensorLayout
    experts: Communicator | None = None


def attach_state(model: nn.Module, state: ParallelState) -> None:
    """Keep ``state`` on ``model``."""
    setattr(model, _ATTRIBUTE, state)


def detach_state(model: nn.Module) -> None:
    """Forget what :func:`attach_state` kept: the model is no longer parallelized."""
    delattr(model, _ATTRIBUTE)


def parallel_module(model: nn.Module) -> nn.Module:
    """The module that was parallelized: ``model`` itself, or what a wrapper (DDP, PEFT, compile) holds.

    Raises:
        ValueError: if there is none, or more than one.
    """
    if _ATTRIBUTE in vars(model):
        return model  # for each step: clipping asks
    found = [module for module in model.modules() if _ATTRIBUTE in vars(module)]
    if len(found) == 1:
        return found[0]
    kind = type(model).__name__
    if found:
        raise ValueError(f"this {kind} holds {len(found)} parallelized models: pass one of them")
    raise ValueError(f"this {kind} has not been parallelized: call colrow.parallelize first")


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
    """Each parameter of ``model`` once, tied ones under all their names, in the model's order.

    Parameters that were added after ``parallelize``, or that a wrapper adds, count as replicated. Names are
    those within the parallelized module, where it has them.
    """
    module = parallel_module(model)
    state: ParallelState = getattr(module, _ATTRIBUTE)
    names = names_by_parameter(module)
    outer = {} if model is module else names_by_parameter(model)
    for parameter in model.parameters():
        known = tuple(names.get(id(parameter)) or outer[id(parameter)])
        layout = state.layouts.get(known[0]) if id(parameter) in names else None
        experts = state.experts.ranks if state.experts and layout and layout.window else None
        layout = layout or TensorLayout(tuple(parameter.shape))
        yield PlacedParameter(known[0], known, parameter, layout, experts)
