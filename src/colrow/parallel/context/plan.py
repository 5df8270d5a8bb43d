"""What is done to a model so that each rank works on its tokens: places in its program, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from colrow.plan.places import Call, Path
from colrow.trace.integers import Arithmetic, Attribute, Expression, Literal, Size, evaluate


@dataclass(frozen=True)
class Extent:
    """Where the tokens lie in a tensor.

    Attributes:
        dimension: which is rows x tokens x ``inner``.
        inner: how many numbers of each token lie together in it; 1 but for what was flattened.
        missing: how many of the last tokens are left out, as of what is compared with the next token.
    """

    dimension: int
    inner: int = 1
    missing: int = 0


@dataclass(frozen=True)
class At:
    """A call by one module's code.

    Attributes:
        module: path of the module.
        call: the place in the code.
    """

    module: str
    call: Call

    def __str__(self) -> str:
        return f"{self.call} ({self.module or 'the model'})"


@dataclass(frozen=True)
class Taken:
    """A whole tensor among the arguments or in the result of a call, of which a rank takes its tokens."""

    at: At
    path: Path
    extent: Extent
    is_result: bool


@dataclass(frozen=True)
class Gathered:
    """A tensor of a rank's tokens among the arguments of a call that mixes them: it is given those of all."""

    at: At
    path: Path
    extent: Extent


@dataclass(frozen=True)
class WholeNumber:
    """A number among the arguments of a call that is computed from a rank's tokens and must count all."""

    at: At
    path: Path


@dataclass(frozen=True)
class LastToken:
    """A number by which a call leaves out the last token: a rank leaves out none, and the loss ignores it."""

    at: At
    path: Path


@dataclass(frozen=True)
class LossCall:
    """A call of a loss that is a sum, or a mean, over tokens.

    Attributes:
        at: where.
        target: where the tokens lie in the targets, if these are whole there; ``None`` if they are cut.
    """

    at: At
    target: Extent | None


@dataclass(frozen=True)
class Tokens:
    """In an expression: a size that depends on the length of the sequence.

    Attributes:
        is_local: whether it counts a rank's tokens only.
        factor: what it is for each token.
        rest: what it is besides.
    """

    is_local: bool
    factor: int
    rest: int

    def number(self, tokens: int, length: int) -> int:
        """The size where the rank has ``tokens`` of ``length``."""
        return self.factor * (tokens if self.is_local else length) + self.rest


@dataclass(frozen=True)
class Guard:
    """A comparison in the program, on which it depends what is done next.

    Attributes:
        expression: 1 if it holds.
        sizes: what its sizes are, of those that depend on the length.
        place: the file and the line.
    """

    expression: Expression
    sizes: tuple[tuple[Size, Tokens], ...]
    place: str

    def outcome(self, tokens: int, length: int) -> int:
        """Whether it holds where the rank has ``tokens`` of ``length``."""
        known = dict(self.sizes)

        def number(origin: Attribute | Size) -> int:
            found = known.get(origin) if isinstance(origin, Size) else None
            return origin.value if found is None else found.number(tokens, length)

        try:
            return evaluate(self.expression, number)
        except ZeroDivisionError:
            return -1

    def differs(self, tokens: int, length: int) -> bool:
        """Whether the program would go another way on a rank with ``tokens`` than with all of ``length``."""
        return self.outcome(tokens, length) != self.outcome(length, length)

    def __str__(self) -> str:
        return f"{_text(self.expression, dict(self.sizes))} at {self.place}"


def _text(expression: Expression, known: dict[Size, Tokens]) -> str:
    if isinstance(expression, Literal | Attribute):
        return str(expression)
    if isinstance(expression, Size):
        return "the length" if expression in known else str(expression.value)
    assert isinstance(expression, Arithmetic)
    return f"{_text(expression.left, known)} {expression.symbol} {_text(expression.right, known)}"


@dataclass
class ContextPlan:
    """What is done to one model, for any number of ranks and any length.

    Attributes:
        inputs: tensors among the arguments of the model that are cut, with the dimension of the tokens.
        whole_inputs: the others.
        lengths: the dimensions that are the sequence, of all arguments that have some.
        constants: those of the inputs that are not used for each token, such as a mask that only says that
            there is no padding: all their elements are this, in every call.
        counting: those of the inputs whose numbers count on by one from token to token, as positions do.
        taken: where ranks take their tokens of what is whole.
        gathered: where ranks give all tokens to what mixes them.
        numbers: which numbers must count all tokens.
        last_tokens: where the last token is left out.
        attentions: the calls of attention.
        losses: the calls of losses.
        outputs: tensors in the result that are cut, by how many attentions and losses there are in a call;
            for each example.
        guards: what must not depend on how many tokens a rank has.
        groups: the fewest key-value heads of an attention.
        is_causal: whether all attentions are.
        drops: a call of attention that drops weights, if any does.
        targets: names of the model's arguments from which targets of losses are made.
        without_targets: why the model cannot be called without these, if it cannot.
    """

    inputs: dict[Path, int] = field(default_factory=dict)
    whole_inputs: set[Path] = field(default_factory=set)
    lengths: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[Path, int] = field(default_factory=dict)
    counting: set[Path] = field(default_factory=set)
    taken: set[Taken] = field(default_factory=set)
    gathered: set[Gathered] = field(default_factory=set)
    numbers: set[WholeNumber] = field(default_factory=set)
    last_tokens: set[LastToken] = field(default_factory=set)
    attentions: set[At] = field(default_factory=set)
    losses: set[LossCall] = field(default_factory=set)
    outputs: dict[tuple[int, int], dict[Path, Extent]] = field(default_factory=dict)
    guards: set[Guard] = field(default_factory=set)
    groups: int = 1 << 30
    is_causal: bool = True
    drops: At | None = None
    targets: set[str] = field(default_factory=set)
    without_targets: str = ""
