"""Several runs in one trace."""

import torch
from torch import nn

from colrow.trace import Example, trace_together


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        y = self.dropout(self.linear(x))
        return y if labels is None else nn.functional.cross_entropy(y, labels)


def test_runs_share_parameters_and_nothing_else() -> None:
    x, labels = torch.randn(3, 6), torch.tensor([1, 2, 3])
    examples = {"training": Example((x,), {"labels": labels}), "evaluation": Example((x,))}
    trace = trace_together(Block(), examples)
    assert [mode for mode, _ in trace.runs] == ["training", "evaluation"]
    names = [operation.name for operation in trace.operations]
    first, second = (call for _, call in trace.runs)
    assert names.count("aten.bernoulli_") == names[first.first : first.last].count("aten.bernoulli_") == 1
    assert names.count("aten.nll_loss_forward") == names[first.first : first.last].count(
        "aten.nll_loss_forward"
    )
    assert second.first == first.last
    parameters = [value for value in trace.values if value.source.kind == "parameter"]
    assert [value.source.name for value in parameters] == ["linear.weight", "linear.bias"]
    uses = {use.index >= second.first for use in parameters[0].uses}
    assert uses == {False, True}
    inputs = [value for value in trace.values if value.source.kind == "input"]
    assert [value.source.name for value in inputs] == ["x", "labels", "x"]
    assert [value.shape for _, value in trace.outputs] == [(), (3, 6)]
