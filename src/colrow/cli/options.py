"""Options that several commands have."""

from __future__ import annotations

from typing import Literal

SEQUENCE: dict[str, bool | Literal["auto"]] = {"no": False, "yes": True, "auto": "auto"}
"""Values of ``--sequence``."""

SEQUENCE_HELP = (
    "cut what lies between regions along the sequence too, which saves memory; auto: where that communicates "
    "hardly more (default: no)"
)
