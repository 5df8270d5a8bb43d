"""Keeping torch's own transformer layers on the path that calls their modules.

In evaluation without gradients ``nn.TransformerEncoderLayer`` gives its weights, and those of the modules in
it, to one fused operator: what a plan does within it would be passed by, and parts of weights taken for whole
ones. It does so only if neither it nor a module in it has hooks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from colrow.errors import PlanError
from colrow.plan import Plan


def keep_off_fast_path(model: nn.Module, plan: Plan) -> None:
    """Call after everything else has been attached: layers that ``plan`` leaves alone stay as they are."""
    for path, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _is_changed(path, module, plan):
            module.register_forward_pre_hook(_NoFastPath(path))


def _is_changed(path: str, module: nn.Module, plan: Plan) -> bool:
    inside = f"{path}." if path else ""
    return any(name.startswith(inside) for name in plan.parameters) or any(
        "forward" in vars(one) for one in module.modules()
    )


class _NoFastPath:
    """A hook whose presence is enough; it explains what torch cannot do without that operator."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor) and arguments[0].is_nested:
            raise PlanError(
                self._path,
                "it is given a nested tensor, as nn.TransformerEncoder makes of padded ones in evaluation, "
                "which only torch's fused layer takes, and that knows no parts of weights",
                "Build nn.TransformerEncoder with enable_nested_tensor=False: then padded tokens have the "
                "values that they have in training, not zeros.",
            )
