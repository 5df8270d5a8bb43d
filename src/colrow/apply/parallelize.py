"""Applying a plan to a model, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.apply.actions import Applier
from colrow.apply.check import check_plan
from colrow.apply.dry_run import try_plan
from colrow.apply.refusals import refuse_own_save
from colrow.axes import Registry
from colrow.collectives import Communicator, communicator
from colrow.errors import PlanError, PlanWarning
from colrow.mesh import size_of
from colrow.plan import HandPlan, Plan, derive_plan
from colrow.plan.summary import summary
from colrow.replicas import check_equal_weights, digest
from colrow.state import ParallelState, attach_state, is_parallelized
from colrow.trace import Example

Shown: TypeAlias = "Plan | HandPlan | Example | Mapping[str, Any] | tuple[Any, ...] | torch.Tensor"
"""How a model is to be cut, or calls of it from which that follows."""


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    example: Shown,
    *,
    logits: Literal["gather", "local"] = "gather",
    share: Sequence[float] | None = None,
    forbid: Collection[str] = (),
    sequence: bool | Literal["auto"] = False,
    registry: Registry | None = None,
    check: Example | Mapping[str, Any] | tuple[Any, ...] | None = None,
    context: Literal["auto", "ulysses", "ring"] = "auto",
) -> nn.Module:
    """Cut ``model`` over the mesh's ``tp`` ranks, and its sequences over ``cp``, in place, and return it.

    How it is cut follows from how it computes: from ``example``, a call of it, a plan is derived. The model's
    own forward goes on to run, on plain local tensors. Parameter objects, their names, ties,
    ``requires_grad``, dtypes and hooks stay, so that an optimizer sees plain parameters, smaller ones.
    Every rank calls this with the same weights (the same seed, or loaded from the same file).

    Given labels, the model computes its loss from logits that are cut over the vocabulary; the output then
    holds :class:`colrow.apply.loss.ShardedLogits` in place of logits.

    With a mesh that has ``ep``, each rank along it keeps its share of every layer's experts, and tokens
    travel to the rank that holds the expert they chose; ``tp`` cuts what it cuts otherwise, inside experts
    too. Use :func:`colrow.data_parallel` then, also with ``dp=1``: the ranks of ``ep`` have different data.

    Where much stays whole under a derived plan, or something had to be guessed, rank 0 says so
    with one :class:`colrow.PlanWarning`.

    Args:
        model: any module whose weights are real, or all on the meta device.
        mesh: from :func:`colrow.init_mesh`.
        example: one of

            - the keywords of a call: ``{"input_ids": ids, "labels": ids}``, or its arguments, a tuple or one
              tensor. The model is recorded once in training and once in evaluation mode; batch and sequence
              may be small.
            - several calls by mode, each a :class:`colrow.trace.Example`, where the model is used in several
              ways: ``{"training": Example((), {...}), "evaluation": Example((), {...})}``.
            - a :class:`colrow.plan.Plan` for this number of ranks, or a :class:`colrow.plan.HandPlan`.
        logits: what the model gives without labels: ``"gather"``: all ids on every rank, as the original;
            ``"local"``: this rank's ids, for :func:`colrow.cross_entropy`.
        share: relative size of each rank's part, for unequal devices: ``[3, 3, 2]``.
        forbid: names of parameters, or of a plan's axes, that must stay whole.
        sequence: also cut what lies between regions (norms, residuals, dropout) along the sequence: each rank
            keeps its tokens of it only, which saves memory; all-reduces become reduce-scatters and
            all-gathers. Lengths may be uneven. ``"auto"``: where that communicates hardly more. Not used with
            a plan.
        registry: the rules of operators, where the model has some of its own; see :func:`colrow.rule`. Not
            used with a plan.
        check: with a plan that was edited, or made elsewhere: calls of the model with which to try it on the
            meta device before anything is changed, in the forms that ``example`` may have. With ``ep`` it is
            needed besides a plan, since experts are found by how the model computes.
        context: on a mesh with ``cp``, how ranks with some tokens each attend to those of the others:
            ``"ulysses"``, by exchanging tokens for heads; ``"ring"``, by sending keys and values round; by
            default Ulysses where there are enough key-value heads. All ranks of a cp group are given the same
            batches.

    Raises:
        PlanError: if the plan does not fit the model or the mesh, the ranks' weights differ, or there are no
            experts to divide over ``ep``.
        TraceError: if the model cannot be recorded.
    """
    ranks = communicator(mesh)
    if is_parallelized(model):
        raise PlanError("", "the model has been parallelized already", "Start from the original model.")
    from colrow.parallel import experts as over_ep  # whose forwards go through what is applied here

    across = _context(
        model, mesh, check if isinstance(example, Plan | HandPlan) else example, registry, context
    )
    derived: Callable[..., Plan] | None = None
    calls = None if check is None else examples_of(check)
    if isinstance(example, Plan):
        plan = example
    elif isinstance(example, HandPlan):
        plan = example.resolve(model, ranks.size, share)
    else:
        calls = examples_of(example)
        derived = partial(
            derive_plan, model, calls, ranks.size, share=share, sequence=sequence, registry=registry
        )
        plan = derived(forbid=forbid)
    experts = over_ep.find_for(model, mesh, calls)
    if experts and (axes := over_ep.axes_over_experts(plan, experts)):
        if not derived:
            raise PlanError(
                experts[0].path,
                f"the plan cuts experts over tp, along {', '.join(sorted(axes))}, and the mesh over ep",
                "Make a plan with forbid= these axes, or the mesh without ep.",
            )
        plan = derived(forbid=[*forbid, *axes])
    if plan.ranks != ranks.size:
        raise PlanError(
            "", f"the plan is for {plan.ranks} ranks, the mesh has {ranks.size}", "Make a new one."
        )
    _check_same_plan(plan, ranks, mesh.device_type)
    layouts = check_plan(plan, model)  # all of it before anything is changed
    if check is not None:
        _try_on_all(model, plan, check, ranks, mesh.device_type)
    check_equal_weights(model, ranks)
    over_ep.prepare(model, mesh, experts)
    told = None
    if not isinstance(example, Plan | HandPlan) and ranks.size > 1 and mesh.get_rank() == 0:
        told = summary(plan, {name: one.numel() for name, one in model.named_parameters()})
    applier = Applier(model, ranks, plan)
    undo = applier.apply(logits == "gather")
    divided = over_ep.give_experts(model, mesh, experts, layouts)
    if across is not None:
        across()
    refuse_own_save(model)
    state = ParallelState(mesh, ranks, plan, layouts, undo, experts=divided, lengths=applier.lengths)
    attach_state(model, state)
    if told is not None:
        warnings.warn(told, PlanWarning, stacklevel=2)
    return model


def _context(
    model: nn.Module,
    mesh: DeviceMesh,
    example: Example | Mapping[str, Any] | tuple[Any, ...] | torch.Tensor | None,
    registry: Registry | None,
    wish: Literal["auto", "ulysses", "ring"],
) -> Callable[[], None] | None:
    """What cuts sequences over the mesh's ``cp`` ranks once weights are cut; ``None`` if nothing is to be."""
    if size_of(mesh, "cp") == 1:
        return None
    from colrow.parallel.context.apply import apply_context, method_of  # what it changes calls with is here
    from colrow.parallel.context.derive import derive_context

    if example is None:
        raise PlanError(
            "",
            "a plan does not say how sequences are cut over ranks (cp)",
            "Give check=, a call of the model, as well.",
        )
    ranks = communicator(mesh["cp"])
    plan = derive_context(model, examples_of(example), registry)
    method = method_of(plan, ranks.size, communicator(mesh).size, wish)
    return partial(apply_context, model, plan, ranks, method)


def _check_same_plan(plan: Plan, ranks: Communicator, device: str) -> None:
    """All ranks must cut alike: from other plans they would wait for each other, or compute nonsense."""
    if ranks.size == 1:
        return
    own = torch.tensor([digest(repr(plan))], dtype=torch.int64, device=device)
    everyone = ranks.all_gather(own, 0, label="compare the ranks' plans").tolist()
    if any(one != everyone[0] for one in everyone):
        other = next(rank for rank, one in enumerate(everyone) if one != everyone[0])
        raise PlanError(
            "",
            f"rank {other} has another plan than rank 0",
            "Call colrow.parallelize with the same plan, example and options on all ranks.",
        )


def _try_on_all(
    model: nn.Module,
    plan: Plan,
    check: Example | Mapping[str, Any] | tuple[Any, ...],
    ranks: Communicator,
    device: str,
) -> None:
    """Try the plan; if one rank's part of the model cannot run, all ranks raise."""
    error: Exception | None = None
    try:
        try_plan(model, examples_of(check), plan, ranks.rank)
    except Exception as caught:  # whatever it is, the others wait for this rank
        error = caught
    failed = torch.tensor([error is not None], dtype=torch.int32, device=device)
    everyone = ranks.all_gather(failed, 0, label="try the plan").tolist()
    if error is not None:
        raise error
    if any(everyone):
        raise PlanError("", f"rank {everyone.index(1)} cannot run under this plan", "See its own error.")


def examples_of(example: Example | Mapping[str, Any] | tuple[Any, ...] | torch.Tensor) -> dict[str, Example]:
    """Calls by mode, from what :func:`parallelize` takes."""
    if isinstance(example, Mapping):
        given = [isinstance(item, Example) for item in example.values()]
        if given and all(given):
            return dict(example)
        example = Example((), example)
    elif not isinstance(example, Example):
        example = Example((example,) if isinstance(example, torch.Tensor) else tuple(example))
    return {"training": example, "evaluation": example}
