"""Changing arguments and results of calls within a module's code, while that module runs and only there.

A function mode sees every torch function that the module's code calls. It looks for the place of a call only
if the function has the name of one that is to be changed.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from colrow.apply.replay import Replaying
from colrow.apply.values import Change
from colrow.errors import PlanError
from colrow.localise.arguments import replaced
from colrow.plan.places import Call, Path
from colrow.trace.functions import opened
from colrow.trace.listening import FUNCTIONS, Proceed, listening
from colrow.trace.sites import call_site
from colrow.tracer import outside_of_graphs

Replacement = Callable[..., Any]

_APPLY = "apply"
"""By this name autograd functions are called."""


@dataclass
class CallChanges:
    """What is to happen at one place in the program's text.

    Attributes:
        arguments, results: changes of tensors by their path.
        integers: changes of numbers by their path.
        replacement: what is called instead.
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
        """Call the function with everything changed."""
        both: Any = (arguments, keywords)
        for path, change_integer in self.integers:
            both = replaced(both, _path(path), change_integer)
        for path, change in self.arguments:
            both = replaced(both, _path(path), _on_tensors(change))
        result = (self.replacement or function)(*both[0], **both[1])
        for path, change in self.results:
            result = replaced(result, path, _on_tensors(change))
        return result


def _path(path: Path) -> Path:
    return (0 if isinstance(path[0], int) else 1, *path)


def _on_tensors(change: Change) -> Callable[[Any], Any]:
    return lambda item: change(item) if isinstance(item, Tensor) else item


class ModuleCalls:
    """The calls of one module's code that are to be changed."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self._path, self._module = path, module
        self._changes: dict[Call, CallChanges] = {}
        self._after: list[Callable[[], None]] = []

    def at(self, call: Call) -> CallChanges:
        """The changes of one call."""
        return self._changes.setdefault(call, CallChanges())

    def afterwards(self, action: Callable[[], None]) -> None:
        """Do something whenever the module's forward has ended."""
        self._after.append(action)

    def attach(self) -> None:
        """Run the module's forward under the mode.

        Raises:
            PlanError: if the program's text is not the one that the plan was made for.
        """
        for call in self._changes:
            check_call(call, self._path)
        own = vars(self._module).get("forward")
        reason = f"the plan changes calls within the code of {self._path or 'the model'}"
        self._module.forward = _Forward(self._module, own, _Mode(self._changes), self._after, reason)


class _Forward:
    """A module's forward under the mode; a copy of the module has one of its own."""

    def __init__(
        self,
        module: nn.Module,
        own: Callable[..., Any] | None,
        mode: _Mode,
        after: list[Callable[[], None]],
        reason: str,
    ) -> None:
        self._module, self._own, self._mode, self._after, self._reason = module, own, mode, after, reason
        original = self._original
        # others ask for the names of arguments, and for the name of the function
        self.__signature__ = signature(original)
        self.__name__, self.__doc__ = "forward", original.__doc__
        self._run = outside_of_graphs(reason)(self._forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        return _Forward(
            copy.deepcopy(self._module, memo),
            copy.deepcopy(self._own, memo),
            copy.deepcopy(self._mode, memo),
            copy.deepcopy(self._after, memo),
            self._reason,
        )

    @property
    def _original(self) -> Callable[..., Any]:
        """What the module runs without this: a forward of its own, or that of its class."""
        bound: Callable[..., Any] = type(self._module).forward.__get__(self._module)
        return self._own or bound

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._run(*arguments, **keywords)

    def _forward(self, *arguments: Any, **keywords: Any) -> Any:
        self._mode.passes.clear()
        with self._changing(self._mode):
            return self._original(*arguments, **keywords)

    @contextmanager
    def _changing(self, mode: _Mode) -> Iterator[None]:
        """Calls are changed in this context, and when what is checkpointed in it is recomputed."""
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
    def __init__(self, changes: dict[Call, CallChanges]) -> None:
        super().__init__()
        self.passes: dict[tuple[int, int], int] = defaultdict(int)
        self._names = {call.function for call in changes}
        self._calls: dict[tuple[str, str, int], dict[int, CallChanges]] = defaultdict(dict)
        for call, change in changes.items():
            self._calls[call.source, call.code, call.instruction][call.occurrence] = change
        for passes in self._calls.values():
            every = passes.get(-1)
            for occurrence in passes if every is not None else ():
                if occurrence >= 0 and every is not None:
                    passes[occurrence] = passes[occurrence].with_(every)
        self._codes: dict[int, tuple[CodeType, str]] = {}
        self._opened = any(call.source == "torch.nn.functional" for call in changes)
        self.changes_functions = _APPLY in self._names

    def as_now(self) -> _Mode:
        """Another one, for which as many passes of each call lie behind as for this one now."""
        other = copy.copy(self)
        other.passes = self.passes.copy()
        return other

    def function(self, given: tuple[Any, ...], keywords: dict[str, Any], proceed: Proceed) -> Any:
        """A call of an autograd function, which no mode sees; the first argument is its class."""
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
        site = call_site(function)
        identity = id(site.code)
        if identity not in self._codes:
            # the code is kept, so that no other gets its identity
            self._codes[identity] = (site.code, source_of(site.code.co_filename))
        key = (self._codes[identity][1], site.code.co_qualname, site.instruction)
        found = self._calls.get(key)
        if found is None:
            return None
        place = (identity, site.instruction)
        occurrence = self.passes[place]
        self.passes[place] += 1
        return found.get(occurrence) or found.get(-1)


def _body(function: Any) -> Callable[..., Any] | None:
    if not isinstance(function, FunctionType):
        return None
    return opened(function)


def source_of(file: str) -> str:
    """The name of the Python module whose code lies in ``file``; the file's own name if there is none."""
    names = [
        name
        for name, module in list(sys.modules.items())
        if getattr(module, "__file__", None) == file and name != "__main__"
    ]
    return min(names, key=len) if names else file.rpartition("/")[2]


def check_call(call: Call, path: str) -> None:
    """Refuse a call that is no longer where the plan has it.

    Raises:
        PlanError: if the code has changed since, as with another release of the library or of Python.
    """
    module = sys.modules.get(call.source)
    found: Any = module
    for name in call.code.split("."):
        found = getattr(found, name, None)
    code = getattr(getattr(found, "__wrapped__", found), "__code__", None)
    if module is None or code is None or code.co_qualname != call.code:
        return  # code within another function, or in a file of its own: found when it runs
    lines = {line for start, end, line in code.co_lines() if start <= call.instruction < end}
    if call.line not in lines:
        raise PlanError(
            path,
            f"the plan changes {call}, but that line is not there any more: the code has changed since",
            "Make a new plan.",
        )


class CallTable:
    """The calls of all modules of a model that are to be changed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: dict[str, ModuleCalls] = {}

    def at(self, path: str) -> ModuleCalls:
        """The calls of the module at ``path``.

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
        """Let all modules run under their modes."""
        for calls in self._modules.values():
            calls.attach()


def local_number(given: int, wanted: int | tuple[int, ...], place: object) -> Callable[[Any], Any]:
    """The change of a number: ``given`` becomes ``wanted``, a multiple of it the same multiple."""

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
