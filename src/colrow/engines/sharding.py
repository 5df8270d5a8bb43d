"""FSDP for engines that are given a model together with its optimizer."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.parallel import data_parallel

Data = Literal["ddp", "fsdp"]
"""How replicas train together; see :func:`colrow.data_parallel`."""


def require_data(data: str) -> None:
    """Whether that is a way in which replicas train together here.

    Raises:
        ValueError: if it is not.
    """
    if data not in get_args(Data):
        raise ValueError(f"data must be 'ddp' or 'fsdp', not {data!r}")


class Replicated:
    """Lets replicas of cut models train as one; FSDP has other parameters than the optimizer was made for."""

    def __init__(self, mesh: DeviceMesh, data: Data) -> None:
        require_data(data)
        self._mesh, self.data = mesh, data
        # the old ones are kept, so that nothing else is taken for them
        self._new: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def wrap(self, model: nn.Module, **options: Any) -> nn.Module:
        """See :func:`colrow.data_parallel`; options are those of DDP."""
        if self.data == "ddp":
            return data_parallel(model, self._mesh, "ddp", **options)
        before = dict(model.named_parameters())
        wrapped = data_parallel(model, self._mesh, "fsdp")
        after = dict(wrapped.named_parameters())
        self._new.update({id(one): (one, after[name]) for name, one in before.items()})
        return wrapped

    def give_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer train the parameters that models have now, with the options it was given.

        Raises:
            ValueError: if it has a state for those that it was made for.
        """
        for group in optimizer.param_groups:
            mine = [self._new.get(id(one)) for one in group["params"]]
            if any(one is not None and optimizer.state.get(one[0]) for one in mine):
                raise ValueError(
                    "the optimizer has made steps with the model before FSDP sharded it: prepare both first, "
                    "and load what it has then"
                )
            group["params"] = [
                one if pair is None else pair[1] for one, pair in zip(group["params"], mine, strict=True)
            ]
