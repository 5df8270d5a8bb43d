"""One optimizer whose parameters are updated by several, each in a way of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_PARAMETERS = "params"

Group = dict[str, Any]
"""Parameters of an optimizer and their options."""


class OptimizerOfParts(torch.optim.Optimizer):
    """Has the groups that it was given; of each, every part updates the parameters that are its own.

    Options of the groups, as a scheduler changes them, reach the parts with each step. The state lies with
    the parts: :func:`colrow.save_optimizer` and :func:`colrow.load_optimizer` find it.

    Args:
        groups: of parameters, with options of their own.
        options: of the groups that have none of their own.
        ways: each has the parameters that its function is true of, and makes their optimizer of groups. Of
            every parameter one is true. The groups are as many as those given, and some may be empty.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        options: dict[str, Any],
        ways: Sequence[
            tuple[Callable[[Tensor], bool], Callable[[list[Group], dict[str, Any]], torch.optim.Optimizer]]
        ],
    ) -> None:
        self._is_made = False
        super().__init__([dict(one) for one in groups], options)
        self.parts: list[torch.optim.Optimizer] = []
        for is_own, make in ways:
            own = [
                {**one, _PARAMETERS: [each for each in one[_PARAMETERS] if is_own(each)]}
                for one in self.param_groups
            ]
            if any(one[_PARAMETERS] for one in own):
                self.parts.append(make(own, dict(options)))
        self._take_options()  # those that are not given, too
        self._is_made = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Each part updates its parameters; every rank calls this.

        Args:
            closure: computes the loss and its gradients anew; it is called once, before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            _copy_options(self.param_groups, part.param_groups)
            part.step()
        self._take_options()
        return loss

    def add_param_group(self, param_group: Group) -> None:
        """Only while the optimizer is made.

        Raises:
            ValueError: afterwards.
        """
        if self._is_made:
            raise ValueError(
                "what divides this optimizer's state among replicas takes no group later: make the optimizer "
                "anew, with all groups"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The state lies with the parts, and on other replicas.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "replicas divide this optimizer's state: save it with "
            "colrow.save_optimizer(model, optimizer, folder)"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The state lies with the parts, and on other replicas.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "replicas divide this optimizer's state: read it with "
            "colrow.load_optimizer(model, optimizer, folder)"
        )

    def _take_options(self) -> None:
        if self.parts:
            _copy_options(self.parts[0].param_groups, self.param_groups)


def _copy_options(source: Sequence[Group], target: Sequence[Group]) -> None:
    for one, other in zip(source, target, strict=True):
        other.update({name: option for name, option in one.items() if name != _PARAMETERS})
