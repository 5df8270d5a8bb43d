"""Changing calls of torch functions: their arguments and results, where one module's code makes them.

While the forward of such a module runs, a function mode is active, to which PyTorch gives every call of a
torch function. A call is changed if the plan names its place: the function that is called, and the
instruction in the program that calls it. Finding that instruction takes time, so it is looked for only if a
function of that name is to be changed. Other modules that run the same code, such as the next layer, are not
affected.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from colrow.apply.replay import Replaying
from colrow.apply.values import Change
from colrow.errors import PlanError
from colrow.forwards import OwnForward
from colrow.localise.arguments import replaced
from colrow.plan.places import Call, Path
from colrow.sources import source_of
from colrow.trace.functions import opened
from colrow.trace.listening import FUNCTIONS, Proceed, listening
from colrow.trace.sites import call_site
from colrow.tracer import outside_of_graphs

Replacement = Callable[..., Any]

_UNNAMED = "<lambda>"
"""Functions of this name in one file are told apart by their lines."""

_APPLY = "apply"
"""The name by which autograd functions are called."""


@dataclass
class CallChanges:
    """What is to be changed at one call.

    Attributes:
        arguments: changes of tensors among the arguments, each with the path to its tensor.
        integers: changes of numbers among the arguments, likewise.
        results: changes of tensors in the result, likewise.
        replacement: what is called in place of the function; ``None`` for the function itself.
    """

    arguments: list[tuple[Path, Change]] = field(default_factory=list)
    integers: list[tuple[Path, Callable[[Any], Any]]] = field(default_factory=list)
    results: list[tuple[Path, Change]] = field(default_factory=list)
    replacement: Replacement | None = None

    def with_(self, other: CallChanges) -> CallChanges:
        """These changes and those of ``other``."""
        return CallChanges(
            [*self.arguments, *other.arguments],
            [*self.integers, *other.integers],
            [*self.results, *other.results],
            self.replacement or other.replacement,
        )

    def call(self, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """The changed result of calling ``function``, or what replaces it, with the changed arguments."""
        for path, change_integer in self.integers:
            arguments, keywords = _changed(arguments, keywords, path, change_integer)
        for path, change in self.arguments:
            arguments, keywords = _changed(arguments, keywords, path, _on_tensors(change))
        result = (self.replacement or function)(*arguments, **keywords)
        for path, change in self.results:
            result = replaced(result, path, _on_tensors(change))
        return result


def _changed(
    arguments: tuple[Any, ...], keywords: dict[str, Any], path: Path, change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the one at ``path`` changed."""
    first = path[0]
    if not isinstance(first, int):
        return arguments, {**keywords, first: replaced(keywords[first], path[1:], change)}
    given = arguments[first]
    new = change(given) if len(path) == 1 else replaced(given, path[1:], change)
    return (*arguments[:first], new, *arguments[first + 1 :]), keywords


def _on_tensors(change: Change) -> Callable[[Any], Any]:
    return lambda item: change(item) if isinstance(item, Tensor) else item


class ModuleCalls:
    """The calls that are to be changed in the code of one module."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self._path, self._module = path, module
        self._changes: dict[Call, CallChanges] = {}
        self._after: list[Callable[[], None]] = []

    def at(self, call: Call) -> CallChanges:
        """The changes of one call, to add to."""
        return self._changes.setdefault(call, CallChanges())

    def afterwards(self, action: Callable[[], None]) -> None:
        """Call ``action`` whenever the module's forward has ended, also if it raised."""
        self._after.append(action)

    def attach(self) -> None:
        """Give the module a forward that changes the calls.

        Raises:
            PlanError: if the program is not the one that the plan was made for.
        """
        for call in self._changes:
            check_call(call, self._path)
        reason = f"the plan changes calls within the code of {self._path or 'the model'}"
        _Forward(self._module, _Mode(self._changes), self._after, reason).attach()


class _Forward(OwnForward):
    """A module's forward in which calls are changed.

    Args:
        module: the module.
        mode: changes the calls.
        after: what is called when the forward has ended.
        reason: why torch.compile cannot have this forward in a graph.
    """

    def __init__(self, module: nn.Module, mode: _Mode, after: list[Callable[[], None]], reason: str) -> None:
        super().__init__(module)
        self._mode, self._after, self._reason = mode, after, reason
        self._is_released = False
        self._choose()

    def _choose(self) -> None:
        """Set what runs: made from the others, so a copy has to make its own."""
        self._run = self._unchanged if self._is_released else outside_of_graphs(self._reason)(self._forward)

    def __getstate__(self) -> dict[str, Any]:
        return {name: item for name, item in super().__getstate__().items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._choose()

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._run(*arguments, **keywords)

    def release(self) -> None:
        self._is_released = True
        self._choose()

    def _unchanged(self, *arguments: Any, **keywords: Any) -> Any:
        return self._inner(arguments, keywords)

    def _forward(self, *arguments: Any, **keywords: Any) -> Any:
        self._mode.passes.clear()
        with self._changing(self._mode):
            return self._inner(arguments, keywords)

    @contextmanager
    def _changing(self, mode: _Mode) -> Iterator[None]:
        """A context in which calls are changed, and again when what is checkpointed in it is recomputed."""
        try:
            with mode, Replaying(lambda: partial(self._changing, mode.as_now())):
                if mode.changes_functions:
                    with listening(FUNCTIONS, mode.function):
                        yield
                else:
                    yield
        finally:
            for action in self._after:
                action()


class _Mode(TorchFunctionMode):
    """Changes calls of torch functions.

    Args:
        changes: by call. Those for a certain pass of a call (``occurrence``) come on top of those for all.

    Attributes:
        passes: how often each calling instruction has been passed in this forward, by its code object's
            identity and its offset.
        changes_functions: whether calls of ``torch.autograd.Function`` are among those to change.
    """

    def __init__(self, changes: dict[Call, CallChanges]) -> None:
        super().__init__()
        self.passes: dict[tuple[int, int], int] = defaultdict(int)
        self._names = {call.function for call in changes}
        self._calls: dict[tuple[str, str, int, int], dict[int, CallChanges]] = defaultdict(dict)
        for call, change in changes.items():
            line = call.line if call.code.endswith(_UNNAMED) else 0
            self._calls[call.source, call.code, call.instruction, line][call.occurrence] = change
        for passes in self._calls.values():
            every = passes.get(-1)
            for occurrence in passes if every is not None else ():
                if occurrence >= 0 and every is not None:
                    passes[occurrence] = passes[occurrence].with_(every)
        self._codes: dict[int, tuple[CodeType, str]] = {}
        self._opened = any(call.source == "torch.nn.functional" for call in changes)
        self.changes_functions = _APPLY in self._names

    def as_now(self) -> _Mode:
        """A copy that goes on counting passes from where this one is now."""
        other = copy.copy(self)
        other.passes = self.passes.copy()
        return other

    def function(self, given: tuple[Any, ...], keywords: dict[str, Any], proceed: Proceed) -> Any:
        """Change the call of an autograd function, which PyTorch gives to no mode.

        Args:
            given: the function's class, and its arguments.
            keywords: its keywords.
            proceed: makes the call.
        """
        changes = self._find(given[0].apply)
        if changes is None:
            return proceed(*given, **keywords)
        return changes.call(partial(proceed, given[0]), given[1:], keywords)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in self._names:
            changes = self._find(function)
            if changes is not None:
                return changes.call(function, args, keywords)
        if self._opened:
            body = _body(function)
            if body is not None:
                with self:
                    return body(*args, **keywords)
        return function(*args, **keywords)

    def _find(self, function: Any) -> CallChanges | None:
        """The changes of the call that is being made, if there are any; counts it as a pass."""
        site = call_site(function)
        identity = id(site.code)
        if identity not in self._codes:
            # the code is kept, so that no other gets its identity
            self._codes[identity] = (site.code, source_of(site.code.co_filename))
        name = site.code.co_qualname
        line = site.line if name.endswith(_UNNAMED) else 0
        key = (self._codes[identity][1], name, site.instruction, line)
        found = self._calls.get(key)
        if found is None:
            return None
        place = (identity, site.instruction)
        occurrence = self.passes[place]
        self.passes[place] += 1
        return found.get(occurrence) or found.get(-1)


def _body(function: Any) -> Callable[..., Any] | None:
    """The Python code of a torch function whose own calls can be changed; ``None`` for all others."""
    if not isinstance(function, FunctionType):
        return None
    return opened(function)


def check_call(call: Call, path: str) -> None:
    """Refuse a call that is no longer where the plan has it.

    A call in code that cannot be found by its name, such as that of a program in a notebook, is let pass.

    Args:
        call: as the plan has it.
        path: of the module whose code makes it.

    Raises:
        PlanError: if the code has changed since, as with another release of the library or of Python.
    """
    codes = _codes(call)
    if codes is None:
        return
    lines = {
        line for code in codes for start, end, line in code.co_lines() if start <= call.instruction < end
    }
    if call.line not in lines:
        raise PlanError(
            path,
            f"the plan changes {call}, but that line is not there any more: the code has changed since",
            "Make a new plan.",
        )


def _codes(call: Call) -> list[CodeType] | None:
    """The code objects with the name of the one that makes a call; ``None`` if nobody knows where to look."""
    outer, _, inner = call.code.partition(".<locals>.")
    found: Any = sys.modules.get(call.source)
    for name in outer.split("."):
        found = getattr(found, name, None)
    code = getattr(getattr(found, "__wrapped__", found), "__code__", None)
    if code is None or code.co_qualname != outer:
        return None
    return [one for one in _within(code) if one.co_qualname == call.code] if inner else [code]


def _within(code: CodeType) -> Iterator[CodeType]:
    """The code objects of the functions that are defined in a function."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _within(constant)


class CallTable:
    """The calls that are to be changed in a model, by module."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: dict[str, ModuleCalls] = {}

    def at(self, path: str) -> ModuleCalls:
        """The calls to be changed in the code of the module at ``path``, to add to.

        Raises:
            PlanError: if there is none.
        """
        if path not in self._modules:
            try:
                module = self._model.get_submodule(path)
            except AttributeError as error:
                raise PlanError(path, "the model has no such module", "Make a new plan for it.") from error
            self._modules[path] = ModuleCalls(path, module)
        return self._modules[path]

    def attach(self) -> None:
        """Give each of these modules a forward that changes its calls.

        Raises:
            PlanError: if the program is not the one that the plan was made for.
        """
        for calls in self._modules.values():
            calls.attach()


def local_number(given: int, wanted: int | tuple[int, ...], place: object) -> Callable[[Any], Any]:
    """A change of a number among the arguments of a call.

    Args:
        given: what the program gave when the plan was made.
        wanted: what takes its place on this rank. If the program gives a multiple of ``given``, because the
            batch is larger, a multiple of this does. A list of sizes takes the place of any number.
        place: the argument, named in errors.
    """

    def change(number: Any) -> Any:
        if not isinstance(number, int) or number == given or isinstance(wanted, tuple):
            return wanted
        scaled, rest = divmod(number * wanted, given)
        if rest:
            raise ValueError(
                f"{place}: got {number} where the plan was made for {given} or a multiple of it: make the "
                "plan from an example of this form"
            )
        return scaled

    return change
