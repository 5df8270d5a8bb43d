"""Integers that remember where they came from: an attribute, a tensor's size, or arithmetic on those."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Literal:
    """A number from the program's text, or one whose origin is not known."""

    value: int

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute of a module, or of an object that a module holds, such as its configuration.

    ``module`` is the module's path, ``path`` the dotted path of attributes from it: ``config.num_heads``;
    items of tuples, lists and dictionaries stand as further names: ``split_sizes.0``.
    """

    module: str
    path: str
    value: int

    def __str__(self) -> str:
        return f"{self.module}.{self.path}" if self.module else self.path


@dataclass(frozen=True, slots=True)
class Size:
    """The extent of a dimension of a traced value, by the value's index."""

    value_index: int
    dimension: int
    value: int

    def __str__(self) -> str:
        return f"%{self.value_index}.shape[{self.dimension}]"


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """``left symbol right`` for one of ``+ - * // %``; for a comparison, ``==`` or ``<``, 1 if it holds."""

    symbol: str
    left: Expression
    right: Expression
    value: int

    def __str__(self) -> str:
        return f"({self.left} {self.symbol} {self.right})"


Expression: TypeAlias = Literal | Attribute | Size | Arithmetic

EscapeListener: TypeAlias = Callable[[Expression, str], None]


COMPARISON = "comparison"
"""The use of numbers that are compared; the expression is 1 if the comparison holds."""


def evaluate(expression: Expression, number_of: Callable[[Attribute | Size], int]) -> int:
    """The expression's number when its attributes and sizes have the given ones.

    Raises:
        ZeroDivisionError: as Python does.
    """
    if isinstance(expression, Literal):
        return expression.value
    if isinstance(expression, Attribute | Size):
        return number_of(expression)
    left = evaluate(expression.left, number_of)
    right = evaluate(expression.right, number_of)
    match expression.symbol:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case "//":
            return left // right
        case "==":
            return int(left == right)
        case "<":
            return int(left < right)
        case _:
            return left % right


def substitute(expression: Expression, replace: Callable[[Attribute | Size], Expression]) -> Expression:
    """The expression with its attributes and sizes replaced."""
    if isinstance(expression, Literal):
        return expression
    if isinstance(expression, Attribute | Size):
        return replace(expression)
    left = substitute(expression.left, replace)
    right = substitute(expression.right, replace)
    return Arithmetic(expression.symbol, left, right, expression.value)


def origins(expression: Expression) -> list[Attribute | Size]:
    """The attributes and sizes that an expression is made of, from left to right."""
    if isinstance(expression, Literal):
        return []
    if isinstance(expression, Attribute | Size):
        return [expression]
    return origins(expression.left) + origins(expression.right)


def _less(number: int, other: int, reflected: bool) -> int:
    return int(int.__lt__(other, number) if reflected else int.__lt__(number, other))


class TracedInt(int):
    """An integer that knows its expression and keeps it through ``+ - * // %``.

    It passes wherever an ``int`` does, through torch's C++ argument parsing too. Uses that leave the
    integers, such as ``n ** -0.5``, ``n / 2``, ``n * 0.5`` or ``math.sqrt(n)``, are reported as escapes.

    A ``float`` on the left of an operator (``1.0 / n``) reads the number without asking it: such a use is
    not seen.
    """

    expression: Expression
    listener: EscapeListener | None

    def __new__(cls, value: int, expression: Expression, listener: EscapeListener | None = None) -> TracedInt:
        self = int.__new__(cls, int.__int__(value))
        self.expression = expression
        self.listener = listener
        return self

    def escape(self, use: str) -> None:
        """Report that the number was used as a number."""
        if self.listener is not None:
            self.listener(self.expression, use)

    # a copy that outlives the trace is a plain number
    def __copy__(self) -> int:
        return int.__int__(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int.__int__(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return (int, (int.__int__(self),))

    def _join(self, symbol: str, other: Any, result: Any, reflected: bool = False) -> Any:
        if result is NotImplemented:
            if isinstance(other, float | complex):
                self.escape(symbol)
            return result
        theirs = other.expression if isinstance(other, TracedInt) else Literal(int(other))
        left, right = (theirs, self.expression) if reflected else (self.expression, theirs)
        return TracedInt(result, Arithmetic(symbol, left, right, result), self.listener)

    def __add__(self, other: Any) -> Any:
        return self._join("+", other, int.__add__(self, other))

    def __radd__(self, other: Any) -> Any:
        return self._join("+", other, int.__radd__(self, other), reflected=True)

    def __sub__(self, other: Any) -> Any:
        return self._join("-", other, int.__sub__(self, other))

    def __rsub__(self, other: Any) -> Any:
        return self._join("-", other, int.__rsub__(self, other), reflected=True)

    def __mul__(self, other: Any) -> Any:
        return self._join("*", other, int.__mul__(self, other))

    def __rmul__(self, other: Any) -> Any:
        return self._join("*", other, int.__rmul__(self, other), reflected=True)

    def __floordiv__(self, other: Any) -> Any:
        return self._join("//", other, int.__floordiv__(self, other))

    def __rfloordiv__(self, other: Any) -> Any:
        return self._join("//", other, int.__rfloordiv__(self, other), reflected=True)

    def __mod__(self, other: Any) -> Any:
        return self._join("%", other, int.__mod__(self, other))

    def __rmod__(self, other: Any) -> Any:
        return self._join("%", other, int.__rmod__(self, other), reflected=True)

    def __divmod__(self, other: Any) -> Any:
        return (self // other, self % other)

    def __rdivmod__(self, other: Any) -> Any:
        return (other // self, other % self)

    # comparisons: what the program does next may depend on them

    def _compare(self, symbol: str, other: Any, outcome: Any, reflected: bool = False) -> Any:
        if self.listener is not None and isinstance(other, int):
            theirs = other.expression if isinstance(other, TracedInt) else Literal(int.__int__(other))
            left, right = (theirs, self.expression) if reflected else (self.expression, theirs)
            number = int(int.__eq__(self, other)) if symbol == "==" else _less(self, other, reflected)
            self.listener(Arithmetic(symbol, left, right, number), COMPARISON)
        return outcome

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> Any:
        return self._compare("==", other, int.__eq__(self, other))

    def __ne__(self, other: object) -> Any:
        return self._compare("==", other, int.__ne__(self, other))

    def __lt__(self, other: Any) -> Any:
        return self._compare("<", other, int.__lt__(self, other))

    def __ge__(self, other: Any) -> Any:
        return self._compare("<", other, int.__ge__(self, other))

    def __gt__(self, other: Any) -> Any:
        return self._compare("<", other, int.__gt__(self, other), reflected=True)

    def __le__(self, other: Any) -> Any:
        return self._compare("<", other, int.__le__(self, other), reflected=True)

    def __neg__(self) -> int:
        return 0 - self

    def __pos__(self) -> int:
        return self

    def __abs__(self) -> int:
        return self if self >= 0 else 0 - self

    def __ceil__(self) -> int:
        return self

    def __floor__(self) -> int:
        return self

    def __trunc__(self) -> int:
        return self

    def __round__(self, digits: Any = None) -> int:
        return self

    # uses as a number

    def __int__(self) -> int:
        self.escape("int()")
        return int.__int__(self)

    def __float__(self) -> float:
        self.escape("float()")
        return int.__float__(self)

    def __complex__(self) -> complex:
        self.escape("complex()")
        return complex(int.__int__(self))

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        self.escape("**")
        return int.__pow__(self, other, modulus)

    def __rpow__(self, other: Any, modulus: Any = None) -> Any:
        self.escape("**")
        return int.__rpow__(self, other, modulus)

    def __truediv__(self, other: Any) -> Any:
        self.escape("/")
        return int.__truediv__(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        self.escape("/")
        return int.__rtruediv__(self, other)

    def __lshift__(self, other: Any) -> Any:
        self.escape("<<")
        return int.__lshift__(self, other)

    def __rlshift__(self, other: Any) -> Any:
        self.escape("<<")
        return int.__rlshift__(self, other)

    def __rshift__(self, other: Any) -> Any:
        self.escape(">>")
        return int.__rshift__(self, other)

    def __and__(self, other: Any) -> Any:
        self.escape("&")
        return int.__and__(self, other)

    def __or__(self, other: Any) -> Any:
        self.escape("|")
        return int.__or__(self, other)

    def __xor__(self, other: Any) -> Any:
        self.escape("^")
        return int.__xor__(self, other)
