"""What the cross-entropy over a cut vocabulary and its gradient are made of, whoever computes the logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from colrow.collectives import Communicator
from colrow.layers.embedding import check_range
from colrow.layout import Cut

Reduction = Literal["mean", "sum", "none"]

NO_SECOND_DERIVATIVE = (
    "the parallel cross-entropy has no second derivative: call backward without create_graph, "
    "or gather the logits and use F.cross_entropy"
)


@dataclass(frozen=True)
class LossOptions:
    """How the loss is computed, and which ids this rank has.

    Attributes:
        ranks: the group over which the vocabulary is cut.
        start: this rank's first id.
        vocabulary: number of ids over all ranks.
        ignore_index, smoothing, z_loss: as in :func:`colrow.layers.cross_entropy`.
        label: names the collectives.
    """

    ranks: Communicator
    start: int
    vocabulary: int
    ignore_index: int
    smoothing: float
    z_loss: float
    label: str

    def own(self, weight: Tensor, width: int) -> Tensor:
        """Of one number per id, those of this rank's ``width`` ids."""
        return weight[self.start : self.start + width]


@dataclass(frozen=True)
class LossInputs:
    """The arguments of a loss after they have been checked.

    Attributes:
        options: of the loss.
        target: [tokens], global ids or the index that is ignored.
        kept: [tokens], whether it counts.
        class_weight: [vocabulary], or ``None``; without gradient.
        cut: the ids of all ranks.
    """

    options: LossOptions
    target: Tensor
    kept: Tensor
    class_weight: Tensor | None
    cut: Cut

    def counted(self) -> Tensor:
        """What the sum of the losses is divided by for their mean."""
        if self.class_weight is None:
            return self.kept.sum()
        return (self.class_weight[torch.where(self.kept, self.target, 0)] * self.kept).sum()


def checked(
    ranks: Communicator,
    vocabulary: int | Cut,
    width: int,
    shape: torch.Size,
    target: Tensor,
    class_weight: Tensor | None,
    reduction: str,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    label: str,
) -> LossInputs:
    """Check what was given to a loss.

    Args:
        width: number of ids for which this rank has logits, or weights.
        shape: that of the logits without ids.

    Raises:
        IndexError: if a target is neither in [0, vocabulary) nor ``ignore_index``.
        ValueError: if shapes, cut and group do not fit, or an option is out of range.
    """
    cut = vocabulary if isinstance(vocabulary, Cut) else Cut.balanced(vocabulary, ranks.size)
    if cut.ranks != ranks.size or cut.count(ranks.rank) != width:
        raise ValueError(
            f"rank {ranks.rank} should hold the logits of {cut.counts[ranks.rank]} of {cut.units} ids, "
            f"got {width}"
        )
    if shape != target.shape:
        raise ValueError(f"logits {[*shape, width]} do not fit the target {list(target.shape)}")
    if target.is_floating_point():
        raise ValueError("class probabilities as target are not supported: give ids")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if class_weight is not None and tuple(class_weight.shape) != (cut.units,):
        raise ValueError(f"weight must have the shape [{cut.units}], not {list(class_weight.shape)}")
    flat = target.reshape(-1).long()
    kept = flat != ignore_index
    check_range(torch.where(kept, flat, 0), cut.units, f"the targets of {label}")
    options = LossOptions(
        ranks, cut.start(ranks.rank), cut.units, ignore_index, label_smoothing, z_loss, label
    )
    return LossInputs(options, flat, kept, None if class_weight is None else class_weight.detach(), cut)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a loss of logits in ``dtype`` is computed: single precision at least."""
    return dtype if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Terms:
    """What the loss of each token is made of, apart from its logits. All tensors are [tokens].

    Attributes:
        options: of the loss.
        kept: whether the token counts.
        own: whether its target is among this rank's ids.
        column: where among them; any where it is not.
        target_weight: weight of its target, 0 where it is ignored; ``None``: 1 of each that counts.
        total_weight: of all ids.
        own_weight: [this rank's ids], or ``None`` where all are one.
    """

    options: LossOptions
    kept: Tensor
    own: Tensor
    column: Tensor
    target_weight: Tensor | None
    total_weight: float
    own_weight: Tensor | None

    @classmethod
    def of(cls, inputs: LossInputs, width: int, dtype: torch.dtype) -> Terms:
        """The terms on a rank with ``width`` ids; numbers are in ``dtype``."""
        options, kept, weight = inputs.options, inputs.kept, inputs.class_weight
        local = inputs.target - options.start
        column = local.clamp(0, max(width - 1, 0))
        own = column == local if width else torch.zeros_like(kept)
        if 0 <= options.ignore_index < options.vocabulary:  # else it is no rank's id
            own &= kept
        target_weight, total, own_weight = None, float(options.vocabulary), None
        if weight is not None:
            target_weight = kept.to(dtype) * weight.to(dtype)[torch.where(kept, inputs.target, 0)]
            total, own_weight = float(weight.sum()), options.own(weight, width).to(dtype)
        return cls(options, kept, own, column, target_weight, total, own_weight)

    def at(self, part: slice) -> Terms:
        """The terms of some tokens."""
        if part.start == 0 and part.stop >= len(self.kept):
            return self
        weight = self.target_weight
        return replace(
            self,
            kept=self.kept[part],
            own=self.own[part],
            column=self.column[part],
            target_weight=None if weight is None else weight[part],
        )

    def of_logits(self, values: Tensor) -> list[Tensor]:
        """This rank's share of what is linear in the logits, [tokens] each.

        That is the target's own logit and, for label smoothing, the weighted sum of all.

        Args:
            values: [tokens, this rank's ids].
        """
        if not values.shape[1]:
            chosen = values.sum(1)
        else:
            chosen = torch.where(self.own, values.gather(1, self.column.unsqueeze(1)).squeeze(1), 0)
        if not self.options.smoothing:
            return [chosen]
        return [chosen, values.sum(1) if self.own_weight is None else values @ self.own_weight]

    def loss(self, log_sum: Tensor, of_logits: Tensor) -> Tensor:
        """[tokens].

        Args:
            log_sum: logarithm of the sum of exponentials over all ids.
            of_logits: :meth:`of_logits`, summed over the ranks.
        """
        options = self.options
        loss = self._of_target(log_sum - of_logits[0])
        if options.smoothing:
            share = options.smoothing / options.vocabulary
            spread = log_sum * self.total_weight - of_logits[1]
            loss = loss + share * torch.where(self.kept, spread, 0)
        if options.z_loss:
            loss = loss + options.z_loss * torch.where(self.kept, log_sum**2, 0)
        # a number that is not finite must not hide behind an ignored target
        return torch.where(self.kept, loss, 0)

    def _of_target(self, numbers: Tensor) -> Tensor:
        """[tokens]: multiplied with what the target's own share of the loss is."""
        if self.options.smoothing:
            numbers = numbers * (1 - self.options.smoothing)
        return numbers if self.target_weight is None else numbers * self.target_weight

    def of_softmax(self, log_sum: Tensor, scale: Tensor) -> Tensor:
        """[tokens]: the coefficient of the softmax in the gradient.

        Args:
            scale: [tokens], what each token's loss is multiplied with; 0 where it is ignored.
        """
        options = self.options
        result = self._of_target(scale)
        if options.smoothing:
            result = result + scale * (options.smoothing / options.vocabulary) * self.total_weight
        if options.z_loss:
            result = result + 2 * options.z_loss * scale * log_sum
        return result

    def finish_gradient_(self, values: Tensor, scale: Tensor) -> None:
        """Make the softmax, times its coefficient, the gradient of the logits, in place.

        Args:
            values: [tokens, this rank's ids].
            scale: as in :meth:`of_softmax`.
        """
        options = self.options
        if not values.shape[1]:
            return
        of_target = torch.where(self.own, self._of_target(scale), 0)
        values.scatter_add_(1, self.column.unsqueeze(1), of_target.neg_().unsqueeze(1))
        if options.smoothing:
            share = scale[:, None] * (options.smoothing / options.vocabulary)
            values.sub_(share if self.own_weight is None else share * self.own_weight)
        if values.device.type != "cpu" or not self.kept.all():
            # an ignored token's logits may be infinite: its gradient is zero all the same
            values.masked_fill_(self.kept.logical_not().unsqueeze(1), 0)
