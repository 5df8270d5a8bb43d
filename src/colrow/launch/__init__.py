"""Starting ranks: on this host by :func:`launch`, or by somebody else, whom :mod:`environment` recognises."""

from colrow.launch.launcher import launch
from colrow.launch.report import LaunchError

__all__ = ["LaunchError", "launch"]
