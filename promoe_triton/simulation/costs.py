"""How long things take: from what a machine and a model are said to be, or from what was measured of them.

Letters: T tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from promoe_triton.protocols import Part
from promoe_triton.simulation.description import Hardware, Software
from promoe_triton.simulation.shapes import ModelShape


class Costs(Protocol):
    """Seconds of everything that computes, nothing else running."""

    def layer(self, tokens: int, context: int, texts: int) -> float:
        """Return what a MoE layer's share of all but routed experts takes, for T tokens.

        They are as many of each of so many texts, and come after `context` others of the same.
        """
        ...

    def call(self, tokens: int, settled: bool) -> float:
        """Return what a call of a layer's experts takes beside products. settled: all layers have every expert."""
        ...

    def product(self, layer: int, part: Part, rows: Sequence[int]) -> float:
        """Return what one half of a wave takes: of experts with so many rows each."""
        ...

    def predict(self, tokens: int) -> float: ...

    def head(self, tokens: int) -> float: ...


class Roofline:
    """The longest of reading the weights, multiplying, and starting the operations."""

    def __init__(self, hardware: Hardware, software: Software, shape: ModelShape) -> None:
        self._hardware, self._software, self._shape = hardware, software, shape
        self._up, self._down = (
            [(shape.expert_bytes(i, part), layer.weights(part)) for i, layer in enumerate(shape.layers)]
            for part in (Part.UP, Part.DOWN)
        )

    def _seconds(self, launches: float, nbytes: float, operations: float) -> float:
        hardware = self._hardware
        host = launches * hardware.launch_seconds
        device = max(nbytes / hardware.memory_bandwidth, operations / hardware.matmul_flops)
        return max(host, device) if hardware.asynchronous else host + device

    def layer(self, tokens: int, context: int, texts: int) -> float:
        shape, share = self._shape, 1.0 / len(self._shape.layers)
        cache = (texts * context + tokens) * shape.kv_weights * shape.dense_bits / 8
        # A token looks at those of its own text.
        attention = 4.0 * tokens * (context + tokens / texts / 2) * shape.attention_width * shape.decoder_layers
        return self._seconds(
            self._software.layer * shape.decoder_layers * share,
            (shape.dense_weights * shape.dense_bits / 8 + cache) * share,
            (2.0 * shape.dense_weights * tokens + attention) * share,
        )

    def call(self, tokens: int, settled: bool) -> float:
        software = self._software
        return self._seconds(software.call + (0.0 if settled else software.absent), 0.0, 0.0)

    def product(self, layer: int, part: Part, rows: Sequence[int]) -> float:
        software, n = self._software, len(rows)
        if part is Part.UP:
            (nbytes, weights), launches = self._up[layer], software.up + n * software.expert_up
        else:
            (nbytes, weights), launches = self._down[layer], software.down + n * software.expert_down
        return self._seconds(launches, n * nbytes, 2.0 * weights * sum(rows))

    def predict(self, tokens: int) -> float:
        return self._seconds(self._software.predict, 0.0, 0.0)

    def head(self, tokens: int) -> float:
        shape = self._shape
        # Of a prompt only the last token is followed by another.
        return self._seconds(self._software.head, shape.head_weights * shape.dense_bits / 8, 2.0 * shape.head_weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds at some sizes; between them a straight line, beyond them in proportion to what the last two show."""

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.seconds) or not self.sizes or list(self.sizes) != sorted({*self.sizes}):
            raise ValueError("a curve has as many seconds as sizes, and its sizes rise")

    def at(self, size: float) -> float:
        if len(self.sizes) == 1:
            return self.seconds[0]
        right = min(max(bisect_right(self.sizes, size), 1), len(self.sizes) - 1)
        (x0, x1), (y0, y1) = self.sizes[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
        return max(y0 + (size - x0) * (y1 - y0) / (x1 - x0), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured of one model on one machine (bench/trust.py), in seconds.

    dense: of a layer beside its experts, by tokens. calls: of a call of a layer that lacks experts beside products, by
    tokens. up, down:
    of one expert's halves, by rows. wave: of starting another wave. asking: of a prediction. heads: once per pass.
    """

    dense: Curve
    calls: Curve
    up: Curve
    down: Curve
    wave: float
    asking: float
    heads: float

    def layer(self, tokens: int, context: int, texts: int) -> float:
        return self.dense.at(tokens)

    def call(self, tokens: int, settled: bool) -> float:
        return self.calls.at(tokens)

    def product(self, layer: int, part: Part, rows: Sequence[int]) -> float:
        curve = self.up if part is Part.UP else self.down
        return self.wave + sum(map(curve.at, rows))

    def predict(self, tokens: int) -> float:
        return self.asking

    def head(self, tokens: int) -> float:
        return self.heads
