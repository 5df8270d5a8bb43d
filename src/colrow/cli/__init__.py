"""The ``colrow`` command: finds the command's module and turns errors into one line and an exit status."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata

COMMANDS = {
    "train": "train a language model on text, cut over ranks",
    "plan": "show how a model would be cut, what that saves and what it costs",
    "verify": "prove that a model cut over ranks is equal to the model on one device",
    "generate": "continue a text with a model that has been trained or downloaded",
    "demo": "small programs that show what the ranks do",
}
"""Each is a module of this package with a function ``run(arguments) -> exit status``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``colrow COMMAND ...``.

    Args:
        argv: what follows ``colrow``; default: the command line.

    Returns:
        The exit status: 0; 2 for a mistake of the user's; 130 after Ctrl-C; 141 if nobody reads the output
        to its end; 1 or 128 + a signal's number if a rank failed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *rest = arguments
    if name in ("-V", "--version"):
        print(f"colrow {metadata.version('colrow')}")
        return 0
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(COMMANDS)}"
        return _complain(f"there is no command {name!r}: {hint}")
    return _guard(lambda: _find(name)(rest))


def _find(name: str) -> Callable[[list[str]], int]:
    run: Callable[[list[str]], int] = importlib.import_module(f"colrow.cli.{name}").run
    return run


def _guard(command: Callable[[], int]) -> int:
    """The exit status of a command; what it raises on purpose becomes one line."""
    from colrow.launch.report import USER_ERRORS, LaunchError, user_advice, wants_traceback

    try:
        status = command()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads the output, such as ``head``, has seen enough
        # what is left in the buffer would be an error again when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except LaunchError as error:
        if error.detail:
            print(error.detail, end="\n\n", file=sys.stderr)
        return _complain(error.summary, error.exit_code)
    except (ImportError, *USER_ERRORS) as error:
        advice = user_advice(error)
        if not advice:
            raise
        if wants_traceback():
            traceback.print_exc()
        return _complain(advice)


def _complain(message: str, status: int = 2) -> int:
    print(f"colrow: {message}", file=sys.stderr)
    return status


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items())
    return (
        "usage: colrow COMMAND ...\n\n"
        "Tensor parallelism for PyTorch that derives, proves and predicts.\n\n"
        f"commands:\n{commands}\n\n"
        "colrow COMMAND --help says more. COLROW_TRACEBACK=1 shows where an error was raised."
    )
