"""The error that a trace raises when a model's Python code depends on numbers that a trace does not have."""

from __future__ import annotations


class TraceError(ValueError):
    """A model cannot be recorded on meta tensors as it is.

    Attributes:
        module: path of the module whose code ran; empty for the model itself.
        place: ``file:line in function`` of the innermost source line outside torch.
        cause: what is wrong.
        remedy: what the user can do.
    """

    def __init__(self, module: str, place: str, cause: str, remedy: str) -> None:
        self.module = module
        self.place = place
        self.cause = cause
        self.remedy = remedy
        super().__init__(f"{place}, in {module or 'the model itself'}: {cause}. {remedy}")

    def __reduce__(self) -> tuple[type[TraceError], tuple[str, str, str, str]]:
        return (TraceError, (self.module, self.place, self.cause, self.remedy))
