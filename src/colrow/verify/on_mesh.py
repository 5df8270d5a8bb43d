"""Training on a mesh of more dimensions than one, against one device that has the data of all replicas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.distributed.device_mesh import DeviceMesh

from colrow.data_shards import cut_like, held
from colrow.mesh import data_part, replicas, size_of
from colrow.modules import names_by_parameter
from colrow.parallel import Pipeline, data_parallel, pipeline_parallel, zero_redundancy_optimizer
from colrow.parameters import clip_grad_norm_
from colrow.replicas import check_replicas
from colrow.state import parallel_module
from colrow.trace import Example
from colrow.verify.batches import batch_of, keywords_of, weight_of
from colrow.verify.compare import MISSING, OUTPUT_FLOOR, compare_tensors, least_gradient, local_parts
from colrow.verify.exchange import Exchange, RanksRaised
from colrow.verify.measure import FLOOR, magnitude
from colrow.verify.report import Check, merge
from colrow.verify.run import comparable, forward, outputs_of
from colrow.verify.steps import MOMENTUM, STEP, WEIGHT_DECAY

Data = Literal["ddp", "zero1", "fsdp"]


@dataclass(frozen=True)
class Composition:
    """How the dimensions of a mesh work together.

    Attributes:
        data: how replicas train together.
        schedule: of a pipeline.
        micro_batches: of a pipeline, into which each replica's batch is divided.
    """

    data: Data = "ddp"
    schedule: str = "1f1b"
    micro_batches: int = 2

    def __post_init__(self) -> None:
        if self.data not in get_args(Data):
            raise ValueError(f"data must be 'ddp', 'zero1' or 'fsdp', not {self.data!r}")

    def describe(self, mesh: DeviceMesh) -> str:
        """The mesh in words: its dimensions of more than one rank, and how they work."""
        kinds = {"dp": f" ({self.data})", "pp": f" ({self.schedule}, {self.micro_batches} micro-batches)"}
        sizes = {name: mesh[name].size() for name in mesh.mesh_dim_names or ()}
        return " x ".join(f"{name}={size}{kinds.get(name, '')}" for name, size in sizes.items() if size > 1)


class MeshTraining:
    """The same steps on one device and on a mesh: losses, gradients, norms, parameters.

    Each replica has a batch of its own, whose loss counts differently. The device takes the sum of all of
    them; the mesh is to reach the same by averaging over replicas.

    Args:
        original: the whole model, on every rank.
        model: the same model, parallelized over the mesh's ``tp`` ranks.
        mesh: with all its dimensions.
        example: a call in training that gives a loss.
        composition: how its dimensions work together.
        exchange: between all ranks of the mesh.
        dtype: of everything.
        tolerance: of errors relative to the largest magnitude.
        seed: of batches.

    Attributes:
        checks: everything that was compared.
    """

    def __init__(
        self,
        original: nn.Module,
        model: nn.Module,
        mesh: DeviceMesh,
        example: Example,
        *,
        composition: Composition,
        exchange: Exchange,
        dtype: torch.dtype,
        tolerance: float,
        seed: int,
    ) -> None:
        keywords_of(example)
        self._original, self._example = original, example
        self._mesh, self._shared = mesh, replicas(mesh)
        self._exchange, self._dtype, self._tolerance, self._seed = exchange, dtype, tolerance, seed
        self._composition, self._cut = composition, model
        self._model: nn.Module = self._together(lambda: self._composed(model))
        self._before = {name: held(one).detach().clone() for name, one in self._named().items()}
        self.checks: list[Check] = []

    def compare(self, steps: int) -> None:
        """Compare every step, and what is replicated after the last.

        Raises:
            ValueError: if the example gives no loss.
        """
        for one in (self._original, self._model):
            one.train()
        self._check_names()
        optimizers: list[torch.optim.Optimizer] = []
        for step in range(max(steps, 1)):
            stage = f"step {step + 1}"
            try:
                least = self._gradients(stage, step)
            except RanksRaised as raised:
                self._add(
                    [Check(stage, "errors", "the parallelized model raised", MISSING, 0.0, str(raised))]
                )
                return
            if not steps:
                return
            wanted = [one.grad for one in self._original.parameters() if one.grad is not None]
            if not optimizers:
                norm = float(torch.nn.utils.get_total_norm(wanted))
                limit = 0.5 * norm if 0 < norm < math.inf else 1.0
                optimizers = self._optimizers(limit)
            expected = torch.nn.utils.clip_grad_norm_(self._original.parameters(), limit)
            found = self._together(lambda limit=limit: clip_grad_norm_(self._model, limit))
            norms = {"gradients": found}, {"gradients": expected}
            self._add(compare_tensors(stage, "norm", *norms, self._tolerance, 0.0, least=least))
            for optimizer in optimizers:
                optimizer.step()
            self._parameters(stage)
        self._replicas(f"after {steps} steps")

    def _composed(self, model: nn.Module) -> nn.Module:
        mesh, how = self._mesh, self._composition
        if size_of(mesh, "pp") > 1:
            keywords = keywords_of(self._example)
            model = pipeline_parallel(
                model, mesh, keywords, schedule=how.schedule, micro_batches=how.micro_batches
            )
        if self._shared.size() > 1:
            model = data_parallel(model, mesh, "fsdp" if how.data == "fsdp" else "ddp")
        return model

    def _gradients(self, stage: str, step: int) -> float:
        """Compare losses and gradients of one step; returns by what they are measured at least."""
        own, count = data_part(self._mesh)
        batches = [batch_of(self._example, step, replica, self._seed) for replica in range(count)]
        expected: dict[str, Tensor] = {}
        self._original.zero_grad()
        with comparable(self._dtype, self._seed):
            for replica, batch in enumerate(batches):
                loss = _loss(self._original, batch)
                expected[f"loss of replica {replica}"] = loss.detach()
                (loss * weight_of(step, replica)).backward()

        def run() -> Tensor:
            self._model.zero_grad()
            weight = weight_of(step, own) * count  # gradients are averaged
            with comparable(self._dtype, self._seed):
                if isinstance(self._model, Pipeline):
                    return self._model.step(keywords_of(batches[own]), weight)
                loss = _loss(self._model, batches[own])
                _backward(loss * weight)
            return loss.detach()

        name = f"loss of replica {own}"
        found = {name: self._together(run)}
        self._add(
            compare_tensors(stage, "outputs", found, {name: expected[name]}, self._tolerance, OUTPUT_FLOOR)
        )
        whole = _by_name(self._original, "grad")
        least = least_gradient(expected.values())
        sizes = {name: magnitude(one) for name, one in whole.items()}
        gradients = {name: held(one.grad) for name, one in self._named().items() if one.grad is not None}
        parts = self._parts(whole)
        self._add(compare_tensors(stage, "gradients", gradients, parts, self._tolerance, FLOOR, sizes, least))
        return least

    def _parameters(self, stage: str) -> None:
        """Parameters, by the size of what the steps have changed."""
        parts = self._parts(_by_name(self._original, "data"))
        changes = {name: magnitude(part - self._before[name]) for name, part in parts.items()}
        sizes: dict[str, float] = {}
        for of_rank in self._exchange.gather(changes):
            for name, size in of_rank.items():
                sizes[name] = max(size, sizes.get(name, 0.0))
        found = {name: held(one).detach() for name, one in self._named().items()}
        self._add(compare_tensors(stage, "parameters", found, parts, self._tolerance, FLOOR, sizes))

    def _replicas(self, stage: str) -> None:
        name = "equal to the bit on all ranks"
        try:
            self._together(lambda: check_replicas(self._model))
            self._add([Check(stage, "replicas", name, 0.0, 0.0)])
        except RanksRaised as raised:
            self._add([Check(stage, "replicas", name, MISSING, 0.0, raised.first.error)])

    def _check_names(self) -> None:
        """Every parameter of the model must be somewhere."""
        own = {name for names in names_by_parameter(parallel_module(self._model)).values() for name in names}
        everywhere = set().union(*self._exchange.gather(own))
        missing = sorted(set(_by_name(self._original, "data")) - everywhere)
        error = MISSING if missing else 0.0
        self._add([Check("mesh", "parameters", "each is on some rank", error, 0.0, ", ".join(missing[:4]))])

    def _optimizers(self, limit: float) -> list[torch.optim.Optimizer]:
        """Linear in the gradients, as the errors of parameters are to be: see :class:`Steps`."""
        parameters = [one.detach() for one in self._original.parameters() if one.requires_grad]
        length = math.sqrt(sum(float((one**2).sum()) for one in parameters))
        options: dict[str, Any] = {
            "lr": STEP * length / limit,
            "momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
        }
        own = self._model.parameters()
        if self._composition.data == "zero1":
            cut: torch.optim.Optimizer = zero_redundancy_optimizer(
                own, torch.optim.SGD, self._mesh, model=self._model, **options
            )
        else:
            cut = torch.optim.SGD(own, **options)
        return [torch.optim.SGD(self._original.parameters(), **options), cut]

    def _named(self) -> dict[str, nn.Parameter]:
        return dict(parallel_module(self._model).named_parameters())

    def _parts(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank is to have of global tensors."""
        module, named = parallel_module(self._model), self._named()
        parts = local_parts(module, {name: one for name, one in whole.items() if name in named})
        return {name: held(cut_like(part, named[name].data)) for name, part in parts.items()}

    def _add(self, checks: list[Check]) -> None:
        self.checks += merge(self._exchange.gather(checks))

    def _together(self, work: Any) -> Any:
        return self._exchange.together(work, self._cut)


def _loss(model: nn.Module, batch: Example) -> Tensor:
    outputs = outputs_of(forward(model, batch), gather=False)
    if not outputs.loss_name:
        raise ValueError("the model gives no loss for this example: give it labels, to verify its training")
    return outputs.values[outputs.loss_name]


def _backward(total: Tensor) -> None:
    ones = torch.ones_like(total)  # as in Runner
    _engine_run_backward((total,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _by_name(model: nn.Module, attribute: str) -> dict[str, Tensor]:
    """Of each parameter, or of its gradient, the tensor by all names that the parameter has."""
    named = model.named_parameters(remove_duplicate=False)
    found = {name: getattr(one, attribute) for name, one in named}
    return {name: one for name, one in found.items() if one is not None}
