"""Sums of gradients after a pipeline's step: over stages that share a parameter, and over replicas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from colrow.collectives import Communicator
from colrow.collectives.statistics import GRADIENTS_OF_REPLICAS
from colrow.data_shards import held

_BUCKET_BYTES = 25 * 1024**2


class SharedGradients:
    """Parameters that stages on several ranks hold, such as an embedding that is the head too.

    All of their ranks get the sum of the ranks' gradients, to the bit, so that equal weights stay equal.

    Args:
        model: with this rank's parameters.
        names: of these.
        holders: by first name, the ranks along ``pp`` that hold it.
        ranks: along ``pp``. Every rank of the pipeline makes this.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        holders: Mapping[str, Sequence[int]],
        ranks: Communicator,
    ) -> None:
        self._model = model
        self._groups: list[tuple[Communicator, list[str]]] = []
        shared = {name: tuple(holders[name]) for name in names if len(holders[name]) > 1}
        # the same order on all ranks: making a group waits for its members
        for members in sorted(set(shared.values())):
            named = sorted(name for name, own in shared.items() if own == members)
            self._groups.append((ranks.subgroup(members), named))

    def set_aside(self) -> dict[str, Tensor | None]:
        """Take away the gradients that are there, which have been summed, and give them."""
        kept: dict[str, Tensor | None] = {}
        for _, names in self._groups:
            for name in names:
                parameter = self._model.get_parameter(name)
                kept[name], parameter.grad = parameter.grad, None
        return kept

    def put_back(self, kept: Mapping[str, Tensor | None]) -> None:
        """Give the gradients back that :meth:`set_aside` gave."""
        for name, gradient in kept.items():
            self._model.get_parameter(name).grad = gradient

    def sum(self, kept: Mapping[str, Tensor | None]) -> None:
        """Sum the gradients over their ranks, and add those that :meth:`set_aside` gave."""
        for ranks, names in self._groups:
            named = {name: self._model.get_parameter(name) for name in names}
            trained = {id(one) for one in with_gradients_anywhere(named.values(), ranks)}
            for name, parameter in named.items():
                before, gradient = kept.get(name), parameter.grad
                if id(parameter) not in trained or gradient is None:
                    parameter.grad = before
                    continue
                total = ranks.all_reduce(held(gradient), label=f"gradient of {name} on several stages")
                held(gradient).copy_(total)
                if before is not None:
                    held(before).add_(held(gradient))
                    parameter.grad = before


def average_over_replicas(parameters: Iterable[nn.Parameter], ranks: Communicator) -> None:
    """Average gradients over replicas, a bucket of them at a time.

    What no replica has a gradient of is left without one.
    """
    if ranks.size == 1:
        return
    for bucket in _buckets(with_gradients_anywhere(parameters, ranks)):
        gradients = [one.grad for one in bucket if one.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        total = ranks.all_reduce(flat, label=GRADIENTS_OF_REPLICAS).div_(ranks.size)
        for gradient, part in zip(gradients, total.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def with_gradients_anywhere(parameters: Iterable[nn.Parameter], ranks: Communicator) -> list[nn.Parameter]:
    """Those of which any rank has a gradient; where this one has none, as it had no tokens, it gets zeros."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not wanted:
        return []
    has = torch.tensor([one.grad is not None for one in wanted], dtype=torch.int32, device=wanted[0].device)
    anywhere = ranks.all_reduce(has, "max", label="which gradients ranks have").tolist()
    trained = [one for one, there in zip(wanted, anywhere, strict=True) if there]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return trained


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype each, in order, of about 25 MiB."""
    for dtype in dict.fromkeys(one.dtype for one in parameters):
        bucket: list[nn.Parameter] = []
        filled = 0
        for parameter in parameters:
            if parameter.dtype != dtype:
                continue
            bucket.append(parameter)
            filled += parameter.numel() * dtype.itemsize
            if filled >= _BUCKET_BYTES:
                yield bucket
                bucket, filled = [], 0
        if bucket:
            yield bucket
