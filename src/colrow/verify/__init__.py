"""The proof that a parallelized model is equal to the original, and where the two part if it is not."""

from colrow.verify.precision import OnePrecision, one_precision
from colrow.verify.prove import verify, verify_on_ranks
from colrow.verify.report import Check, Difference, Report, VerificationError

__all__ = [
    "Check",
    "Difference",
    "OnePrecision",
    "Report",
    "VerificationError",
    "one_precision",
    "verify",
    "verify_on_ranks",
]
