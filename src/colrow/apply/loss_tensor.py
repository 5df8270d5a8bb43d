"""Logits that are cut over the vocabulary, between the layer that computes them and the model's loss.

:class:`LocalLogits` holds this rank's ids and knows which dimension is the vocabulary. To the model it
is like the whole: its shape is that of all ids, and sizes that the model gives (``view(-1, vocab_size)``) are
those of the whole. What functions do with it: :mod:`colrow.apply.loss_functions`. Its numbers may not have
been computed yet: :mod:`colrow.apply.loss_late`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from colrow.apply.nesting import leaves, mapped
from colrow.collectives import AllGather, Communicator
from colrow.errors import PlanError
from colrow.layout import Cut

if TYPE_CHECKING:
    from colrow.apply.loss_late import Late


@dataclass
class Vocabulary:
    """What the logits of one forward have in common.

    Attributes:
        ranks: the group over which the vocabulary is cut.
        cut: its ids on each rank.
        label: names errors and collectives.
        answer: what a function of torch gives that is called with logits among its arguments.
        losses: of each loss that has been computed from logits, whether without keeping them.
    """

    ranks: Communicator
    cut: Cut
    label: str
    answer: Callable[[Call], Any]
    losses: list[bool] = field(default_factory=list)

    def error(self, cause: str) -> PlanError:
        """A :class:`PlanError` that names the logits."""
        return PlanError(
            self.label,
            cause,
            "Leave the logits layer out of the plan, or compute the loss outside of the model.",
        )


class LocalLogits(Tensor):
    """This rank's ids of logits that look whole.

    Functions that it does not know, or that would need the other ranks' ids, raise :class:`PlanError`.
    """

    vocabulary: Vocabulary
    dimension: int
    # they stand for their log-softmax, which only a loss can be computed from without the other ranks
    normalised: bool = False
    # then the tensor itself has no numbers, only shape, dtype, device and place in the graph
    late: Late | None = None

    @staticmethod
    def of(local: Tensor, vocabulary: Vocabulary, dimension: int) -> LocalLogits:
        """``local``, [..., this rank's ids, ...], whose ``dimension`` is the vocabulary."""
        logits: LocalLogits = local.as_subclass(LocalLogits)
        logits.vocabulary, logits.dimension = vocabulary, dimension
        return logits

    @property
    def plain(self) -> Tensor:
        """This rank's part as an ordinary tensor, through which gradients flow."""
        return self.outside if self.late is None else self.late.get()

    @property
    def outside(self) -> Tensor:
        """The tensor itself as an ordinary one: without numbers if these are late."""
        with torch._C.DisableTorchFunctionSubclass():
            local: Tensor = self.as_subclass(Tensor)
            return local

    def gather_on(self, label: str) -> AllGather:
        """The collective that makes :attr:`plain` whole on every rank."""
        return AllGather(self.vocabulary.ranks, label, self.dimension, self.vocabulary.cut.counts, "I")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = tuple(one for one in leaves((args, kwargs)) if isinstance(one, LocalLogits))
            name = getattr(function, "__name__", str(function))
            if name == "__get__":
                name = function.__self__.__name__
            return found[0].vocabulary.answer(Call(function, name, args, kwargs or {}, found))


@dataclass(frozen=True)
class Call:
    """One function that the model calls with logits among its arguments.

    Attributes:
        name: of the function, or of the attribute that it gets.
        logits: all among the arguments.
    """

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    logits: tuple[LocalLogits, ...]

    @property
    def vocabulary(self) -> Vocabulary:
        """What the logits have in common."""
        return self.logits[0].vocabulary

    @property
    def size(self) -> int:
        """Ids over all ranks."""
        return self.vocabulary.cut.units

    @property
    def is_getter(self) -> bool:
        """Whether it gets an attribute."""
        return getattr(self.function, "__name__", "") == "__get__"

    @property
    def operand(self) -> object:
        """The first argument."""
        return self.args[0] if self.args else self.kwargs.get("input", self.kwargs.get("self"))

    def run(self, change: Callable[[Any], Any]) -> Any:
        """The function's result with each argument changed."""
        args, kwargs = mapped(change, (self.args, self.kwargs))
        return self.function(*args, **kwargs)

    def of(self, operand: Tensor) -> Call:
        """The same call with another tensor in place of the only logits."""
        (logits,) = self.logits
        args, kwargs = mapped(lambda one: operand if one is logits else one, (self.args, self.kwargs))
        found = (operand,) if isinstance(operand, LocalLogits) else ()
        return Call(self.function, self.name, args, kwargs, found)

    def refused(self) -> PlanError:
        """The error of a function that would need the other ranks' ids."""
        return self.vocabulary.error(
            f"between its logits and its loss the model calls {self.name}, which would see this rank's part "
            "of the vocabulary only"
        )

    def cuts(self, shape: Sequence[int] | None) -> PlanError:
        """The error of a function whose result, of ``shape``, has not all ids in one dimension."""
        result = "its result has" if shape is None else f"{list(shape)} has"
        return self.vocabulary.error(
            f"{self.name} cuts the vocabulary of the logits: {result} no dimension of all {self.size} ids"
        )
