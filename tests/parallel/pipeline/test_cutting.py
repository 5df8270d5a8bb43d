"""Where a model can be cut, what crosses there, and what is refused and why: known without any process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5ForConditionalGeneration

from colrow.errors import PlanError
from colrow.parallel.pipeline.choose import chosen_boundaries, crossing_bytes, named_boundaries
from colrow.parallel.pipeline.flow import Flow, flow_of
from colrow.parallel.pipeline.layout import lay_out
from colrow.parallel.pipeline.record import Recording, record_units
from colrow.parallel.pipeline.schedules import idle_share, ranks_of_stages, schedule_kind
from colrow.parallel.pipeline.weights import TokenCount, default_weigh, divided, equal_weight, shares_of
from colrow.trace import Example
from tests.parallel.pipeline.models import IGNORED, VOCABULARY, build, example_of


def _followed(model: nn.Module, example: dict[str, Any]) -> tuple[Recording, Flow]:
    recording = record_units(model, Example((), example))
    return recording, flow_of(recording)


def _model(name: str) -> tuple[Recording, Flow]:
    return _followed(build(name), example_of(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_one_value_crosses_between_layers(name: str) -> None:
    recording, flow = _model(name)
    assert not flow.illegal
    layers = [call.index for call in recording.calls if call.path.rpartition(".")[2].isdigit()]
    for boundary in layers[1:]:
        assert len(flow.crossing[boundary]) == 1


def test_what_crosses_in_an_encoder_and_decoder() -> None:
    recording, flow = _model("t5")
    paths = [call.path for call in recording.calls]
    counts = {path: len(flow.crossing[paths.index(path)]) for path in paths[1:]}
    assert counts["encoder.block.1"] == 2  # the residual stream and the first layer's position bias
    assert counts["encoder.final_layer_norm"] == 1
    assert counts["decoder.block.0"] == 2  # the encoder's result goes on
    assert counts["decoder.block.1"] == 4
    assert counts["lm_head"] == 1


def test_one_sum_crosses_where_residuals_are_outside_of_layers() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, 8)
            self.place = nn.Parameter(torch.ones(8))
            pairs = [nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(3)]
            self.layers = nn.ModuleList(pairs)

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            hidden = self.embedding(ids) + self.place
            for first, second in self.layers:
                hidden = first(hidden) + hidden
                hidden = F.dropout(second(hidden), 0.1, self.training) + hidden
            return F.cross_entropy(hidden.flatten(0, 1), labels.flatten() % 8)

    ids = torch.arange(10).view(2, 5)
    recording, flow = _followed(Residual(), {"ids": ids, "labels": ids})
    assert not flow.illegal
    assert [len(flow.crossing[boundary]) for boundary in flow.crossing] == [1] * 6
    names = [name for name, _ in Residual().named_parameters()]
    assert lay_out(recording, flow, [3], (0, 1), names).holders["place"] == (0,)


def test_dropout_is_drawn_on_one_stage() -> None:
    config = T5Config(
        vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    assert config.dropout_rate > 0
    recording, flow = _followed(T5ForConditionalGeneration(config), example_of("t5"))
    assert not flow.illegal
    assert "encoder.dropout" in [call.path for call in recording.calls]


def test_parameters_of_stages() -> None:
    """What is read outside of layers, and what is tied, is held where it is needed; nothing is left out."""
    recording, flow = _model("skips")
    names = [name for name, _ in build("skips").named_parameters()]
    layout = lay_out(recording, flow, [2, 4], (0, 1, 2), names)
    assert layout.holders["scale"] == (0, 2)
    assert layout.holders["down.1.weight"] == (1,)
    recording, flow = _model("gpt2")
    names = [name for name, _ in build("gpt2").named_parameters()]
    layout = lay_out(recording, flow, [4], (0, 1), names)
    assert layout.holders["transformer.wte.weight"] == (0, 1)
    assert all(layout.holders[name] for name in names)


def test_the_head_counts_in_the_choice() -> None:
    """With a large vocabulary the last stage has fewer layers."""

    class Deep(nn.Module):
        def __init__(self, vocabulary: int) -> None:
            super().__init__()
            self.embedding = nn.Embedding(vocabulary, 8)
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(8)])
            self.head = nn.Linear(8, vocabulary)

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            hidden = self.embedding(ids)
            for layer in self.layers:
                hidden = layer(hidden)
            return F.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())

    ids = torch.arange(10).view(2, 5)
    found = []
    for vocabulary in (16, 32):
        recording, flow = _followed(Deep(vocabulary), {"ids": ids, "labels": ids})
        (boundary,) = chosen_boundaries(recording, flow, 2)
        found.append(recording.calls[boundary].path)
    assert found == ["layers.5", "layers.6"]
    costs = {call.path: 1.0 for call in recording.calls} | {"layers.0": 8.0}
    assert recording.calls[chosen_boundaries(recording, flow, 2, costs)[0]].path == "layers.1"
    assert crossing_bytes(flow, boundary) == 2 * 5 * 8 * 4


class _Hiding(nn.Module):
    """A layer that leaves what it computes in a place that another reads."""

    def __init__(self, notes: list[Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.notes = notes

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.linear(hidden)
        for note in self.notes:
            result = result + note
        self.notes.append(result * 2)
        return result


class _Odd(nn.Module):
    """What cannot be cut between its layers, for one reason or another."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        notes: list[Tensor] = []
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(
            [_Hiding(notes) if what == "hidden" else nn.Linear(8, 8) for _ in range(2)]
        )

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        mask = F.dropout(torch.ones(8), 0.5, self.training) if self.what == "random" else 1
        if self.what == "recomputed":
            hidden = checkpoint(self._all, hidden, use_reentrant=False)
        elif self.what == "written":
            first = self.layers[0](hidden)
            kept = first * 1
            first.add_(1)
            hidden = self.layers[1](kept) + first
        else:
            for layer in self.layers:
                hidden = layer(hidden * mask)
        return F.cross_entropy(hidden.flatten(0, 1), labels.flatten() % 8)

    def _all(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("hidden", "does not return: it leaves it in an attribute"),
        ("random", "random numbers that .* draws outside of layers"),
        ("recomputed", "is recomputed together with what comes before it: checkpoint layers one by one"),
        ("written", "a tensor would have to be sent that is written into later"),
    ],
)
def test_places_that_are_no_boundary(what: str, message: str) -> None:
    ids = torch.arange(10).view(2, 5)
    recording, flow = _followed(_Odd(what), {"ids": ids, "labels": ids})
    last = [call.path for call in recording.calls].index("layers.1")
    assert last in flow.illegal
    with pytest.raises(PlanError, match=message):
        named_boundaries(recording, flow, ["layers.1"], 2)
    with pytest.raises(
        PlanError, match=f"3 stages need 2 places to cut the model at, and it has 1; .*{message}"
    ):
        chosen_boundaries(recording, flow, 3)


def test_names_that_are_no_boundaries() -> None:
    recording, flow = _model("llama")
    with pytest.raises(
        PlanError, match=r"model.layers.9: no unit is called so. Stages can begin with: model"
    ):
        named_boundaries(recording, flow, ["model.layers.9"], 2)
    with pytest.raises(PlanError, match="3 stages need 2 names of units, not 1"):
        named_boundaries(recording, flow, ["model.layers.1"], 3)
    with pytest.raises(PlanError, match="do not follow each other"):
        named_boundaries(recording, flow, ["model.layers.2", "model.layers.1"], 3)
    with pytest.raises(PlanError, match=r"model.layers.1: it has no cost"):
        chosen_boundaries(recording, flow, 2, {"model.embed_tokens": 1.0, "model.layers.0": 1.0})


def test_how_micro_batches_are_weighed() -> None:
    recording, flow = _model("gpt2")
    assert default_weigh(recording.trace, flow) == TokenCount("labels", True, IGNORED)
    recording, flow = _model("bert")
    assert default_weigh(recording.trace, flow) == TokenCount("labels", False, IGNORED)
    labels = torch.tensor([[1, IGNORED, 3], [IGNORED, 5, 6]])
    parts = divided({"labels": labels, "scale": torch.ones(()), "row": torch.ones(1, 3)}, 2)
    assert parts[1]["labels"].tolist() == [[IGNORED, 5, 6]]
    assert parts[1]["row"].shape == (1, 3)
    assert shares_of(TokenCount("labels", True, IGNORED), parts) == [1 / 3, 2 / 3]
    with pytest.raises(ValueError, match="no label of this batch counts"):
        shares_of(lambda _: 0.0, parts)
    with pytest.raises(ValueError, match="a batch of 2 rows cannot be divided into 4 equal micro-batches"):
        divided({"labels": labels}, 4)
    with pytest.raises(ValueError, match=r"equally many rows.* \(a: 2, b: 4\)"):
        divided({"a": torch.ones(2), "b": torch.ones(4)}, 2)


@pytest.mark.parametrize("kind", ["mean", "sum", "added", "alike"])
def test_losses_whose_parts_are_not_known(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

        def forward(self, values: Tensor, labels: Tensor) -> Tensor:
            for layer in self.layers:
                values = layer(values)
            if kind == "mean":
                return F.mse_loss(values, torch.zeros_like(values))
            if kind == "sum":
                return values.sum()
            if kind == "added":
                loss = F.mse_loss(values, torch.zeros_like(values))
                loss += values.std()  # of a whole batch it is not the mean of those of its parts
                return loss
            logits = values.view(2, 4, 8)
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    labels = torch.ones(2, 4, dtype=torch.long)
    recording, flow = _followed(Model(), {"values": torch.ones(8, 8), "labels": labels})
    if kind == "mean":
        assert default_weigh(recording.trace, flow) is equal_weight
        return
    if kind in ("sum", "added"):
        with pytest.raises(
            PlanError, match=r"it is no plain mean over labels or over elements\. Pass weigh="
        ):
            default_weigh(recording.trace, flow)
        return
    assert default_weigh(recording.trace, flow) == TokenCount("labels", True, IGNORED)


def test_schedules() -> None:
    with pytest.raises(PlanError, match=r"there is no schedule 'pipedream'\. Choose one of gpipe, 1f1b"):
        schedule_kind("pipedream")
    assert ranks_of_stages(schedule_kind("interleaved_1f1b"), 3, None) == (0, 1, 2, 0, 1, 2)
    assert ranks_of_stages(schedule_kind("zbv"), 3, None) == (0, 1, 2, 2, 1, 0)
    with pytest.raises(PlanError, match="this schedule has 1 stages on each rank, not 2"):
        ranks_of_stages(schedule_kind("1f1b"), 2, 2)
    assert idle_share(schedule_kind("1f1b"), 4, 1, 9) == 0.25
    assert idle_share(schedule_kind("interleaved_1f1b"), 3, 2, 4) == 0.2
