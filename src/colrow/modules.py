"""Facts about modules that several parts need: which are plain linear layers, which parameters are tied."""

from __future__ import annotations

import sys

from torch import nn


def is_linear(module: nn.Module) -> bool:
    """Whether this is exactly an ``nn.Linear`` or a ``Conv1D``: a subclass may compute otherwise."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", nn.Linear)
    return type(module) in (nn.Linear, conv1d)


def features_dimension(module: nn.Module) -> int:
    """The dimension of a plain linear layer's weight that its output features lie on."""
    return 0 if isinstance(module, nn.Linear) else 1


def embedding_fault(module: nn.Module) -> str | None:
    """Why the rows of a module cannot be cut as an embedding's; ``None`` if they can."""
    if type(module) is not nn.Embedding:
        return f"{type(module).__name__} is not a plain embedding, so its forward is not known"
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option):
            return f"the option {option} is not supported on a cut table"
    return None


def names_by_parameter(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by the identity of the object: tied parameters have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def ties_of(model: nn.Module) -> dict[str, str]:
    """Of parameters with several names, the first name by each of the others."""
    return {other: first for first, *others in names_by_parameter(model).values() for other in others}
