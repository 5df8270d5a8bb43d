"""Where the tokens of all ranks are gathered: what mixes them, for something that is not one for each token.

The auxiliary loss of a router counts how many tokens chose each expert; features may be averaged over a
sequence before they are classified. Every rank then computes that of all tokens. They are gathered where
values come in that are used for a rank's own tokens too. What is made of gathered tokens must not meet a
rank's own again: its gradient would be that of these tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F

from colrow.axes import Axes
from colrow.parallel.context.steps import LOSSES, refusal
from colrow.trace.records import FunctionCall, Operation, Value


def gathering_calls(
    axes: Axes,
    mixing: FunctionCall,
    before: Collection[int],
    alike: Callable[[FunctionCall], Collection[FunctionCall]],
    has_tokens: Callable[[Value], bool],
) -> set[int]:
    """Indices of the calls that are to be computed of all tokens, so that ``mixing`` is.

    Besides calls that mix tokens these are those, by the same module's code and without weights, whose
    results only such calls read.

    Args:
        axes: of the trace.
        mixing: a call that mixes tokens.
        before: those that have been found before.
        alike: all passes of a call's place.
        has_tokens: whether some of the sequence runs through a value.
    """
    calls = axes.trace.calls
    found = {*before, *(one.index for one in alike(mixing))}
    given_out = {value.index for _, value in axes.trace.outputs} | {
        one.value.index for one in axes.trace.kept
    }
    grows = True
    while grows:
        grows = False
        for index in sorted(found, reverse=True):
            call = calls[index]
            for operation in axes.trace.operations[call.first : call.last]:
                for value in operation.inputs:
                    maker = None if value.producer is None else value.producer.call
                    if maker is None or maker.index in found or not has_tokens(value):
                        continue
                    if maker.module is not call.module or not _reads_tokens_alone(axes, maker, has_tokens):
                        continue
                    if all(_is_read_by(axes, one, found, given_out) for one in alike(maker)):
                        found |= {one.index for one in alike(maker)}
                        grows = True
    return found


def _reads_tokens_alone(axes: Axes, call: FunctionCall, has_tokens: Callable[[Value], bool]) -> bool:
    """Whether a call makes something of tokens, without weights; what makes it of a number counts tokens."""
    read = [value for one in axes.trace.operations[call.first : call.last] for value in one.inputs]
    return any(map(has_tokens, read)) and all(value.source.kind != "parameter" for value in read)


def _is_read_by(axes: Axes, call: FunctionCall, readers: Collection[int], given_out: Collection[int]) -> bool:
    """Whether nothing but these calls reads what a call makes; attention and losses are left as they are."""
    if call.function is F.scaled_dot_product_attention or call.function in LOSSES:
        return False
    for operation in axes.trace.operations[call.first : call.last]:
        for value in operation.outputs:
            if value.index in given_out:
                return False
            outside = [one for one in value.uses if not call.first <= one.index < call.last]
            if any(one.call is None or one.call.index not in readers for one in outside):
                return False
    return True


def refuse_chance(step: FunctionCall | Operation, operations: Collection[Operation]) -> None:
    """Ranks would draw different numbers for what all of them compute.

    Raises:
        PlanError: naming the module and the line.
    """
    for operation in operations:
        if torch.Tag.nondeterministic_seeded in operation.function.tags:
            raise refusal(
                f"{operation.name} draws random numbers for what every rank computes of all tokens", step
            )
