"""Plans with something of everything."""

from __future__ import annotations

import dataclasses

import torch

from colrow.layout import DimensionLayout, Segment
from colrow.plan import (
    Along,
    Call,
    CallArgument,
    CallResult,
    Entry,
    Exit,
    Gather,
    LocalAttribute,
    LocalInteger,
    Lookup,
    ModuleInput,
    ModuleOutput,
    OnceParameter,
    OwnRandomness,
    PartialParameter,
    PartSlice,
    Plan,
    PredictedCollective,
    Prediction,
    SequenceGather,
    SequenceSlice,
    Sharding,
)
from tests.plans import hand_plan


def gpt2(ranks: int, share: list[float] | None = None) -> Plan:
    """The hand-written plan of a small GPT-2."""
    import transformers

    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=4, n_embd=48, n_head=6))
    return hand_plan(model).resolve(model, ranks, share)


def everything() -> Plan:
    """A plan over two ranks in which every field is filled."""
    layout = DimensionLayout((Segment(1, 2, 2, span=3), Segment(2, 6, 1), Segment(1, 7, 1, whole=True)))
    sharding = Sharding("heads", 1, layout)
    first = Call("view", "package.modeling", "Attention.forward", 31, 118, 0)
    every = Call("view", "package.other", "rotate", 31, 12)
    integers = tuple(
        LocalInteger(CallArgument(f"transformer.h.{layer}.attn", call, (1, "size")), (6, 6), values)
        for layer in range(4)
        for call, values in ((first, (3, 3)), (every, (6, (2, 1))))
    )
    return dataclasses.replace(
        gpt2(2),
        buffers={"transformer.slopes": sharding},
        entries=(
            Entry((ModuleInput("transformer.h.0.mlp", ("hidden_states", 0)), CallResult("", first, (0,)))),
            Entry((ModuleOutput("transformer.h.1", (0, "name")),)),
        ),
        exits=(
            Exit(CallResult("transformer.h.0.mlp", every)),
            Exit(ModuleOutput("transformer.ln_f"), Along("sequence", 1)),
        ),
        lookups=(Lookup(CallResult("transformer", first), "vocab", Along("sequence", 0)),),
        slices=(PartSlice(CallArgument("", every, ("bias",)), sharding),),
        gathers=(Gather(ModuleOutput("lm_head"), sharding),),
        sequence_gathers=(
            SequenceGather(
                (ModuleInput("transformer.h.1", (0,)), CallResult("", first)), Along("sequence", 1)
            ),
            SequenceGather((ModuleOutput("transformer.ln_f"),), Along("sequence", 1), "whole"),
        ),
        sequence_slices=(SequenceSlice(ModuleInput("transformer.h.0", (0,)), Along("sequence_2", 1)),),
        partial_parameters=(PartialParameter("transformer.h.0.norm.weight", "transformer.h.0.norm"),),
        once_parameters=(OnceParameter("bias", ""),),
        attributes=(LocalAttribute("transformer.h.3.attn", "config.num_heads", (2, 1)),),
        integers=integers,
        randomness=tuple(OwnRandomness(f"transformer.h.{layer}.drop") for layer in range(4)),
        holders=("lm_head",),
        notes=("features stays whole: 'it: is odd'", "# no comment, 100%"),
        prediction=Prediction(
            (
                PredictedCollective(
                    "training", "forward", "all-reduce", "exit transformer.h.*.mlp", (2, 10, 48), 3840, 8
                ),
                PredictedCollective("evaluation", "backward", "all-gather", "gather lm_head", (), 4, 1),
            ),
            (1_000, (500, 500)),
            (4_000, (2_000, 2_000)),
        ),
    )
