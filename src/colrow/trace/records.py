"""What a trace is made of: values, operators, the module and function calls they belong to, and integers.

A trace is plain data. Tensors are replaced by :class:`Value` everywhere: nothing here holds memory or can be
executed by itself, so a trace of a 400-billion-parameter model is small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Literal

import torch
from torch import Tensor

from colrow.sources import short_path
from colrow.trace.integers import Expression
from colrow.trace.trial import Finding, Trial

SourceKind = Literal["parameter", "buffer", "input", "constant", "result"]
WrittenKind = Literal["function", "operator", "hook", "parameter hook"]


@dataclass(frozen=True)
class Source:
    """Where a value comes from.

    Attributes:
        kind: ``result`` for the result of an operator.
        name: fully qualified name of a parameter or buffer; path of an input (``input_ids``); else empty.
    """

    kind: SourceKind
    name: str = ""


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the trace, without its data.

    Attributes:
        index: position in :attr:`Trace.values`.
        shape, dtype: as traced.
        source: where it comes from.
        storage: the same number for values that share memory.
        differentiable: whether a gradient can reach a parameter or input through it; floating-point inputs
            are taken to want one.
        producer: the operator whose result it is.
        uses: the operators that read it, in order.
        content: its actual data after the last write, on the CPU, where that is known without weights:
            constants, masks, positions.
        read: where the program reads its numbers, if they were guessed: after how many operators, and the
            place in its text.
    """

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Source
    storage: int
    differentiable: bool = False
    producer: Operation | None = None
    uses: list[Operation] = field(default_factory=list)
    content: Tensor | None = None
    read: tuple[int, str] | None = None

    def __repr__(self) -> str:
        return f"%{self.index}{list(self.shape)}"


@dataclass(eq=False, slots=True)
class ModuleCall:
    """One call of a module's forward.

    Attributes:
        index: position in :attr:`Trace.modules`.
        path: fully qualified name; empty for the model itself.
        parent: the call it happened in.
        first, last: its operators are ``trace.operations[first:last]``.
        inputs, outputs: tensors by their path in arguments and result: ``(0,)``, ``("hidden_states",)``.
        type_name: name of the module's class, for people.
        copy_of: the call of an identical sibling that its record was copied from, instead of being executed.
    """

    index: int
    path: str
    parent: ModuleCall | None
    first: int
    last: int = -1
    inputs: list[tuple[tuple[int | str, ...], Value]] = field(default_factory=list)
    outputs: list[tuple[tuple[int | str, ...], Value]] = field(default_factory=list)
    type_name: str = ""
    copy_of: ModuleCall | None = None

    def __repr__(self) -> str:
        return f"{self.type_name}({self.path or 'the model'})"


@dataclass(frozen=True)
class CallSite:
    """A place in a program: the same on every call, whatever the arguments.

    Attributes:
        code: code object of the caller.
        instruction: offset of the calling instruction within it.
    """

    code: CodeType
    instruction: int

    @property
    def file(self) -> str:
        return self.code.co_filename

    @property
    def line(self) -> int:
        """The source line."""
        for start, end, line in self.code.co_lines():
            if start <= self.instruction < end and line is not None:
                return line
        return self.code.co_firstlineno

    def __str__(self) -> str:
        return f"{short_path(self.file)}:{self.line} in {self.code.co_name}"


@dataclass(eq=False, slots=True)
class FunctionCall:
    """One call of a torch function by a module's code, such as ``Tensor.view``.

    Attributes:
        index: position in :attr:`Trace.calls`.
        function: what was called.
        arguments, keywords: as given, values in place of tensors, integers with where they came from.
        outputs: its result, values in place of tensors.
        module: the module call whose code called it.
        site: the place in that code, which may be code of torch, as ``nn.Linear.forward`` is.
        origin: the innermost place outside torch, for people.
        occurrence: how many times this place had been passed before, within the same module call.
        first, last: its operators are ``trace.operations[first:last]``.
    """

    index: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    module: ModuleCall
    site: CallSite
    origin: CallSite
    first: int
    occurrence: int = 0
    last: int = -1
    outputs: Any = None

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", str(self.function))

    @property
    def place(self) -> tuple[int, str, int, int, int]:
        """The same in a recording of the same program with other sizes."""
        site = self.site
        return self.module.index, self.name, id(site.code), site.instruction, self.occurrence


@dataclass(eq=False, slots=True)
class Operation:
    """One ATen operator.

    Attributes:
        index: position in :attr:`Trace.operations`.
        function: the operator's overload, as ``torch.ops.aten.view.default``.
        arguments, keywords: as given, values in place of tensors. Where integers came from is known to the
            call, not here.
        inputs: the values among them, in order; one that is given twice stands twice.
        outputs: its results; an operator that writes in place has its own input among them.
        module: the module call it happened in.
        call: the function call it implements, if any.
    """

    index: int
    function: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    module: ModuleCall | None
    call: FunctionCall | None = None

    @property
    def name(self) -> str:
        """Namespace and name without overload: ``aten.view``."""
        return self.function._schema.name.replace("::", ".")

    def __repr__(self) -> str:
        where = self.module.path if self.module is not None else ""
        return (
            f"{self.index}: {list(self.outputs)} = {self.name}({list(self.inputs)}) in {where or 'the model'}"
        )


@dataclass(eq=False, slots=True)
class Escape:
    """A use of an integer as a number, such as ``1 / math.sqrt(q.size(1))``.

    Shapes can be made local behind a program's back, numbers cannot: when ``expression`` would become local,
    what was computed from it would be wrong.

    Attributes:
        expression: where the integer came from.
        use: the operation: ``/``, ``**``, ``float()``, ``torch.tensor``, ``aten.mul``, ``comparison``.
        module: the module call it happened in.
        site: the innermost place outside torch.
    """

    expression: Expression
    use: str
    module: ModuleCall | None
    site: CallSite

    def __str__(self) -> str:
        return f"{self.use} of {self.expression} = {self.expression.value} at {self.site}"


@dataclass(eq=False, slots=True)
class WrittenGradient:
    """A gradient that the program writes or reads itself: what autograd would make of the operators may not
    be what happens.

    Attributes:
        name: what does it, for people.
        kind: a ``function`` of the program (``torch.autograd.Function``), a custom ``operator``, a ``hook``
            that is shown the gradient, or a ``parameter hook``, which was there before.
        inputs, outputs: the values between which it stands; those of a hook on a value are the value before
            and after, those of a hook on a parameter the parameter alone.
        module: the module call it happened in; ``None`` for hooks that were there before.
        first, last: its operators are ``trace.operations[first:last]``.
        site: the innermost place outside torch, for people.
        trial: how to find out what it does; ``None`` for hooks.
        finding: what was found out, by :func:`colrow.trace.written.judge`.
        copied: whether its record was copied from that of a sibling of its layer.
    """

    name: str
    kind: WrittenKind
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    module: ModuleCall | None
    first: int
    last: int
    site: CallSite | None = None
    trial: Trial | None = None
    finding: Finding | None = None
    copied: bool = False


@dataclass(frozen=True)
class Recomputation:
    """A function that a backward pass runs again, instead of keeping its activations.

    That is what ``torch.utils.checkpoint`` does.

    Attributes:
        module: the module call whose code calls it.
        first, last: its operators are ``trace.operations[first:last]``.
        repeated: only those in front of this one are run again: the others leave nothing that a gradient
            needs, and PyTorch stops before them.
        reentrant: the form in which the forward records nothing for gradients, which flow through what is
            run again, and then from there on.
    """

    module: ModuleCall | None
    first: int
    last: int
    repeated: int
    reentrant: bool


@dataclass(frozen=True)
class Kept:
    """Something that a run has computed and left where others find it.

    Attributes:
        label: where, for people.
        value: what.
        given: whether it is in what the caller gave, such as a cache, rather than in a module.
    """

    label: str
    value: Value
    given: bool


@dataclass(eq=False)
class Trace:
    """One run of a model on meta tensors, or several runs of one model.

    Attributes:
        mode: what the user's example shows: ``training``, ``evaluation``, ``generation``, ...
        values, operations, calls, modules: in the order they came to be.
        outputs: the tensors of the result by their path in it; of all results if there were several runs.
        runs: the mode of each run and its call of the model.
        kept: what a run has left in attributes of modules, in what functions there refer to, and in lists and
            dictionaries of the caller: others may read it.
        warnings: what had to be guessed, for people.
        guessed: paths of modules that were run on guesses: another time their code takes another course.
        escapes: integers that were used as numbers.
        written: gradients that the program writes or reads itself.
        recomputed: functions that a backward pass runs again.
        read: indices of the parameters that modules have read as attributes, as ``self.weight``; others are
            read from lists, by ``named_parameters()`` and the like.
    """

    mode: str
    values: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    calls: list[FunctionCall] = field(default_factory=list)
    modules: list[ModuleCall] = field(default_factory=list)
    outputs: list[tuple[tuple[int | str, ...], Value]] = field(default_factory=list)
    runs: list[tuple[str, ModuleCall]] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    guessed: set[str] = field(default_factory=set)
    escapes: list[Escape] = field(default_factory=list)
    written: list[WrittenGradient] = field(default_factory=list)
    recomputed: list[Recomputation] = field(default_factory=list)
    read: set[int] = field(default_factory=set)

    def __str__(self) -> str:
        from colrow.trace.show import render

        return render(self)

    def show(self, *, copies: bool = False) -> None:
        """Print the module calls with their operators and call sites.

        Args:
            copies: spell out repeated layers too.
        """
        from colrow.trace.show import render

        print(render(self, copies=copies))
