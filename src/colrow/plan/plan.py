"""A plan as data: which axes are cut, which parameters lie on them, and where each collective sits.

A plan says nothing of where it came from: it is derived from a model's dataflow or written by hand, it can
be printed, and ``colrow.parallelize`` does what it says.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from colrow.layout import Cut, DimensionLayout, TensorLayout


@dataclass(frozen=True)
class Axis:
    """A set of tensor dimensions that are cut alike.

    Attributes:
        name: such as ``heads``, ``mlp`` or ``vocab``.
        cut: how its units are divided over the ranks.
    """

    name: str
    cut: Cut


@dataclass(frozen=True)
class Sharding:
    """A parameter's cut dimension: the axis it lies on and how the axis's units lie in it."""

    axis: str
    dimension: int
    layout: DimensionLayout


@dataclass(frozen=True)
class Entry:
    """I → R: one value enters a region, to be read by ``modules``. One all-reduce in the backward pass.

    Several modules share the entry as far as they are given the same tensor.
    """

    modules: tuple[str, ...]


@dataclass(frozen=True)
class Exit:
    """P → I: the output of ``module`` is a partial sum: one all-reduce forward, the bias added after it."""

    module: str


@dataclass(frozen=True)
class Lookup:
    """``module`` is an embedding whose rows are cut: masked lookup and one all-reduce in the forward pass."""

    module: str


@dataclass(frozen=True)
class PartialParameter:
    """A replicated parameter that is read inside a region: its gradients are summed over the ranks."""

    name: str


@dataclass(frozen=True)
class LocalAttribute:
    """A Python integer of a module that must become this rank's part of it, such as a split size.

    ``attribute`` may be a path, as ``config.num_heads``: then the first object is copied for this module.
    """

    module: str
    attribute: str
    axis: str


@dataclass(frozen=True)
class Loss:
    """The output of ``logits`` is cut over ``axis`` and goes into the loss that ``module`` computes itself.

    Attributes:
        module: path of the module whose forward calls ``F.cross_entropy`` when it is given labels.
        logits: path of the column-parallel layer that computes the logits.
        axis: the vocabulary.
        labels: name of the forward's argument that asks for the loss.
    """

    module: str
    logits: str
    axis: str
    labels: str = "labels"


@dataclass(frozen=True)
class Plan:
    """What is cut over ``ranks`` ranks, and what is communicated where.

    Attributes:
        ranks: size of the tensor-parallel group.
        axes: by name.
        parameters: by fully qualified name; what is not named stays replicated.
        entries, exits, lookups, partial_parameters, attributes: the actions.
        loss: the vocabulary-parallel loss, if the model computes one.
        holders: modules that hold a tied parameter without reading it.
        notes: what stayed whole against expectation, and why; for people.
    """

    ranks: int
    axes: dict[str, Axis] = field(default_factory=dict)
    parameters: dict[str, Sharding] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    exits: tuple[Exit, ...] = ()
    lookups: tuple[Lookup, ...] = ()
    partial_parameters: tuple[PartialParameter, ...] = ()
    attributes: tuple[LocalAttribute, ...] = ()
    loss: Loss | None = None
    holders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def tensor_layout(self, name: str, shape: tuple[int, ...]) -> TensorLayout:
        """The layout of the parameter ``name``, whose global shape is ``shape``."""
        sharding = self.parameters.get(name)
        if sharding is None:
            return TensorLayout(shape)
        return TensorLayout(shape, {sharding.dimension: (sharding.layout, self.axes[sharding.axis].cut)})

    def explain(self) -> str:
        """The plan as text: axes with their cuts, the actions, and what stayed whole."""
        lines = [f"plan over {self.ranks} ranks"]
        for axis in self.axes.values():
            members = [name for name, sharding in self.parameters.items() if sharding.axis == axis.name]
            lines.append(
                f"  axis {axis.name}: {axis.cut.units} units cut {list(axis.cut.counts)}, "
                f"{len(members)} parameters, such as {members[0] if members else 'none'}"
            )
        lines.append(
            f"  {len(self.entries)} entries (all-reduce backward), {len(self.exits)} exits and "
            f"{len(self.lookups)} lookups (all-reduce forward)"
        )
        if self.partial_parameters:
            lines.append(f"  {len(self.partial_parameters)} replicated parameters with summed gradients")
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)
