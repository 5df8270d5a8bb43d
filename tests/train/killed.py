"""``colrow train`` under a launcher that starts failed ranks again: a rank is killed in the middle of a step.

torchrun --max-restarts 1 ... -m tests.train.killed RANK STEP CONFIG.yaml
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from colrow.cli.train import run
from colrow.launch.environment import restarts
from colrow.train import loop, step


def _mortal(*arguments: Any, **keywords: Any) -> Any:
    _mortal.left -= 1  # type: ignore[attr-defined]
    if _mortal.left == 0 and not restarts():  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGKILL)
    return step.optimizer_step(*arguments, **keywords)


if __name__ == "__main__":
    victim, last, *rest = sys.argv[1:]
    _mortal.left = int(last) if os.environ["RANK"] == victim else -1  # type: ignore[attr-defined]
    loop.optimizer_step = _mortal
    sys.exit(run(rest))
