"""A plan as data: which axes are cut, which parameters lie on them, and where each collective sits.

A plan says nothing of where it came from: it is derived from a model's dataflow or written by hand, it can
be printed, written to a file and read again, and ``colrow.parallelize`` does what it says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Literal

from colrow.layout import Cut, DimensionLayout, TensorLayout
from colrow.plan.places import CallArgument, CallResult, ModuleOutput, Place
from colrow.plan.prediction import Prediction

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Axis:
    """A set of tensor dimensions that are cut alike.

    Attributes:
        name: such as ``heads``, ``mlp`` or ``vocab``.
        cut: how its units are divided over the ranks.
        fitted: the counts of the cut for which the plan's attributes and integers were worked out; empty if
            none depends on the axis.
    """

    name: str
    cut: Cut
    fitted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sharding:
    """A tensor's cut dimension: the axis it lies on and how the axis's units lie in it."""

    axis: str
    dimension: int
    layout: DimensionLayout


@dataclass(frozen=True)
class Along:
    """The dimension of a value along which it is cut between regions: a sequence of any length, evenly.

    ``sequence`` names it; values of one name have one length.
    """

    sequence: str
    dimension: int


@dataclass(frozen=True)
class Entry:
    """I → R: one value enters a region at ``places``. One all-reduce in the backward pass.

    Several places share the entry as far as they are given the same tensor.

    Attributes:
        repeated: whether some place is given the same tensor more than once, as a layer that is called twice
            on one value: it is remembered until the model's forward ends.
    """

    places: tuple[Place, ...]
    repeated: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules at whose input or output it acts, or within which it does."""
        return tuple(place.module for place in self.places)


@dataclass(frozen=True)
class Exit:
    """P → I: the value at ``place`` is a partial sum. One all-reduce forward.

    At the output of a linear layer whose input features are cut, the bias is added after the reduction.

    With ``along`` each rank gets a part of the sum, P → V: a reduce-scatter forward, an all-gather backward.
    """

    place: ModuleOutput | CallResult
    along: Along | None = None

    @property
    def module(self) -> str:
        """Path of the module whose output it is, or within which it is computed."""
        return self.place.module


@dataclass(frozen=True)
class Lookup:
    """A table whose rows are cut: masked lookup and one all-reduce in the forward pass.

    ``place`` is the output of an ``nn.Embedding``, or the result of a call of ``F.embedding``. ``along`` is
    as of :class:`Exit`.
    """

    place: ModuleOutput | CallResult
    axis: str
    along: Along | None = None

    @property
    def module(self) -> str:
        """Path of the module that looks up."""
        return self.place.module


@dataclass(frozen=True)
class PartSlice:
    """I → V: the value at ``place`` is computed whole on every rank, which goes on with its part of it.

    For what depends on the index along an axis, such as the slopes of ALiBi. Backward, the parts of the
    gradient are gathered.
    """

    place: Place
    sharding: Sharding


@dataclass(frozen=True)
class Gather:
    """V → I: the parts of the value at ``place`` are put together on every rank.

    With ``always`` also where the caller wants local logits: the model itself computes with all of them.
    """

    place: ModuleOutput | CallResult
    sharding: Sharding
    always: bool = False


@dataclass(frozen=True)
class SequenceGather:
    """The parts of a sequence are put together at ``places``, shared as those of an :class:`Entry`.

    Attributes:
        places: where.
        along: the dimension.
        gradient: ``partial``: they enter a region, V → R: an all-gather forward, a reduce-scatter backward.
            ``whole``: for what needs the whole between regions, V → I: an all-gather forward; backward each
            rank takes its part.
        again: paths of the linear layers that read the whole and keep the part: an all-gather backward.
    """

    places: tuple[Place, ...]
    along: Along
    gradient: Literal["partial", "whole"] = "partial"
    again: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules at whose input or output it acts, or within which it does."""
        return tuple(place.module for place in self.places)


@dataclass(frozen=True)
class SequenceSlice:
    """I → V: each rank goes on with its part of the sequence. Backward, an all-gather."""

    place: Place
    along: Along


@dataclass(frozen=True)
class PartialParameter:
    """A parameter that several ranks hold and ``reader`` reads inside a region: its gradients are summed.

    Over all ranks if it is replicated; if it is cut so that ranks share parts of it, over those that share.
    """

    name: str
    reader: str


@dataclass(frozen=True)
class OnceParameter:
    """A replicated parameter, such as a bias, that ``reader`` adds to a partial sum: one rank adds it."""

    name: str
    reader: str


@dataclass(frozen=True)
class LocalAttribute:
    """A Python integer of a module that must become this rank's part of it, such as a split size.

    ``attribute`` may be a path, as ``config.num_heads``: then the first object is copied for this module.
    ``values`` has one number for each rank.
    """

    module: str
    attribute: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class LocalInteger:
    """An integer among the arguments of a call that must become this rank's.

    Attributes:
        place: the argument.
        given: what the program gives on each rank.
        values: what it should be on each rank; a list of sizes in place of the size of equal pieces. Where
            the call is given a multiple of ``given``, because of another batch size, the rank's number is
            multiplied likewise.
    """

    place: CallArgument
    given: tuple[int, ...]
    values: tuple[int | tuple[int, ...], ...]


@dataclass(frozen=True)
class OwnRandomness:
    """The random numbers that ``module`` draws differ by rank, because what they are used on is cut.

    Within it the modules ``whole`` draw for values that are the same on all ranks. With ``always`` it draws
    in evaluation mode too.
    """

    module: str
    whole: tuple[str, ...] = ()
    always: bool = False


@dataclass(frozen=True)
class Loss:
    """The output of ``logits`` is cut over ``axis`` and goes into the loss that ``module`` computes itself.

    Attributes:
        module: path of the module whose forward calls ``F.cross_entropy`` when it is given labels.
        logits: path of the column-parallel layer that computes the logits.
        axis: the vocabulary.
        labels: name of the forward's argument that asks for the loss.
        fused: whether the loss computes logits itself, for some tokens at a time, where it can.
    """

    module: str
    logits: str
    axis: str
    labels: str = "labels"
    fused: bool = True


@dataclass(frozen=True)
class Plan:
    """What is cut over ``ranks`` ranks, and what is communicated where.

    Attributes:
        ranks: size of the tensor-parallel group.
        axes: by name.
        parameters, buffers: by fully qualified name; what is not named stays replicated.
        entries, exits, lookups, slices, gathers: what happens to values.
        sequence_gathers, sequence_slices: what happens to values that are cut along a sequence.
        partial_parameters, once_parameters: what happens to replicated parameters.
        attributes, integers: numbers that become local.
        randomness: modules whose random numbers differ by rank.
        loss: the vocabulary-parallel loss, if the model computes one.
        holders: modules that hold a tied parameter without reading it.
        shapes: global shapes of all parameters and buffers that the plan was made for; empty if unknown.
        ties: of parameters with several names, the first name by each of the others.
        by_hand: whether it was written by hand. Then random numbers differ by rank between the layers that
            enter and leave a region, and parameters that are cut must be those of layers that know.
        notes: what stayed whole against expectation, and why; for people.
        prediction: collectives of a step, as derived; ``None`` if unknown.
    """

    ranks: int
    axes: dict[str, Axis] = field(default_factory=dict)
    parameters: dict[str, Sharding] = field(default_factory=dict)
    buffers: dict[str, Sharding] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    exits: tuple[Exit, ...] = ()
    lookups: tuple[Lookup, ...] = ()
    slices: tuple[PartSlice, ...] = ()
    gathers: tuple[Gather, ...] = ()
    sequence_gathers: tuple[SequenceGather, ...] = ()
    sequence_slices: tuple[SequenceSlice, ...] = ()
    partial_parameters: tuple[PartialParameter, ...] = ()
    once_parameters: tuple[OnceParameter, ...] = ()
    attributes: tuple[LocalAttribute, ...] = ()
    integers: tuple[LocalInteger, ...] = ()
    randomness: tuple[OwnRandomness, ...] = ()
    loss: Loss | None = None
    holders: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    by_hand: bool = False
    notes: tuple[str, ...] = ()
    prediction: Prediction | None = None

    def tensor_layout(self, name: str, shape: tuple[int, ...]) -> TensorLayout:
        """The layout of the parameter or buffer ``name``, whose global shape is ``shape``."""
        sharding = self.parameters.get(name) or self.buffers.get(name)
        if sharding is None:
            return TensorLayout(shape)
        return TensorLayout(shape, {sharding.dimension: (sharding.layout, self.axes[sharding.axis].cut)})

    def explain(self) -> str:
        """The plan as a table for people: axes with their cuts, actions, cost, and what stayed whole."""
        from colrow.plan.explain import explain

        return explain(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan to a YAML file that can be read, edited and loaded again."""
        from colrow.plan.file import save

        save(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan that :meth:`save` has written.

        Raises:
            PlanError: if the file does not hold a plan; names the entry at fault.
        """
        from colrow.plan.file import load

        return load(path)

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            PlanError: lists the parameters and buffers that are missing, new or of another shape.
        """
        from colrow.plan.difference import check_model

        check_model(self, model)

    def diff(self, other: Plan) -> str:
        """What would have to change to make this plan ``other``, as lines; empty if they are equal."""
        from colrow.plan.difference import diff

        return diff(self, other)
