"""Of many ranks' outcomes, the one that is the cause of the others."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence

from colrow.launch.report import Exit, Failure, LaunchError, Outcome, Success, wants_traceback


def is_own(outcome: Outcome) -> bool:
    """Whether a rank failed of itself: not because of another rank, and not because it was told to end."""
    if isinstance(outcome, Failure):
        return outcome.blames is None and not outcome.is_order
    return isinstance(outcome, Exit)


def judge(
    outcomes: Mapping[int, Outcome], ranks: int, tails: Mapping[int, str], stacks: Mapping[int, str]
) -> LaunchError:
    """The error to show for a run that failed.

    Args:
        outcomes: in the order in which they became known, without those of ranks that were ended because of
            them; at least one is no success.
        ranks: number of ranks of the run.
        tails: last lines of a rank's output, where there are any.
        stacks: where a rank crashed, or where it was although others waited for it; where that is known.
    """
    own = [rank for rank, outcome in outcomes.items() if is_own(outcome)]
    if own:
        return _own_failure(own, outcomes, ranks, tails, stacks)
    failure = _best_of(outcomes)
    assert failure is not None
    blames = failure.blames or ()
    notes = [
        f"rank {blamed} had returned without an error: the ranks do not make the same calls"
        for blamed in blames
        if isinstance(outcomes.get(blamed), Success)
    ]
    shown = [describe_stack(blamed, stacks[blamed]) for blamed in blames if stacks.get(blamed)]
    if wants_traceback():
        shown.insert(0, failure.trace)
    summary = "; ".join([failure.error.removeprefix("RankFailure: "), *notes])
    return LaunchError(summary, "\n\n".join(shown), 1, blames[0] if len(blames) == 1 else None)


def _best_of(outcomes: Mapping[int, Outcome]) -> Failure | None:
    """Of the ranks that failed because of others the first, better one that names somebody."""
    waiting = [one for one in outcomes.values() if isinstance(one, Failure) and one.blames is not None]
    return max(waiting, key=lambda one: bool(one.blames), default=None)


def _own_failure(
    own: Sequence[int],
    outcomes: Mapping[int, Outcome],
    ranks: int,
    tails: Mapping[int, str],
    stacks: Mapping[int, str],
) -> LaunchError:
    rank = own[0]
    first = outcomes[rank]
    alike = [other for other in own if other == rank or _is_same_error(outcomes[other], first)]
    if isinstance(first, Failure) and first.advice and len(alike) == ranks:
        return LaunchError(first.advice, first.trace if wants_traceback() else "", 2, None)
    if isinstance(first, Failure):
        what, detail, code = f"failed: {first.error}", first.trace, 1
    else:
        assert isinstance(first, Exit)
        what, detail = describe_exit(first.code), _last_signs(rank, outcomes, tails, stacks)
        code = 128 - first.code if first.code < 0 else first.code or 1
    summary = f"{name_ranks(alike)} of {ranks} {what}"
    others = [other for other in own if other not in alike]
    if others:
        summary += f"; {name_ranks(others)} failed, too"
    ended = [other for other in range(ranks) if other not in own]
    ended = [other for other in ended if not isinstance(outcomes.get(other), Success)]
    if ended:
        summary += f" ({name_ranks(ended)} ended because of it)"
    return LaunchError(summary, detail, code, rank if len(alike) == 1 else None)


def _last_signs(
    rank: int, outcomes: Mapping[int, Outcome], tails: Mapping[int, str], stacks: Mapping[int, str]
) -> str:
    """What is known about a rank that has ended without a word."""
    signs = []
    if tails.get(rank):
        signs.append(f"The last lines of rank {rank}:\n{tails[rank]}")
    if stacks.get(rank):
        signs.append(describe_stack(rank, stacks[rank]))
    seen_by_others = _best_of(outcomes)
    if seen_by_others is not None:
        signs.append(f"What the others saw of it: {seen_by_others.error.removeprefix('RankFailure: ')}")
    return "\n\n".join(signs)


def _is_same_error(one: Outcome, other: Outcome) -> bool:
    return isinstance(one, Failure) and isinstance(other, Failure) and one.error == other.error


def describe_stack(rank: int, stack: str) -> str:
    """A rank's stack, with a heading."""
    return f"Rank {rank} was here (innermost line first):\n{stack}"


def describe_exit(code: int) -> str:
    """What became of a process with this exit status, negative for a signal."""
    if code >= 0:
        return f"ended with exit status {code} before its function returned"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ", as by the operating system when memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 2``, or ``ranks 0, 1 and 3``."""
    names = [str(rank) for rank in sorted(ranks)]
    if len(names) == 1:
        return f"rank {names[0]}"
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"
