"""Where a plan acts: an argument or a result of a module's forward, or of one call within its code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

Path: TypeAlias = tuple[int | str, ...]
"""Where a tensor or number stands in nested arguments or results: ``("hidden_states",)``, ``(0, 1)``."""


@dataclass(frozen=True)
class ModuleInput:
    """A tensor among the arguments of a module's forward.

    Attributes:
        module: the module's path; empty for the model itself.
        path: where it stands; begins with the argument's name, or with its position if it has none.
    """

    module: str
    path: Path

    def __str__(self) -> str:
        return f"input {_text(self.path)} of {self.module or 'the model'}"


@dataclass(frozen=True)
class ModuleOutput:
    """A tensor in the result of a module's forward; the empty path if the result is the tensor."""

    module: str
    path: Path = ()

    def __str__(self) -> str:
        item = f" {_text(self.path)}" if self.path else ""
        return f"output{item} of {self.module or 'the model'}"


@dataclass(frozen=True)
class Call:
    """A call of a torch function in a program's text.

    Attributes:
        function: what is called, such as ``view``.
        source: module that holds the code: ``transformers.models.gpt2.modeling_gpt2``.
        code: qualified name of the function that holds the call: ``GPT2Attention.forward``.
        line: line of the call, for people.
        instruction: offset of the calling instruction in that function.
        occurrence: how many times the place was passed before in the same forward of the module; -1 if
            this holds for all passes.
    """

    function: str
    source: str
    code: str
    line: int
    instruction: int
    occurrence: int = -1

    def __str__(self) -> str:
        often = f", pass {self.occurrence + 1}" if self.occurrence >= 0 else ""
        return f"{self.function} in {self.source}:{self.line} {self.code}{often}"


@dataclass(frozen=True)
class CallArgument:
    """A tensor or number among the arguments of a call by a module's code.

    The path begins with a position, or with a keyword.
    """

    module: str
    call: Call
    path: Path

    def __str__(self) -> str:
        return f"argument {_text(self.path)} of {self.call} ({self.module or 'the model'})"


@dataclass(frozen=True)
class CallResult:
    """A tensor in the result of a call by a module's code."""

    module: str
    call: Call
    path: Path = ()

    def __str__(self) -> str:
        item = f" {_text(self.path)}" if self.path else ""
        return f"result{item} of {self.call} ({self.module or 'the model'})"


Place: TypeAlias = ModuleInput | ModuleOutput | CallArgument | CallResult


def _text(path: Path) -> str:
    return ".".join(map(str, path))
