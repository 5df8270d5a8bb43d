"""What comes into a recorded model and what leaves it."""

from __future__ import annotations

from torch import nn

from colrow.errors import PlanError
from colrow.parallel.context.found import Found
from colrow.parallel.context.names import positional_names
from colrow.parallel.context.steps import REMEDY
from colrow.plan.places import Path
from colrow.trace.records import ModuleCall, Value


class Doors:
    """Which arguments and results of a model are cut.

    Args:
        model: as recorded.
        found: to which it adds.
    """

    def __init__(self, model: nn.Module, found: Found) -> None:
        self._names, self._found = positional_names(model.forward), found
        self._unused: set[Path] = set()

    def enter(self, root: ModuleCall) -> None:
        """The arguments of a run.

        Raises:
            PlanError: if nothing comes in that can be cut, or it cannot be told what is.
        """
        for path, value in root.inputs:
            extent = self._found.extent_of_all(value)
            if path and isinstance(path[0], int) and path[0] < len(self._names):
                path = (self._names[path[0]], *path[1:])
            dimensions = tuple(self._found.axis.dimensions(value))
            is_constant = not dimensions and bool(dimensions := self._constant(path, value))
            if dimensions and value.source.kind == "input":
                self._found.plan.lengths[path] = dimensions
            if not value.uses:
                self._unused.add(path)
                continue
            if is_constant:
                self._cut(path, dimensions[0])
                self._found.constants.add(value.index)
                continue
            if extent is None or value.source.kind != "input" or value.index in self._found.kept:
                self._found.plan.whole_inputs.add(path)
                continue
            if extent.inner != 1:
                raise PlanError(
                    root.path,
                    f"its input {'.'.join(map(str, path))} has tokens and something else in one dimension",
                    "Give it a dimension of its own for the sequence.",
                )
            is_first = path not in self._found.plan.inputs
            self._cut(path, extent.dimension)
            self._found.cut[value.index] = extent
            if not _counts_on(value, extent.dimension):
                self._found.plan.counting.discard(path)
            elif is_first:
                self._found.plan.counting.add(path)
        if not any(value.index in self._found.cut for _, value in root.inputs):
            raise PlanError(
                root.path,
                "what its attention goes over does not come in as an argument with a row for each token",
                "Give it one for each token; what mixes tokens before attention cannot be cut.",
            )

    def _cut(self, path: Path, dimension: int) -> None:
        if self._found.plan.inputs.setdefault(path, dimension) != dimension:
            raise self._unlike(path)

    @staticmethod
    def _unlike(path: Path) -> PlanError:
        return PlanError(
            "",
            f"its argument {'.'.join(map(str, path))} has a rank's tokens in some calls only",
            "Give examples in which it is used alike.",
        )

    def _constant(self, path: Path, value: Value) -> tuple[int, ...]:
        """The dimensions of an argument that is as long as the sequence, but not used for each token.

        What is done may depend on it. So it must be what it is in the example, which can be said if it is one
        number everywhere. It is cut like the others: the program may compare sizes.
        """
        if value.source.kind != "input":
            return ()
        found = tuple(
            dimension
            for dimension, size in enumerate(value.shape)
            if dimension and size == self._found.axis.length
        )[:1]
        if found and value.uses:
            content = None if value.content is None else value.content.unique()
            if content is None or len(content) != 1:
                raise PlanError(
                    "",
                    f"its argument {'.'.join(map(str, path))} decides what is done with the sequence",
                    "Give it as one number everywhere, or leave it out. " + REMEDY,
                )
            self._found.plan.constants[path] = int(content)
            self._found.axis.alike.update(
                atom.index
                for dimension in found
                for atom in self._found.axes.atoms_of(self._found.axes.dimensions(value)[dimension])
            )
        return found

    def leave(self) -> None:
        """What leaves the model, after all runs.

        Raises:
            PlanError: if it cannot be put together.
        """
        plan = self._found.plan
        plan.whole_inputs |= self._unused - plan.inputs.keys()
        for path in plan.inputs.keys() & plan.whole_inputs:
            raise self._unlike(path)
        for path, value in self._found.trace.outputs:
            extent, made = self._found.cut.get(value.index), value.producer
            if extent is None:
                continue
            if extent.missing:
                raise PlanError(
                    "",
                    f"its result {'.'.join(map(str, path))} lacks the last token",
                    "Return what has all tokens.",
                )
            course = next(
                course
                for root, course in self._found.courses
                if any(value is one for _, one in root.inputs)
                or (made is not None and root.first <= made.index < root.last)
            )
            if self._found.plan.outputs[course].setdefault(path, extent) != extent:
                raise PlanError(
                    "",
                    f"its result {'.'.join(map(str, path))} has its tokens elsewhere in another call",
                    "Give examples whose results have one form.",
                )
        for one in self._found.trace.kept:
            if one.value.index in self._found.cut:
                raise PlanError(
                    "",
                    f"it leaves tokens in {one.label}, where others would find those of one rank only",
                    "Do not keep them there.",
                )


def _counts_on(value: Value, dimension: int) -> bool:
    """Whether the numbers of an argument are positions in one sequence, as far as they are known."""
    content = value.content
    if content is None or content.is_floating_point() or content.shape[dimension] < 2:
        return False
    return bool((content.diff(dim=dimension) == 1).all())
