"""Where tokens meet as they may: attention, and losses that are a sum over tokens."""

from __future__ import annotations

from colrow.localise.arguments import values_of
from colrow.parallel.context.found import Found
from colrow.parallel.context.plan import At, Extent, LossCall
from colrow.parallel.context.steps import argument, inputs_behind, refusal
from colrow.trace.records import FunctionCall, Value

_MASK = (
    "Leave padding out (pack sequences, or mark padded labels as ignored), so that the model needs no mask "
    "and says is_causal=True, or do not cut sequences (cp=1)."
)


def note_attention(found: Found, call: FunctionCall, at: At) -> None:
    """A call of attention of a rank's queries; its result is one for each of the rank's tokens.

    Raises:
        PlanError: if it cannot be computed by ranks that have some of the keys each.
    """
    query, key, value = (argument(call, name) for name in ("query", "key", "value"))
    for one in (query, key, value):
        extent = found.cut.get(one.index)
        if extent != Extent(len(one.shape) - 2):
            raise refusal("attention with queries, keys or values that are not cut", call)
    if argument(call, "attn_mask") is not None:
        raise refusal("attention with a mask", call, _MASK)
    plan = found.plan
    plan.attentions.add(at)
    plan.groups = min(plan.groups, key.shape[-3])
    plan.is_causal &= bool(argument(call, "is_causal"))
    if argument(call, "dropout_p"):
        plan.drops = at
    for result in values_of(call.outputs):
        extent = found.axis.extent(result)
        assert extent is not None
        found.cut[result.index] = extent


def is_sum_over_tokens(found: Found, call: FunctionCall) -> bool:
    """Whether a call of a loss is one number for all tokens; with ``reduction="none"`` it is one for each."""
    if argument(call, "reduction") not in ("mean", "sum"):
        return False
    given = argument(call, "input")
    return isinstance(given, Value) and found.axis.has(given) and given.index not in found.of_all


def note_loss(found: Found, call: FunctionCall, at: At) -> None:
    """A call of a loss that is the sum, or the mean, over tokens.

    Raises:
        PlanError: if it is not the sum of what ranks find with their tokens.
    """
    given, target = argument(call, "input"), argument(call, "target")
    assert isinstance(given, Value)
    if any(one.index in found.of_all for one in values_of((call.arguments, call.keywords))):
        raise refusal(f"{call.name} of a rank's tokens and of what is made of all", call)
    if given.index not in found.cut:
        raise refusal(f"{call.name} of all tokens", call)
    extent = found.cut[given.index]
    classes = 1 if len(given.shape) > 1 else 0
    if extent.dimension == classes:
        raise refusal(f"{call.name} whose classes are tokens", call)
    if argument(call, "size_average") is not None or argument(call, "reduce") is not None:
        raise refusal("size_average and reduce are deprecated", call, "Use reduction.")
    if not isinstance(target, Value) or target.dtype.is_floating_point:
        raise refusal(f"{call.name} with probabilities for targets", call)
    whole: Extent | None = None
    if target.index not in found.cut:
        whole = found.axis.extent(target)
        if whole is None or whole.missing != extent.missing:
            raise refusal(
                f"{call.name} compares the sequence with targets that are not one for each token",
                call,
                "Let the loss compare logits of all tokens with labels that were moved by one and "
                "filled up with ignore_index.",
            )
    found.plan.losses.add(LossCall(at, whole))
    found.plan.targets |= inputs_behind(target)
