"""A forward of a module's own: a callable in the instance's ``__dict__``, around the forward of its class.

It costs a tenth of what a hook costs. Hooks of others run around it: those before the forward see what the
caller gives, those after it what the caller gets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from inspect import signature
from types import CellType, MethodType
from typing import Any

import torch
from torch import nn

from colrow.errors import PlanError

_FORWARD = "forward"
_OUTERMOST = "_colrow_forward"
"""Where a module keeps the outermost of its own forwards that colrow made, whatever others put around it."""

_FAR = 6
"""A wrapper holds what it wraps within so many steps from attribute to attribute."""


class OwnForward:
    """What a module runs in place of the forward that it has; calls that one by :meth:`_inner`.

    A deep copy of the module has one of its own, and so has a module that was pickled.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own: Callable[..., Any] | None = vars(module).get(_FORWARD)
        self._describe(module.forward)

    def _describe(self, original: Callable[..., Any]) -> None:
        # others ask for the names of arguments, and for the name of the function
        self.__signature__ = signature(original)
        self.__name__, self.__doc__ = _FORWARD, original.__doc__

    def __getstate__(self) -> dict[str, Any]:
        return {name: item for name, item in vars(self).items() if name != "__signature__"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._describe(self._own or type(self._module).forward.__get__(self._module))

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._inner(arguments, keywords)

    def _inner(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        own, module = self._own, self._module
        if own is not None:
            return own(*arguments, **keywords)
        return type(module).forward(module, *arguments, **keywords)  # which may change, as by FSDP

    def attach(self) -> None:
        """Become the forward of the module."""
        own = vars(self._module)
        own[_FORWARD] = own[_OUTERMOST] = self

    def release(self) -> None:
        """Do nothing from now on but to call the forward of the module's class, or what it had before."""
        raise NotImplementedError


def own_forwards(module: nn.Module) -> list[OwnForward]:
    """The forwards of colrow's that a module has, the outermost first."""
    return list(_chain(vars(module).get(_OUTERMOST)))


def kept_by_forwards(module: nn.Module) -> set[str]:
    """The attributes of a module that :func:`take_back` puts back."""
    return {_FORWARD, _OUTERMOST} if _OUTERMOST in vars(module) else set()


def take_back(module: nn.Module) -> None:
    """Give a module, or a copy of it, the forward that it had before colrow changed it.

    If others have wrapped it since, theirs stays, and colrow's in it does nothing any more.
    """
    outermost = vars(module).pop(_OUTERMOST, None)
    if outermost is None:
        return
    chain = list(_chain(outermost))
    if vars(module).get(_FORWARD) is not outermost:
        for forward in reversed(chain):
            forward.release()
    elif chain[-1]._own is None:
        del vars(module)[_FORWARD]
    else:
        vars(module)[_FORWARD] = chain[-1]._own


def _chain(forward: Any) -> Iterator[OwnForward]:
    """Forwards of colrow's around each other, the outermost first."""
    while isinstance(forward, OwnForward):
        yield forward
        forward = forward._own


class Watch:
    """A hook on a model that refuses to run where colrow's part would be left out, or could not be done.

    A library that replaces forwards, rather than wrapping them, would leave out the collectives in and around
    them without an error; transforms of torch would fail with an error that does not say why.

    Args:
        model: in which all forwards have been attached.
    """

    def __init__(self, model: nn.Module) -> None:
        self._watched = [
            (path, module, vars(module)[_OUTERMOST])
            for path, module in model.named_modules()
            if _OUTERMOST in vars(module)
        ]
        if self._watched:
            model.register_forward_pre_hook(self._check)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for _, module, forward in self._watched:
            if _OUTERMOST not in vars(module):
                # those that copy themselves in a way of their own, as torch.fx has it, leave it behind
                forward.attach()

    def _check(self, module: nn.Module, arguments: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise PlanError(
                "",
                "a transform of torch.func (grad, vmap, jvp and others) cannot go through collectives",
                "Use loss.backward() or torch.autograd.grad, or colrow.unshard before the transform.",
            )
        if torch._C._is_tracing():
            raise PlanError(
                "", "torch.jit.trace cannot record collectives", "Use torch.compile, or colrow.unshard first."
            )
        for path, watched, forward in self._watched:
            if watched.__dict__.get(_FORWARD) is not forward and not _holds(watched, forward):
                raise PlanError(
                    path,
                    "its forward has been replaced since colrow.parallelize, and with it what colrow does in "
                    "it and around it",
                    "Replace forwards before colrow.parallelize, or wrap the one that is there.",
                )


def _holds(module: nn.Module, forward: OwnForward) -> bool:
    """Whether what the module has for a forward now holds ``forward`` somewhere."""
    found: list[Any] = [vars(module).get(_FORWARD)]
    # libraries keep what they wrap in the module too
    found += [item for name, item in vars(module).items() if name not in (_FORWARD, _OUTERMOST)]
    seen: set[int] = set()
    for _ in range(_FAR):
        if any(item is forward for item in found):
            return True
        seen.update(map(id, found))
        found = [item for one in found for item in _inside(one) if id(item) not in seen]
    return False


def _inside(item: Any) -> list[Any]:
    """What a callable may call: what it wraps, is bound to or closes over."""
    if isinstance(item, nn.Module) or (not callable(item) and not isinstance(item, CellType)):
        return []
    if isinstance(item, CellType):
        try:
            return [item.cell_contents]
        except ValueError:  # empty
            return []
    if isinstance(item, MethodType):
        return [item.__func__, item.__self__]
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values(), *vars(item).values()]
    closure = getattr(item, "__closure__", None) or ()
    return [*closure, *getattr(item, "__dict__", {}).values()]
