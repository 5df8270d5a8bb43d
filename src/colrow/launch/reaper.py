"""A small process that outlives the launcher by a moment, to end what its ranks have started.

The kernel ends the ranks themselves when the launcher is killed, but not their children. Run as a file, with
nothing of colrow's imported: process groups come in line by line, and end with the launcher.
"""

import contextlib
import os
import signal
import sys

if __name__ == "__main__":
    groups: list[int] = []
    for line in sys.stdin:
        if line == "done\n":
            sys.exit(0)
        groups.append(int(line))
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
