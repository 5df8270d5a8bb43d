"""What the transport raises."""

from __future__ import annotations


class TransportError(RuntimeError):
    """A collective in shared memory did not complete; the group is of no use any more.

    Attributes:
        ranks: global ranks at fault, as far as the transport can tell.
        is_mismatch: the ranks are in different calls, or their tensors differ in size or dtype.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = (), *, is_mismatch: bool = False) -> None:
        self.ranks = ranks
        self.is_mismatch = is_mismatch
        super().__init__(message)
