"""What a model returns in place of results that were not put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from colrow.apply.loss_output import ShardedLogits
from colrow.parallel.context.plan import Extent
from colrow.parallel.context.running import Running
from colrow.parallel.context.share import SequenceShare


@dataclass(repr=False, eq=False)
class ShardedSequence:
    """A rank's tokens of a result that was not gathered, because the model computed its loss.

    Attributes:
        local: this rank's tokens: a tensor, or :class:`colrow.ShardedLogits` where logits are cut over the
            vocabulary too.
        share: which tokens these are: ``share.places(rank)``.
    """

    local: Tensor | ShardedLogits
    share: SequenceShare
    _extent: Extent = field()
    _running: Running = field()

    def gather(self) -> Tensor:
        """All tokens, on every rank; every rank must call this."""
        part = self.local.gather() if isinstance(self.local, ShardedLogits) else self.local
        with self._running.of(self.share):
            return self._running.join(part, self._extent, "gather results")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            "this result is cut along the sequence and was not gathered, because the model computed its "
            f"loss; use .local, or .gather() on every rank, before .{name}"
        )

    def __repr__(self) -> str:
        is_tensor = isinstance(self.local, Tensor)
        return f"ShardedSequence(local={list(self.local.shape) if is_tensor else self.local})"
