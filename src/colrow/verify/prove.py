"""``colrow.verify``: starts ranks, or uses those that exist, builds both models, and compares them."""

from __future__ import annotations

import pickle
import runpy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import ModuleType
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.apply import parallelize
from colrow.axes import Registry
from colrow.collectives import Communicator, communicator
from colrow.launch import launch
from colrow.launch.environment import under_launcher
from colrow.mesh import init_mesh, size_of
from colrow.plan import HandPlan, Plan
from colrow.plan.derive import derive_plan
from colrow.state import placed_parameters
from colrow.trace import Example
from colrow.verify.exchange import Exchange, RanksRaised
from colrow.verify.inputs import Examples, examples_by_mode, prepared
from colrow.verify.measure import TOLERANCES
from colrow.verify.models import build_pair
from colrow.verify.on_mesh import Composition, Data, MeshTraining
from colrow.verify.precision import one_precision
from colrow.verify.report import Check, Difference, Report
from colrow.verify.run import Runner
from colrow.verify.stages import compare_everything
from colrow.verify.verification import Verification

T = TypeVar("T")

COLLECTIVE_SECONDS = 60.0
"""Timeout of the model's own collectives: a rank that raises alone holds up the others for so long."""
MAIN = "__main__"


def verify(
    model: nn.Module | Callable[[], nn.Module],
    examples: Examples,
    ranks: int | Mapping[str, int] = 2,
    plan: Plan | HandPlan | None = None,
    *,
    data: Data = "ddp",
    schedule: str = "1f1b",
    micro_batches: int = 2,
    steps: int = 3,
    dtype: torch.dtype = torch.float64,
    share: Sequence[float] | None = None,
    sequence: bool | Literal["auto"] = False,
    registry: Callable[[], Registry] | None = None,
    seed: int = 0,
    timeout: float = 600.0,
) -> Report:
    """Prove that a model cut over several processes is equal to the model on one device.

    Starts the processes, on this host's CPUs. Each builds the model twice, parallelizes one, and compares:
    outputs, loss and every gradient, in each mode that the examples show and at another batch and sequence
    size; parameters after optimizer steps with clipped gradients; replicated tensors to the bit; collectives
    with those that the plan predicts. Dropout is off. Where the models differ, the first module and call in
    which they part is found.

    On a mesh of more dimensions than ``tp`` its training is compared: each replica has a batch of its own,
    one device has all of them. Losses, every gradient, the norm that clips them and parameters are compared
    in each step, and replicated tensors after the last.

    Args:
        model: a module, which is copied to the processes, or a function that makes it; both must be
            picklable. A function may be of the main program, if that has an ``if __name__ == "__main__"``.
        examples: keywords of the model's forward, or :class:`colrow.trace.Example` by mode. The mode
            ``training`` runs the model in training mode, any other in evaluation; of keywords alone the mode
            is the one that the model is in.
        ranks: number of tensor-parallel ranks, or the sizes of a mesh: ``{"dp": 2, "tp": 2}``, as
            :func:`colrow.init_mesh` takes them.
        plan: what to verify; default: the derived plan.
        data: how replicas train together: ``"ddp"``, ``"zero1"`` or ``"fsdp"``.
        schedule: of a pipeline, see :func:`colrow.pipeline_parallel`.
        micro_batches: of a pipeline, into which a batch is divided.
        steps: of the optimizer; 0 for none.
        dtype: float64, or float32 with a wider tolerance.
        share: relative size of each rank's part; default: balanced.
        sequence: whether what lies between regions is cut along the sequence, as :func:`colrow.parallelize`
            says.
        registry: a function of a module that gives the rules of operators, where the model has some of its
            own; see :func:`colrow.rule`.
        seed: of the weights, where the model is made by a function, and of everything random.
        timeout: seconds for everything.

    Returns:
        Everything that was compared. It prints as a table; see :meth:`Report.raise_if_different`.

    Raises:
        ValueError: if an argument cannot be used, or this process is a rank itself: then use
            :func:`verify_on_ranks`.
        LaunchError: if a process failed, no plan could be made, or the original model cannot be run.
    """
    _check(dtype, steps, share, sequence, plan)
    if under_launcher():
        raise ValueError(
            "this process is one of several ranks, and cannot start others: call "
            'colrow.verify.verify_on_ranks with their mesh, or put this call under if __name__ == "__main__"'
        )
    sizes = {"tp": ranks} if isinstance(ranks, int) else dict(ranks)
    options = {
        "plan": plan,
        "data": data,
        "schedule": schedule,
        "micro_batches": micro_batches,
        "steps": steps,
        "dtype": dtype,
        "share": share,
        "sequence": sequence,
        "registry": registry,
        "seed": seed,
    }
    try:
        work = pickle.dumps((model, examples, options))
    except Exception as error:
        raise ValueError(
            f"the model or its inputs cannot be sent to the ranks ({error}): pass a function that makes the "
            "model, defined in a module"
        ) from error
    main = getattr(sys.modules[MAIN], "__file__", None) if MAIN.encode() in work else None
    report: Report = launch(
        f"{__name__}:_on_launched_rank",
        {"work": work, "main": main, "sizes": sizes},
        prod(sizes.values()),
        threads_per_rank=1,
        timeout=timeout,
    )
    return report


def _on_launched_rank(work: bytes, main: str | None, sizes: dict[str, int]) -> Report:
    if main is not None:
        # what the main program has defined is found where pickle looks for it
        program = ModuleType("__mp_main__")
        vars(program).update(runpy.run_path(main, run_name="__mp_main__"))
        sys.modules[MAIN] = sys.modules["__mp_main__"] = program
    model, examples, options = pickle.loads(work)
    if options["registry"] is not None:
        options["registry"] = options["registry"]()
    mesh = init_mesh(**sizes, device="cpu", timeout=COLLECTIVE_SECONDS)
    return verify_on_ranks(model, examples, mesh, **options)


def verify_on_ranks(
    model: nn.Module | Callable[[], nn.Module],
    examples: Examples,
    mesh: DeviceMesh,
    plan: Plan | HandPlan | None = None,
    *,
    data: Data = "ddp",
    schedule: str = "1f1b",
    micro_batches: int = 2,
    steps: int = 3,
    dtype: torch.dtype = torch.float64,
    share: Sequence[float] | None = None,
    sequence: bool | Literal["auto"] = False,
    registry: Registry | None = None,
    seed: int = 0,
) -> Report:
    """:func:`verify` on ranks that exist already: each of them calls this.

    Seeds the generators of random numbers. Where a rank raises alone, the others wait for it until the
    timeout of the mesh, which cannot be used afterwards.

    Args:
        examples: those of the first rank are used on all.
        mesh: of CPUs; all ranks of the job, or one dimension of them, which is ``tp`` then.
        registry: the rules themselves, as :func:`colrow.parallelize` takes them.

    Returns:
        The same report on every rank.

    Raises:
        ValueError: if an argument cannot be used, or the original model cannot be run.
        PlanError: if no plan can be made, or it cannot be applied.
        RankFailure: if a rank has died.
    """
    _check(dtype, steps, share, sequence, plan)
    if mesh.device_type != "cpu":
        raise ValueError("models are compared on CPUs: make the mesh with colrow.init_mesh(device='cpu')")
    composition = Composition(data, schedule, micro_batches)
    begin = time.perf_counter()
    ranks = communicator(mesh)
    has_more = mesh.size() > ranks.size
    with Exchange(_everyone() if has_more else ranks) as exchange:
        original, cut = build_pair(model, dtype, seed)
        # ranks that make random inputs make different ones
        given = exchange.gather(examples_by_mode(original, examples))[0]
        # a plan predicts bytes for what it is shown
        modes = {mode: prepared(one, dtype, differentiable=False) for mode, one in given.items()}
        started = time.perf_counter()
        with one_precision(dtype):  # a plan predicts bytes for the numbers that it is shown
            the_plan = _all_or_none(
                exchange, cut, lambda: _plan(cut, modes, ranks.size, plan, share, sequence, registry)
            )
        plan_seconds = time.perf_counter() - started
        alike = all(other == the_plan for other in exchange.gather(the_plan))
        # experts and sequences are found by how the model computes, not by the plan
        calls = modes if size_of(mesh, "ep") * size_of(mesh, "cp") > 1 else None
        _all_or_none(exchange, cut, lambda: parallelize(cut, mesh, the_plan, check=calls))
        same_plan = Check("plan", "plan", "equal on all ranks", 0.0 if alike else float("inf"), 0.0)
        share_cut = _share_cut(cut)
        notes: list[str] = []
        difference: Difference | None = None
        if has_more:
            training = MeshTraining(
                original,
                cut,
                mesh,
                _training_example(modes),
                composition=composition,
                exchange=exchange,
                dtype=dtype,
                tolerance=TOLERANCES[dtype],
                seed=seed,
            )
            training.compare(steps)
            checks = training.checks
        else:
            runner = Runner(exchange, ranks, dtype, seed)
            verification = Verification(original, cut, runner, TOLERANCES[dtype])
            compare_everything(verification, modes, steps, with_bytes=plan is None)
            checks, notes, difference = verification.checks, verification.notes, verification.difference
        times = exchange.gather((plan_seconds, time.perf_counter() - begin))[0]
    return Report(
        type(original).__name__,
        exchange.size,
        str(dtype).removeprefix("torch."),
        the_plan,
        share_cut,
        (same_plan, *checks),
        tuple(notes),
        difference,
        *times,
        composition.describe(mesh) if has_more else "",
    )


def _everyone() -> Communicator:
    everyone = dist.group.WORLD
    assert everyone is not None  # there is a mesh
    return communicator(everyone)


def _training_example(modes: Mapping[str, Example]) -> Example:
    if "training" not in modes:
        raise ValueError(
            "on a mesh with more than tp training is compared: give an example of it, with labels, as "
            '{"training": colrow.trace.Example(keywords=...)}, or a model in training mode'
        )
    return modes["training"]


def _check(
    dtype: torch.dtype,
    steps: int,
    share: Sequence[float] | None,
    sequence: bool | Literal["auto"],
    plan: Plan | HandPlan | None,
) -> None:
    if dtype not in TOLERANCES:
        raise ValueError(f"models are compared in torch.float64 or torch.float32, not in {dtype}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, not {steps}")
    if share is not None and isinstance(plan, Plan):
        raise ValueError("share is for plans that are yet to be made: this one has its cuts")
    if sequence and plan is not None:
        raise ValueError("sequence is for plans that are derived: this one says what is cut")


def _plan(
    model: nn.Module,
    examples: Mapping[str, Example],
    ranks: int,
    plan: Plan | HandPlan | None,
    share: Sequence[float] | None,
    sequence: bool | Literal["auto"],
    registry: Registry | None,
) -> Plan:
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, HandPlan):
        return plan.resolve(model, ranks, share)
    return derive_plan(model, examples, ranks, share=share, sequence=sequence, registry=registry)


def _all_or_none(exchange: Exchange, model: nn.Module, work: Callable[[], T]) -> T:
    """The result of ``work``, or on every rank an error: its own, or else that of another rank.

    Raises:
        RuntimeError: that names the other rank; besides what ``work`` raises.
    """
    try:
        return exchange.together(work, model)
    except RanksRaised as raised:
        if raised.own is not None:
            raise raised.own from None
        raise RuntimeError(f"rank {raised.first.rank} raised {raised.first}") from None


def _share_cut(model: nn.Module) -> float:
    """The part of the parameters' elements that lies in parameters that are cut."""
    sizes = [(prod(one.layout.shape), one.layout.is_part) for one in placed_parameters(model)]
    total = sum(size for size, _ in sizes)
    return sum(size for size, is_cut in sizes if is_cut) / total if total else 0.0
