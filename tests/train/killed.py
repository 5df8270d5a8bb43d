"""``colrow train`` under a launcher that starts failed ranks again: rank 1 is killed in the fifth step.

torchrun --max-restarts 1 ... -m tests.train.killed CONFIG.yaml
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from colrow.cli.train import run
from colrow.launch.environment import restarts
from colrow.train import loop, step

STEPS_DONE = 4


def _mortal(*arguments: Any, **keywords: Any) -> Any:
    _mortal.calls += 1  # type: ignore[attr-defined]
    if _mortal.calls > STEPS_DONE and not restarts() and os.environ["RANK"] == "1":  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGKILL)
    return step.optimizer_step(*arguments, **keywords)


if __name__ == "__main__":
    _mortal.calls = 0  # type: ignore[attr-defined]
    loop.optimizer_step = _mortal
    sys.exit(run(sys.argv[1:]))
