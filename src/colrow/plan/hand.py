"""Plans written by hand: patterns over module names, each with a style.

    HandPlan(
        axes={"heads": AxisSpec("config.num_attention_heads"), "mlp": AxisSpec()},
        styles={
            "**.attention.qkv": column("heads", parts=3),
            "**.attention.out": row("heads"),
            "**.mlp.up": column("mlp"),
            "**.mlp.down": row("mlp"),
        },
        attributes={"**.attention.split_size": "heads"},
    )

In a pattern ``*`` stands for one name, ``**.`` for any number of them, ``{a,b}`` for either. Later patterns
override earlier ones; a pattern that matches nothing is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from colrow.errors import PlanError
from colrow.layout import Cut, DimensionLayout
from colrow.modules import is_linear, names_by_parameter, ties_of
from colrow.plan.places import ModuleInput, ModuleOutput
from colrow.plan.plan import (
    Axis,
    Entry,
    Exit,
    LocalAttribute,
    Lookup,
    Loss,
    PartialParameter,
    Plan,
    Sharding,
)


@dataclass(frozen=True)
class AxisSpec:
    """How many units an axis has.

    Attributes:
        units: a number, or a path within the model such as ``config.num_key_value_heads``; by default each
            feature of the cut dimension is a unit.
        every_rank: whether every rank must hold a unit. Where there are too few, the axis stays whole.
    """

    units: int | str | None = None
    every_rank: bool = False


@dataclass(frozen=True)
class Style:
    """What happens to the modules that a pattern matches; made by the functions below."""

    kind: Literal["column", "row", "vocab", "replicated"]
    axis: str = ""
    parts: int | tuple[int | str, ...] = 1


def column(axis: str, parts: int | tuple[int | str, ...] = 1) -> Style:
    """Cut the output features of a linear layer.

    ``parts`` describes packed features: 3 for ``[q | k | v]`` of equal size, or their relative sizes as
    numbers or paths within the model: ``("config.num_heads", 2, 2)``.
    """
    return Style("column", axis, parts)


def row(axis: str) -> Style:
    """Cut the input features of a linear layer and sum its results; its bias is added once."""
    return Style("row", axis)


def vocab(axis: str) -> Style:
    """Cut the rows of an embedding."""
    return Style("vocab", axis)


def replicated(inside: str = "") -> Style:
    """Keep the parameters whole. ``inside`` names the axis of the region that the module works in, if any:
    such as a normalisation of each head's queries. Then the parameters' gradients are summed."""
    return Style("replicated", inside)


@dataclass(frozen=True)
class LossSpec:
    """Where logits and loss are; as in :class:`colrow.plan.plan.Loss`."""

    logits: str
    axis: str = "vocab"
    module: str = ""
    labels: str = "labels"
    fused: bool = True


@dataclass(frozen=True)
class HandPlan:
    """Patterns over module names to styles; becomes a :class:`Plan` for one model and number of ranks.

    Attributes:
        axes: by name.
        styles: by pattern over module paths.
        attributes: pattern over paths of integers (``**.attn.split_size``) to the axis they are cut along.
        loss: the layer whose logits go into the model's own loss; ignored if the model does not have it.
        holders: modules that hold a tied parameter without reading it, if the model has them.
        optional: patterns of ``styles`` and ``attributes`` that need not match anything.
    """

    axes: dict[str, AxisSpec]
    styles: dict[str, Style]
    attributes: dict[str, str] = field(default_factory=dict)
    loss: LossSpec | None = None
    holders: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()

    def resolve(self, model: nn.Module, ranks: int, share: Sequence[float] | None = None) -> Plan:
        """The plan for ``model`` over ``ranks`` ranks.

        Args:
            model: real or on the meta device; only names and shapes are read.
            ranks: size of the tensor-parallel group.
            share: relative size of each rank's part, for unequal devices; default: balanced.

        Raises:
            PlanError: if a pattern matches nothing, a style does not fit its module, or no axis has as many
                units as there are ranks.
        """
        return _Resolver(self, model, ranks, share).plan()


def _compile(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern)
    text = text.replace(r"\*\*\.", r"(?:.*\.)?").replace(r"\*", r"[^.]*")
    text = re.sub(
        r"\\{(.*?)\\}", lambda found: "(?:" + "|".join(found[1].replace(r"\,", ",").split(",")) + ")", text
    )
    return re.compile(text + r"\Z")


def look_up(root: Any, path: str) -> Any:
    """The value at a dotted path of attributes and indices below ``root``."""
    value = root
    for name in path.split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value


class _Resolver:
    def __init__(self, spec: HandPlan, model: nn.Module, ranks: int, share: Sequence[float] | None) -> None:
        if share is not None and len(share) != ranks:
            raise PlanError("", f"share has {len(share)} values for {ranks} ranks", "Give one per rank.")
        self.spec, self.model, self.ranks, self.share = spec, model, ranks, share
        self.modules = dict(model.named_modules())
        self.names_of = names_by_parameter(model)
        self.axes: dict[str, Axis] = {}
        self.whole: dict[str, str] = {}
        self.parameters: dict[str, Sharding] = {}

    def plan(self) -> Plan:
        styles = self._match_styles()
        columns: dict[str, list[str]] = {}
        exits, lookups = [], []
        for path, style in styles.items():
            if style.kind != "replicated" and self._cut_module(path, style):
                if style.kind == "column":
                    columns.setdefault(path.rpartition(".")[0], []).append(path)
                elif style.kind == "row":
                    exits.append(Exit(ModuleOutput(path)))
                else:
                    lookups.append(Lookup(ModuleOutput(path), self.parameters[f"{path}.weight"].axis))
        # which axes are cut is known only now
        partial = [one for path, style in styles.items() for one in self._partial_parameters(path, style)]
        partial += [
            PartialParameter(name, name.rpartition(".")[0])
            for name, sharding in self.parameters.items()
            if sharding.layout.is_shared(self.axes[sharding.axis].cut)
        ]
        loss = self._loss()
        self._check_regions(styles, loss)
        if self.ranks > 1 and self.whole and not self.axes:
            raise PlanError(
                "",
                f"no axis can be cut over {self.ranks} ranks: " + "; ".join(self.whole.values()),
                "Use fewer ranks.",
            )
        for axis in self.spec.attributes.values():
            if axis in self.axes:
                self.axes[axis] = replace(self.axes[axis], fitted=self.axes[axis].cut.counts)
        return Plan(
            ranks=self.ranks,
            axes=self.axes,
            parameters=self.parameters,
            entries=tuple(
                Entry(tuple(ModuleInput(path, (0,)) for path in paths)) for paths in columns.values()
            ),
            exits=tuple(exits),
            lookups=tuple(lookups),
            partial_parameters=tuple(partial),
            attributes=tuple(self._attributes()),
            loss=loss,
            holders=tuple(path for path in self.spec.holders if path in self.modules),
            shapes={
                name: tuple(one.shape) for name, one in self.model.named_parameters(remove_duplicate=False)
            },
            ties=ties_of(self.model),
            by_hand=True,
            notes=tuple(self.whole.values()),
        )

    def _match_styles(self) -> dict[str, Style]:
        found: dict[str, Style] = {}
        for pattern, style in self.spec.styles.items():
            matcher = _compile(pattern)
            paths = [path for path in self.modules if matcher.match(path)]
            if not paths and pattern not in self.spec.optional:
                raise PlanError(
                    pattern, "the pattern matches no module of the model", "Correct or remove it."
                )
            for path in paths:
                found.pop(path, None)
                found[path] = style
        order = {path: index for index, path in enumerate(self.modules)}
        return dict(sorted(found.items(), key=lambda item: order[item[0]]))

    def _axis(self, name: str, path: str, size: int) -> Axis | None:
        """The axis, or ``None`` if it stays whole."""
        if name not in self.spec.axes:
            raise PlanError(path, f"the axis {name!r} is not among {list(self.spec.axes)}", "Add it to axes.")
        spec = self.spec.axes[name]
        units = spec.units
        if isinstance(units, str):
            try:
                units = int(look_up(self.model, units))
            except (AttributeError, IndexError, TypeError, ValueError) as error:
                raise PlanError(
                    path,
                    f"the units of axis {name!r} are not at {spec.units!r} ({error})",
                    "Correct the path.",
                ) from error
        elif units is None:
            units = size
            if name in self.axes and self.axes[name].cut.units != size:
                name = f"{name}[{size}]"
        if spec.every_rank and units < self.ranks:
            self.whole[name] = (
                f"axis {name} stays whole: its {units} units cannot give each of {self.ranks} ranks one"
            )
            return None
        if name not in self.axes:
            cut = Cut.weighted(units, self.share) if self.share else Cut.balanced(units, self.ranks)
            self.axes[name] = Axis(name, cut)
        return self.axes[name]

    def _cut_module(self, path: str, style: Style) -> bool:
        """Note the shardings of the module's parameters; ``False`` if its axis stays whole."""
        module = self.modules[path]
        expected = isinstance(module, nn.Embedding) if style.kind == "vocab" else is_linear(module)
        if not expected:
            kind = "an embedding" if style.kind == "vocab" else "a plain linear layer"
            raise PlanError(
                path,
                f"style {style.kind!r} needs {kind}, not {type(module).__name__}",
                "Correct the pattern.",
            )
        weight = module.get_parameter("weight")
        # nn.Linear and nn.Embedding hold what they produce (features, rows) first, Conv1D last
        first = 0 if isinstance(module, nn.Linear | nn.Embedding) else 1
        dimension = 1 - first if style.kind == "row" else first
        size = weight.shape[dimension]
        axis = self._axis(style.axis, path, size)
        if axis is None:
            return False
        layout = self._layout(path, style, size, axis.cut.units)
        self._shard(f"{path}.weight", Sharding(axis.name, dimension, layout))
        if style.kind == "column" and getattr(module, "bias", None) is not None:
            self._shard(f"{path}.bias", Sharding(axis.name, 0, layout))
        return True

    def _layout(self, path: str, style: Style, size: int, units: int) -> DimensionLayout:
        if isinstance(style.parts, int):
            shares = [1] * style.parts
        else:
            shares = [
                part if isinstance(part, int) else int(look_up(self.model, part)) for part in style.parts
            ]
        try:
            if size % sum(shares):
                raise ValueError(f"{size} features cannot be split into parts in proportion {shares}")
            return DimensionLayout.packed([size // sum(shares) * share for share in shares], units)
        except ValueError as error:
            raise PlanError(
                path, str(error), f"Correct the units or parts of axis {style.axis!r}."
            ) from error

    def _shard(self, name: str, sharding: Sharding) -> None:
        """Note the sharding under all names of the parameter; tied ones must agree."""
        for alias in self.names_of[id(self.model.get_parameter(name))]:
            other = self.parameters.setdefault(alias, sharding)
            if other != sharding:
                raise PlanError(
                    name, f"tied to {alias}, which is cut differently", "Give both the same axis and parts."
                )

    def _partial_parameters(self, path: str, style: Style) -> list[PartialParameter]:
        if style.kind != "replicated" or not style.axis:
            return []
        own = [f"{path}.{name}" for name, _ in self.modules[path].named_parameters(recurse=False)]
        if not own:
            raise PlanError(path, "it has no parameters of its own", "Name the modules that hold them.")
        if style.axis not in self.spec.axes:
            raise PlanError(path, f"there is no axis {style.axis!r}", f"Name one of {list(self.spec.axes)}.")
        is_cut = any(name == style.axis or name.startswith(f"{style.axis}[") for name in self.axes)
        return [PartialParameter(name, path) for name in own] if is_cut else []

    def _attributes(self) -> list[LocalAttribute]:
        found = []
        for pattern, axis in self.spec.attributes.items():
            if axis not in self.spec.axes:
                raise PlanError(pattern, f"there is no axis {axis!r}", f"Name one of {list(self.spec.axes)}.")
            if axis in self.whole:
                continue
            if axis not in self.axes:
                raise PlanError(pattern, f"no layer is cut along {axis!r}", "Give a layer that axis.")
            parent, _, attribute = pattern.rpartition(".")
            matcher = _compile(parent)
            paths = [
                path
                for path, module in self.modules.items()
                if matcher.match(path) and hasattr(module, attribute)
            ]
            if not paths and pattern not in self.spec.optional:
                raise PlanError(pattern, "the pattern matches no attribute", "Correct or remove it.")
            for path in paths:
                value = getattr(self.modules[path], attribute)
                units = self.axes[axis].cut.units
                if not isinstance(value, int) or value % units:
                    raise PlanError(
                        path,
                        f"{attribute} = {value!r} is no multiple of {units} units",
                        "Correct the pattern.",
                    )
                counts = self.axes[axis].cut.counts
                values = tuple(value // units * count for count in counts)
                found.append(LocalAttribute(path, attribute, values))
        return found

    def _loss(self) -> Loss | None:
        spec = self.spec.loss
        if spec is None or spec.axis in self.whole or spec.logits not in self.modules:
            return None
        if spec.axis not in self.axes:
            raise PlanError(spec.logits, f"no layer is cut along {spec.axis!r}", "Correct the loss's axis.")
        return Loss(spec.module, spec.logits, spec.axis, spec.labels, spec.fused)

    def _check_regions(self, styles: dict[str, Style], loss: Loss | None) -> None:
        closed = {style.axis for style in styles.values() if style.kind == "row"}
        for path, style in styles.items():
            is_logits = loss is not None and path == loss.logits
            if style.kind == "column" and style.axis not in closed | self.whole.keys() and not is_logits:
                raise PlanError(
                    path,
                    f"its features are cut along {style.axis!r}, but no row-parallel layer sums over them",
                    "Add a row style for the layer that reads them, or a loss.",
                )
