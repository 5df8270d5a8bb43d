"""What a model returns in place of logits that were not gathered."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping, MutableSequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from colrow.apply.loss_tensor import LocalLogits
from colrow.collectives import AllGather
from colrow.trace.tree import attributes_of, is_record


class ShardedLogits:
    """Stands for logits that were not gathered because the model was given labels.

    Where the loss did not keep logits they are computed when asked for, from the layer's input and weights,
    which must not have changed. They have gradients of their own; that of the loss does not go through them.
    """

    def __init__(self, logits: LocalLogits, gather: AllGather, notice: Callable[[Tensor], None]) -> None:
        self._logits, self._gather, self._notice = logits, gather, notice
        self._local: Tensor | None = None

    @property
    def local(self) -> Tensor:
        """[..., this rank's ids], this rank's part.

        Raises:
            PlanError: if the weights have changed, and logits were not kept.
        """
        if self._local is None:
            self._local = self._logits.plain
            self._notice(self._local)
        return self._local

    def gather(self) -> Tensor:
        """[..., all ids]: the whole logits on every rank; every rank must call this."""
        return self._gather(self.local)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the logits are cut over the vocabulary and were not gathered, because the model computed its "
            f"loss from the parts; use .local, or .gather() on every rank, before .{name}"
        )

    def __repr__(self) -> str:
        return f"ShardedLogits(local={list(self._logits.outside.shape)})"


def without_local_logits(output: Any, label: str, notice: Callable[[Tensor], None]) -> Any:
    """``output`` with each :class:`LocalLogits` replaced by :class:`ShardedLogits`.

    Looks into mappings (the outputs of transformers are such), lists, tuples, dataclasses, simple namespaces
    and what is registered with torch's pytree. What can change is changed in place, so that its type and
    identity stay.

    Args:
        output: what the model's forward gave.
        label: names the collective of :meth:`ShardedLogits.gather`.
        notice: called with every tensor in the output; of logits with this rank's part, once it is there.
    """
    return _Walk(label, notice).replaced(output)


_PLAIN = (bool, int, float, str)


class _Walk:
    def __init__(self, label: str, notice: Callable[[Tensor], None]) -> None:
        self._label, self._notice = label, notice
        self._seen: dict[int, Any] = {}  # by identity: a value that is met again, also within itself

    def replaced(self, value: Any) -> Any:
        if value is None or isinstance(value, _PLAIN):
            return value
        if id(value) in self._seen:
            return self._seen[id(value)]
        self._seen[id(value)] = value
        result = value
        if isinstance(value, LocalLogits):
            if value.normalised:
                raise value.vocabulary.error(
                    "the model returns the log_softmax of its logits beside its loss"
                )
            result = ShardedLogits(value, value.gather_on(self._label), self._notice)
            if value.late is None:
                self._notice(value.plain)
        elif isinstance(value, Tensor):
            self._notice(value)
        else:
            result = self._inside(value)
        self._seen[id(value)] = result
        return result

    def _inside(self, value: Any) -> Any:
        if isinstance(value, MutableMapping):
            for key, item in list(value.items()):
                new = self.replaced(item)
                if new is not item:
                    value[key] = new
            return value
        if isinstance(value, MutableSequence) and not isinstance(value, bytearray):
            for index, item in enumerate(value):
                new = self.replaced(item)
                if new is not item:
                    value[index] = new
            return value
        if is_record(value):
            return self._record(value)
        leaves, structure = tree_flatten(value)
        if len(leaves) == 1 and leaves[0] is value:
            return value
        new_leaves = [self.replaced(leaf) for leaf in leaves]
        if all(new is leaf for new, leaf in zip(new_leaves, leaves, strict=True)):
            return value
        return tree_unflatten(new_leaves, structure)

    def _record(self, value: Any) -> Any:
        changed = {
            name: new
            for name, item in attributes_of(value).items()
            if (new := self.replaced(item)) is not item
        }
        parameters = getattr(value, "__dataclass_params__", None)
        if changed and parameters is not None and parameters.frozen:
            value = copy.copy(value)
        for name, new in changed.items():
            object.__setattr__(value, name, new)
        return value
