"""Values that are cut along a sequence between regions: taking parts, and putting them together.

The length of a sequence is known where a value is whole. Where parts are gathered, the lengths of all parts
follow from the last length that was seen. When activations are recomputed in a backward pass, another call of
the model may have been the last; where the length is then not certain, the ranks tell each other.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor

from colrow.apply.kept_parts import KeptParts
from colrow.collectives import AllGather, AllReduce, Communicator, ReduceScatter, Slice
from colrow.collectives.statistics import current_phase
from colrow.layers import SharedEntry
from colrow.layers.inputs import GatheredInput
from colrow.layout import Cut


class SequenceLength:
    """The lengths that the values of one sequence have, whole and on each rank.

    Args:
        ranks: the tensor-parallel group.
        name: of the sequence, for errors and statistics.
    """

    def __init__(self, ranks: Communicator, name: str) -> None:
        self.ranks, self.name = ranks, name
        self._latest = 0
        self._seen: set[int] = set()

    def __deepcopy__(self, memo: dict[int, object]) -> SequenceLength:
        copied = SequenceLength(self.ranks, self.name)
        memo[id(self)] = copied
        return copied

    def is_cut(self) -> bool:
        """Whether ranks have parts in this call of the model.

        Not where nothing is trained and there are fewer tokens than ranks, as in the later steps of a
        generation: programs may not expect tensors without any element.
        """
        return torch.is_grad_enabled() or self._latest >= self.ranks.size

    def parts(self, length: int) -> tuple[int, ...]:
        """The lengths of the parts of a value whose length is ``length``; it is noted as the latest."""
        self._latest = length
        self._seen.add(length)
        return self._parts(length)

    def _parts(self, length: int) -> tuple[int, ...]:
        return Cut.balanced(length, self.ranks.size).counts

    @property
    def latest(self) -> int:
        """The latest length that was seen; 0 before the first, and after :meth:`forget`."""
        return self._latest

    def forget(self) -> None:
        """Take no length to be the latest."""
        self._latest = 0

    def parts_around(self, part: Tensor, dimension: int) -> tuple[int, ...]:
        """The lengths of all parts, given this rank's.

        Raises:
            ValueError: if the part is not one of the latest length.
        """
        local, rank = part.shape[dimension], self.ranks.rank
        # what is compiled is a forward pass, also where its activations are recomputed
        is_backward = not torch.compiler.is_compiling() and current_phase() == "backward"
        if is_backward and self._is_uncertain(local):
            lengths = torch.tensor([local], device=part.device)
            return tuple(self.ranks.all_gather(lengths, 0, label=f"length of {self.name}").tolist())
        parts = self._parts(self._latest)
        if is_backward and parts[rank] != local:
            parts = self._parts(next(one for one in self._seen if self._parts(one)[rank] == local))
        if parts[rank] != local:
            raise ValueError(
                f"got {local} tokens of {self.name}, of which the rank has {parts[rank]} of {self._latest}: "
                "call the model as in the examples that the plan was made from"
            )
        return parts

    def _is_uncertain(self, local: int) -> bool:
        """Whether some rank cannot tell which length is meant; the same on all ranks.

        Two lengths give a rank the same part only if they differ by less than the number of ranks.
        """
        rank, near = self.ranks.rank, range(1, self.ranks.size)
        mine = [one for one in self._seen if self._parts(one)[rank] == local]
        return any(one + step in self._seen or one - step in self._seen for one in mine for step in near)


class ScatterSequence:
    """P → V: this rank's part of a sum.

    Args:
        length: of the sequence.
        label: names the collective in errors and statistics.
        dimension: along which the sequence lies.
    """

    def __init__(self, length: SequenceLength, label: str, dimension: int) -> None:
        self._length, self._label, self._dimension = length, label, dimension

    def collective(self, value: Tensor) -> AllReduce | ReduceScatter:
        """What gives the part of a value, or all of it where nothing is cut."""
        ranks = self._length.ranks
        parts = self._length.parts(value.shape[self._dimension])
        if not self._length.is_cut():
            return AllReduce(ranks, self._label)
        return ReduceScatter(ranks, self._label, self._dimension, parts)

    def __call__(self, value: Tensor) -> Tensor:
        """The part."""
        return self.collective(value)(value)


class SliceSequence:
    """I → V: this rank's part of what all ranks have. Arguments as of :class:`ScatterSequence`."""

    def __init__(self, length: SequenceLength, label: str, dimension: int) -> None:
        self._length, self._label, self._dimension = length, label, dimension

    def __call__(self, value: Tensor) -> Tensor:
        """The part."""
        parts = self._length.parts(value.shape[self._dimension])
        if not self._length.is_cut():
            return value
        return Slice(self._length.ranks, self._label, self._dimension, parts, "I")(value)


class GatherSequence(SharedEntry):
    """V → R or V → I: the parts of all ranks, once for all places that are given the same part.

    Args:
        length, label, dimension: as of :class:`ScatterSequence`.
        dst: ``"R"`` where a region begins, ``"I"`` between regions.
        members: as of :class:`colrow.layers.SharedEntry`.
    """

    is_always_needed = True

    def __init__(
        self,
        length: SequenceLength,
        label: str,
        dimension: int,
        dst: Literal["I", "R"],
        members: int = 0,
    ) -> None:
        super().__init__(length.ranks, label, members)
        self._length, self._label, self._dimension, self._dst = length, label, dimension, dst
        self.readers: KeptParts | None = None
        """The linear layers that read the whole and keep the part."""

    def __deepcopy__(self, memo: dict[int, object]) -> GatherSequence:
        length = memo.get(id(self._length)) or self._length.__deepcopy__(memo)
        assert isinstance(length, SequenceLength)
        copied = GatherSequence(length, self._label, self._dimension, self._dst, self._members)
        memo[id(self)] = copied
        copied.readers = copy.deepcopy(self.readers, memo)
        return copied

    def product(self, number: int, value: Tensor) -> Tensor | None:
        """``None``: each layer multiplies by itself."""
        return None

    def __call__(self, value: Tensor) -> Tensor:
        """The whole; ``value`` itself where nothing is cut."""
        return super().__call__(value) if self._length.is_cut() else value

    def enter(self, value: Tensor) -> Tensor:
        """The whole."""
        parts = self._length.parts_around(value, self._dimension)
        whole = AllGather(self._length.ranks, self._label, self._dimension, parts, self._dst)(value)
        if self.readers is not None and not torch.compiler.is_compiling():
            again = GatheredInput(self._length.ranks, self._label, self._dimension, parts)
            self.readers.note(value, whole, again)
        return whole
