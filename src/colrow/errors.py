"""The errors that colrow raises on purpose.

User errors are ``ValueError`` or :class:`PlanError` and say what to do; a dead or late rank is a
:class:`RankFailure` on every other rank of its group.
"""

from __future__ import annotations


class PlanError(ValueError):
    """A plan does not fit the model or the mesh.

    The message names the module, the cause and what the user can do.
    """

    def __init__(self, module: str, cause: str, remedy: str) -> None:
        self.module = module
        self.cause = cause
        self.remedy = remedy
        super().__init__(f"{module or '(the model itself)'}: {cause}. {remedy}")

    def __reduce__(self) -> tuple[type[PlanError], tuple[str, str, str]]:
        return (PlanError, (self.module, self.cause, self.remedy))


class PlanWarning(UserWarning):
    """What a user should know of a derived plan: much stays whole, or something had to be guessed."""


class RankFailure(RuntimeError):
    """A collective did not complete because another rank died, raised or came too late.

    Attributes:
        ranks: global ranks at fault, as far as this rank could find out; empty if unknown.
        label: label of the collective that this rank was in, such as ``"exit model.layers.3.mlp"``.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = (), label: str = "") -> None:
        self.ranks = ranks
        self.label = label
        super().__init__(message)

    def __reduce__(self) -> tuple[type[RankFailure], tuple[str, tuple[int, ...], str]]:
        return (RankFailure, (str(self), self.ranks, self.label))
