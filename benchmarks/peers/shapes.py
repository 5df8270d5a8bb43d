"""The models that are measured, and the cases: a model, a dtype and a number of ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Family = Literal["gpt", "llama"]
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""By their short names, the names that torch gives them."""
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-3}
"""By how much, relative, the first losses of two systems may differ and still be those of one model.

bf16 has eight bits: systems that round at other places, or keep the optimizer's weights in fp32, differ by
about one in the third digit after a step.
"""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of one step's batch.

    Attributes:
        family: ``gpt``: learned positions, LayerNorm, biases, GELU. ``llama``: rotary positions, RMSNorm, no
            biases, SiLU gates, heads that share keys and values.
        turn: measured steps in one turn of a system, unless told otherwise.
    """

    name: str
    family: Family
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    feed_forward: int
    vocabulary: int
    sequence: int
    batch: int
    turn: int

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    def __str__(self) -> str:
        kind = "GPT" if self.family == "gpt" else "Llama"
        shared = "" if self.heads == self.key_value_heads else f"/{self.key_value_heads}"
        return (
            f"{kind}, {self.layers} layers, hidden {self.hidden}, {self.heads}{shared} heads, "
            f"feed-forward {self.feed_forward}, vocabulary {self.vocabulary}, "
            f"batch {self.batch} x {self.sequence}"
        )


SHAPES = {
    shape.name: shape
    for shape in (
        #      name         family   layers hidden heads kv  feed  vocabulary sequence batch turn
        Shape("gpt", "gpt", 4, 512, 8, 8, 2048, 8192, 256, 4, 3),
        Shape("llama", "llama", 4, 512, 8, 4, 1408, 8192, 256, 4, 3),
        Shape("gpt_64", "gpt", 4, 512, 8, 8, 2048, 8192, 64, 1, 6),
        Shape("llama_64", "llama", 4, 512, 8, 4, 1408, 8192, 64, 1, 6),
        Shape("llama_1024", "llama", 4, 1024, 16, 8, 2816, 8192, 512, 1, 2),
        Shape("tiny", "llama", 4, 64, 4, 4, 176, 512, 8, 1, 30),
        Shape("heads_9_3", "llama", 4, 576, 9, 3, 1536, 8192, 256, 1, 3),  # SmolLM2's heads and widths
    )
}


@dataclass(frozen=True)
class Case:
    """What all systems are given to do."""

    shape: Shape
    dtype: str
    ranks: int

    @property
    def key(self) -> str:
        """The name in the results: that of the shape, with what is not fp32 over two ranks."""
        parts = [self.shape.name]
        if self.dtype != "fp32":
            parts.append(self.dtype)
        if self.ranks != 2:
            parts.append(f"tp{self.ranks}")
        return "-".join(parts)

    @property
    def title(self) -> str:
        return f"{self.shape}, {self.dtype}, tp={self.ranks}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        return cls(Shape(**data["shape"]), data["dtype"], data["ranks"])
