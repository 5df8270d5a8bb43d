"""One worker program per system, and their names."""

from __future__ import annotations

import re
from dataclasses import dataclass

PROGRAMS = {
    "colrow": "colrow",
    "colrow_sequence": "colrow_sequence",
    "dtensor": "dtensor",
    "megatron": "megatron",
    "transformers": "transformers",
    "deepspeed": "deepspeed",
    "single_1_thread": "single",
    "single_2_threads": "single",
    "limit": "limit",
}
"""The modules of this package by the names of the systems, in the order of the tables."""
REFERENCE = "single_1_thread"
"""Whose losses the others' must equal."""


@dataclass(frozen=True)
class System:
    """A system, perhaps with settings: ``colrow``, or ``colrow[COLROW_GEMM=mkl,COLROW_TRANSPORT=gloo]``.

    Attributes:
        name: as it was asked for.
        base: one of :data:`PROGRAMS`.
        settings: environment variables of its processes.
    """

    name: str
    base: str
    settings: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> System:
        """Raises:
        ValueError: if there is no such system, or its settings cannot be read.
        """
        found = re.fullmatch(r"(\w+)(?:\[(.*)\])?", text)
        if found is None or found[1] not in PROGRAMS:
            raise ValueError(f"there is no system {text!r}; there are {', '.join(PROGRAMS)}")
        settings = []
        for setting in (found[2] or "").split(",") if found[2] else []:
            name, equals, value = setting.partition("=")
            if not equals or not name:
                raise ValueError(f"settings are written as {found[1]}[NAME=value,NAME=value], not {text!r}")
            settings.append((name, value))
        return cls(text, found[1], tuple(settings))

    @property
    def threads(self) -> int:
        return 2 if self.base == "single_2_threads" else 1

    @property
    def is_single(self) -> bool:
        return PROGRAMS[self.base] == "single"

    def ranks(self, tp: int) -> int:
        """Number of its processes."""
        return 1 if self.is_single else tp

    @property
    def computes_the_model(self) -> bool:
        """Whether its losses mean anything."""
        return self.base != "limit"
