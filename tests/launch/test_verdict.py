"""Of several ranks' outcomes, which one is shown, and how."""

from __future__ import annotations

import pickle
from collections.abc import Mapping

import pytest

from colrow import PlanError, RankFailure
from colrow.launch.report import Exit, Failure, LaunchError, Outcome, Success, failure_of, user_advice
from colrow.launch.verdict import judge

OWN = Failure("TypeError: boom", "trace of boom")
OTHER = Failure("KeyError: 'x'", "trace of x")
BLAMES_1 = Failure("RankFailure: exit mlp did not complete", "trace", blames=(1,))
BLAMES_NOBODY = Failure("RankFailure: barrier did not complete", "trace", blames=())
ORDERED = Failure("Terminated: 143", "trace", is_order=True)
MISTAKE = Failure("ValueError: no such file", "trace of file", advice="no such file")


def _judge(outcomes: Mapping[int, Outcome], ranks: int = 3, **known: Mapping[int, str]) -> LaunchError:
    return judge(outcomes, ranks, known.get("tails", {}), known.get("stacks", {}))


def test_the_ranks_own_error_beats_what_it_caused() -> None:
    error = _judge({0: BLAMES_1, 2: BLAMES_1, 1: OWN})
    assert error.summary == "rank 1 of 3 failed: TypeError: boom (ranks 0 and 2 ended because of it)"
    assert (error.detail, error.rank, error.exit_code) == ("trace of boom", 1, 1)


def test_of_two_errors_the_first_is_shown() -> None:
    error = _judge({2: OTHER, 1: OWN, 0: BLAMES_1})
    assert (
        error.summary == "rank 2 of 3 failed: KeyError: 'x'; rank 1 failed, too (rank 0 ended because of it)"
    )
    assert error.detail == "trace of x"


def test_the_same_error_on_several_ranks_is_shown_once() -> None:
    error = _judge({2: OWN, 0: OWN, 1: OWN})
    assert error.summary == "ranks 0, 1 and 2 of 3 failed: TypeError: boom"
    assert (error.detail, error.rank) == ("trace of boom", None)


def test_a_signal() -> None:
    error = _judge(
        {0: BLAMES_1, 1: Exit(-11), 2: ORDERED}, tails={0: "no", 1: "last words"}, stacks={1: "File"}
    )
    assert error.summary == "rank 1 of 3 was killed by SIGSEGV (ranks 0 and 2 ended because of it)"
    assert error.detail == (
        "The last lines of rank 1:\nlast words\n\n"
        "Rank 1 was here (innermost line first):\nFile\n\n"
        "What the others saw of it: exit mlp did not complete"
    )
    assert (error.rank, error.exit_code) == (1, 139)


def test_an_exit_without_a_word() -> None:
    error = _judge({0: Success(), 1: Exit(0)}, ranks=2)
    assert error.summary == "rank 1 of 2 ended with exit status 0 before its function returned"
    assert error.exit_code == 1
    assert _judge({1: Exit(7)}, ranks=1).exit_code == 7
    assert "killed by signal 63" in _judge({1: Exit(-63)}, ranks=1).summary


def test_only_failures_of_waiting_ranks() -> None:
    error = _judge({0: BLAMES_NOBODY, 2: BLAMES_1}, stacks={1: "File x", 0: "no"})
    assert error.summary == "exit mlp did not complete"
    assert error.detail == "Rank 1 was here (innermost line first):\nFile x"
    assert error.rank == 1
    assert _judge({0: BLAMES_NOBODY}).rank is None


def test_mistakes_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line if all ranks make them; a traceback if only some do, for then something else is wrong."""
    monkeypatch.delenv("COLROW_TRACEBACK", raising=False)
    everywhere = {0: MISTAKE, 1: MISTAKE}
    error = _judge(everywhere, ranks=2)
    assert (str(error), error.exit_code, error.rank) == ("no such file", 2, None)
    somewhere = _judge({0: MISTAKE, 1: BLAMES_1}, ranks=2)
    assert somewhere.summary == "rank 0 of 2 failed: ValueError: no such file (rank 1 ended because of it)"
    assert (somewhere.detail, somewhere.exit_code) == ("trace of file", 1)
    monkeypatch.setenv("COLROW_TRACEBACK", "1")
    assert str(_judge(everywhere, ranks=2)) == "trace of file\nno such file"


def test_advice() -> None:
    assert user_advice(PlanError("mlp", "cause", "Do this.")) == "mlp: cause. Do this."
    assert user_advice(FileNotFoundError(2, "No such file", "a.yaml")) == "[Errno 2] No such file: 'a.yaml'"
    missing = ModuleNotFoundError("No module named 'rich.live'", name="rich.live")
    assert user_advice(missing) == "the package rich is not installed: pip install 'colrow[train]'"
    for error in (
        ModuleNotFoundError("No module named 'nose'", name="nose"),
        TypeError("no"),
        KeyError("no"),
    ):
        assert user_advice(error) == ""


def test_what_a_rank_reports() -> None:
    def inner() -> None:
        raise RankFailure("late", (2,), "exit mlp")

    try:
        inner()
    except RankFailure as error:
        whole = failure_of(error, "another file", is_order=False)
        without = failure_of(error, __file__, is_order=True)
    assert (whole.error, whole.blames, whole.is_order) == ("RankFailure: late", (2,), False)
    assert "in inner" in whole.trace
    assert "in inner" not in without.trace
    assert without.is_order
    assert pickle.loads(pickle.dumps(whole)) == whole


def _handled(cause: BaseException | None) -> BaseException:
    """What a user's handler of a RankFailure may raise."""
    try:
        try:
            raise RankFailure("late", (2,), "exit mlp")
        except RankFailure as late:
            raise KeyError("step") from cause and late
    except KeyError as error:
        return error


def test_an_error_because_of_another_rank_is_not_the_ranks_own() -> None:
    found = failure_of(_handled(RankFailure("late")), "", is_order=False)
    assert (found.error, found.blames) == ("RankFailure: late", (2,))
    assert "KeyError: 'step'" in found.trace
    cut = failure_of(_handled(None), "", is_order=False)  # raise ... from None
    assert (cut.error, cut.blames) == ("KeyError: 'step'", None)


def test_the_error_survives_pickling() -> None:
    error = LaunchError("summary", "detail", 3, 1)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.exit_code, copy.rank) == ("detail\nsummary", 3, 1)
