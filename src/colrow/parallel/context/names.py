"""The names of a forward's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def positional_names(forward: Callable[..., Any]) -> list[str]:
    """Those of the arguments that may be given by position, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in kinds]
