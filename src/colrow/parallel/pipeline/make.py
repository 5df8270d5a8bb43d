"""Cutting a model into the stages of a pipeline, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.apply.parallelize import examples_of
from colrow.apply.refusals import refuse_own_save
from colrow.collectives import Communicator, communicator
from colrow.errors import PlanError
from colrow.layers import make_local
from colrow.layout import TensorLayout
from colrow.mesh import size_of
from colrow.modules import is_linear
from colrow.parallel.pipeline.choose import chosen_boundaries, named_boundaries
from colrow.parallel.pipeline.flow import Flow, flow_of
from colrow.parallel.pipeline.gradients import SharedGradients
from colrow.parallel.pipeline.hold import release_parameters
from colrow.parallel.pipeline.layout import StageLayout, lay_out
from colrow.parallel.pipeline.pipeline import Pipeline
from colrow.parallel.pipeline.record import MODE, Recording, record_units, without_trace
from colrow.parallel.pipeline.run import Frame, UnitForward
from colrow.parallel.pipeline.schedules import ranks_of_stages, schedule_kind
from colrow.parallel.pipeline.stage import StageModule
from colrow.parallel.pipeline.units import units_of
from colrow.parallel.pipeline.weights import Weigh, default_weigh
from colrow.plan import Plan
from colrow.replicas import check_equal_weights, digest
from colrow.state import ParallelState, PipelineShare, attach_state, is_parallelized, state_of
from colrow.trace import Example
from colrow.undo import Undo


def pipeline_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    example: Example | Mapping[str, Any],
    *,
    schedule: str = "1f1b",
    micro_batches: int = 4,
    stages: Sequence[str] | None = None,
    stages_per_rank: int | None = None,
    costs: Mapping[str, float] | None = None,
    weigh: Weigh | None = None,
) -> Pipeline:
    """Divide the layers of ``model`` over the mesh's ``pp`` ranks, in place.

    Where it is cut follows from how it computes: from a call of it, recorded without computing anything. Its
    own forward goes on to run on every rank, but its *units* (layers of lists of layers, embeddings, norms,
    heads) compute on one stage each, and what they return is sent on where later stages need it. A rank keeps
    the parameters that its stages read, under their names; an embedding that is the head too is kept by both
    stages, and its gradients are summed. All ranks get the same batch.

    Args:
        model: any module, or one that :func:`colrow.parallelize` has cut with this mesh; with the same
            weights on all ranks, or on the meta device.
        mesh: from :func:`colrow.init_mesh`, with ``pp``.
        example: the keywords of a call in training, with labels: integers with data, small if you like.
        schedule: ``gpipe``, ``1f1b``, ``looped_bfs``, ``interleaved_1f1b``, ``interleaved_zero_bubble`` or
            ``zbv``: PyTorch's.
        micro_batches: how many a batch is divided into.
        stages: paths of the units that all stages but the first begin with; default: chosen so that stages
            cost the same and send little.
        stages_per_rank: of interleaved schedules; default: 2.
        costs: measured seconds of each unit by path, by which to choose; default: estimated operations.
        weigh: of how many terms the loss of a micro-batch is the mean; default: of the labels that count, if
            the model computes its loss by a cross-entropy, or of equally many.

    Returns:
        What the training loop calls: ``loss = pipeline.step(batch)``, see :class:`Pipeline`.

    Raises:
        PlanError: if the model cannot be cut so, naming what stands in the way; if the ranks' weights or
            arguments differ.
        ValueError: if the mesh has no ``pp``.
        TraceError: if the model cannot be recorded.
    """
    if size_of(mesh, "pp") < 2:
        raise ValueError("the mesh has no stages: make it with colrow.init_mesh(pp=..., ...)")
    ranks = communicator(mesh["pp"])
    kind = schedule_kind(schedule)
    rank_of = ranks_of_stages(kind, ranks.size, stages_per_rank)
    if not isinstance(micro_batches, int) or micro_batches < 1:
        raise PlanError("", f"a batch cannot have {micro_batches!r} micro-batches", "Give a whole number.")
    if schedule == "1f1b" and micro_batches < ranks.size:
        raise PlanError(
            "",
            f"1f1b needs at least as many micro-batches as stages: {ranks.size}, not {micro_batches}",
            "Use more micro-batches, or the schedule gpipe.",
        )
    state = _state_for(model, mesh)
    if state.pipeline is not None:
        raise PlanError("", "the model is in a pipeline already", "Start from the original model.")
    shown = examples_of(example)
    recording = record_units(model, shown.get(MODE, next(iter(shown.values()))))
    flow = flow_of(recording)
    if stages is None:
        boundaries = chosen_boundaries(recording, flow, len(rank_of), costs)
    else:
        boundaries = named_boundaries(recording, flow, stages, len(rank_of))
    if weigh is None:
        weigh = default_weigh(recording.trace, flow)
    _check_same(ranks, mesh, (boundaries, schedule, micro_batches, rank_of))
    check_equal_weights(model, ranks)
    names = [name for name, _ in model.named_parameters()]
    layout = lay_out(recording, flow, boundaries, rank_of, names)
    return _cut(model, mesh, ranks, state, recording, flow, layout, schedule, micro_batches, weigh)


def _state_for(model: nn.Module, mesh: DeviceMesh) -> ParallelState:
    """That of a parallelized model, or one for a model that is whole."""
    if is_parallelized(model):
        return state_of(model)
    for dimension in ("tp", "ep", "cp"):
        if size_of(mesh, dimension) > 1:
            raise PlanError(
                "",
                f"the mesh has {size_of(mesh, dimension)} ranks along {dimension}, and the model is whole",
                "Call colrow.parallelize(model, mesh, example) first.",
            )
    undo = Undo(model)
    undo.seal(model)
    layouts = {
        name: TensorLayout(tuple(parameter.shape))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    return ParallelState(mesh, communicator(mesh["tp"]), Plan(ranks=1), layouts, undo)


def _check_same(ranks: Communicator, mesh: DeviceMesh, chosen: object) -> None:
    """Stages that differ would wait for each other."""
    own = torch.tensor([digest(repr(chosen))], dtype=torch.int64, device=mesh.device_type)
    everyone = ranks.all_gather(own, 0, label="compare the ranks' stages").tolist()
    if any(one != everyone[0] for one in everyone):
        raise PlanError(
            "",
            "the ranks would cut the model into different stages",
            "Call colrow.pipeline_parallel with the same model, example and options on all ranks.",
        )


def _cut(
    model: nn.Module,
    mesh: DeviceMesh,
    ranks: Communicator,
    state: ParallelState,
    recording: Recording,
    flow: Flow,
    layout: StageLayout,
    schedule: str,
    micro_batches: int,
    weigh: Weigh | None,
) -> Pipeline:
    own = layout.of_rank(ranks.rank)
    device = torch.device(mesh.device_type)
    frame = Frame([without_trace(call) for call in recording.calls], frozenset(flow.written), device)
    held = frozenset().union(*(stage.parameters for stage in own))
    if schedule_kind(schedule).splits:
        for module in [one for one in model.modules() if is_linear(one)]:
            make_local(module)  # which leave gradients of weights for later
    called = {recording.calls[index].path for stage in own for index in range(stage.first, stage.last)}
    sizes = {name: parameter.element_size() for name, parameter in model.named_parameters()}
    all_names = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    buffers = _buffer_ranks(model, recording, layout)
    for path, module in units_of(model).items():
        if path in {call.path for call in recording.calls}:
            UnitForward(path, module, frame, path in called).attach()
    release_parameters(model, held, flow.outside, device)
    share = PipelineShare(ranks, dict(layout.holders), all_names, sizes, buffers)
    attach_state(model, replace(state, pipeline=share))
    refuse_own_save(model)
    shared = SharedGradients(model, held, layout.holders, ranks)
    count = len(layout.stages)
    modules = {
        stage.index: StageModule(model, frame, stage, stage.index == count - 1, flow.loss) for stage in own
    }
    described = [
        f"{recording.calls[stage.first].path} to {recording.calls[stage.last - 1].path}" for stage in own
    ]
    return Pipeline(
        model,
        mesh,
        ranks,
        layout,
        modules,
        shared,
        schedule,
        micro_batches,
        weigh,
        described,
        flow.loss,
    )


def _buffer_ranks(model: nn.Module, recording: Recording, layout: StageLayout) -> dict[str, int]:
    """By name of a buffer the rank whose buffer counts: that of the unit it is in; else the first."""
    found: dict[str, int] = {}
    last_call = {call.path: call.index for call in recording.calls}
    for name, _ in model.named_buffers(remove_duplicate=False):
        unit = next((path for path in last_call if name.startswith(f"{path}.")), None)
        stage = next(
            (
                stage
                for stage in layout.stages
                if unit is not None and stage.first <= last_call[unit] < stage.last
            ),
            layout.stages[0],
        )
        found[name] = layout.rank_of[stage.index]
    return found
