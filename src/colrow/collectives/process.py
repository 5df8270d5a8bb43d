"""Telling from one process whether another one, known by what it wrote about itself, still runs."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def identify(process: int) -> dict[str, object]:
    """What tells a process from all others, on all hosts and after its number has been used again."""
    return {"host": socket.gethostname(), "kernel": _kernel(), "pid": process, "start": _started(process)[1]}


def _kernel() -> str:
    """Process numbers of two processes can be compared if this is the same for both."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(process: int) -> tuple[str, str]:
    """State and start time of a process, from /proc; empty if it is not there."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def has_died(identity: dict[str, object]) -> bool:
    """Whether a process has ended, as far as can be told from here (a zombie has)."""
    if not identity["kernel"] or identity["kernel"] != _kernel():
        return False
    state, start = _started(int(str(identity["pid"])))
    return state in ("", "Z", "X") or start != identity["start"]
