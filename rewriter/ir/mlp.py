"""What the matcher knows about one MLP block: pure data, no graph nodes, safe to serialise.

    y = down( dropout( f(gate(x)) * up(x) ) )      gated
    y = down( dropout( f(up(x)) ) )                plain

x is (..., input), the hidden values are (..., hidden), y is (..., output); every token is served
alone. The activation f is a name that was found by evaluating the graph, never by a module's name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from rewriter.ir.site import Source

MlpKind = Literal["plain", "glu", "fused_glu", "conv1x1", "experts"]
GateLayout = Literal["none", "separate", "halves", "interleaved"]
MapSpelling = Literal["linear", "conv1x1", "einsum", "batched", "grouped"]
OPAQUE = "opaque"


@dataclass(frozen=True)
class Activation:
    """The function between the projections, over scalars: f(u), or f(g, u) = f(g) * u.

    Attributes:
        name: entry of the table of known functions, or 'opaque' for a pointwise function that
            equals none of them on the probe values.
        parameters: constants of the function, such as the slope of a leaky ReLU or the limit of a
            clamped gate.
        scale: constant factor on the result.
        learned: parameters of the model that the function reads.
    """

    name: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1.0
    learned: tuple[str, ...] = ()

    @property
    def opaque(self) -> bool:
        return self.name == OPAQUE

    def describe(self) -> str:
        inside = ", ".join(f"{k}={v:g}" for k, v in self.parameters.items())
        text = f"{self.name}({inside})" if inside else self.name
        if self.learned:
            text += f" with learned {', '.join(self.learned)}"
        return text if self.scale == 1.0 else f"{self.scale:g} * {text}"


@dataclass(frozen=True)
class ChannelMap:
    """One projection: which parameter it is, and how the parameter holds (output, input).

    Attributes:
        weight: fully qualified name of the parameter.
        bias: that of the bias, or None.
        module: the module that runs it.
        transposed: the parameter holds (input, output) instead of (output, input).
        rows: (start, stop, step) of its output channels among those of the parameter; gate and up
            projection of a fused one are two such parts of one parameter.
        spelling: the operator that applies it.
    """

    weight: str
    bias: str | None
    module: str
    transposed: bool
    rows: tuple[int, int, int]
    spelling: MapSpelling = "linear"


@dataclass(frozen=True)
class MlpSite:
    """One matched MLP block.

    Attributes:
        fqn: path of the smallest module that owns projections and activation; '' is the model.
        index: position among all MLP sites of the model, in the order they run.
        activation: the pointwise function, named by evaluation.
        input, hidden, output: channels.
        up, down: projections; `gate` is the one the activation is applied to, if it is gated.
        gate_layout: where the gate comes from: none, a separate projection, the halves of one, or
            every second channel of one.
        dropout: dropout probability on the hidden values when training.
        experts: experts that run this block with their own weights, 0 for a dense block. The
            parameters then have a leading axis of that size.
        source: where the down projection was written.
        fingerprint: hash of the owner's part of the graph; equal for layers that compute the same
            function of their own parameters.
    """

    fqn: str
    index: int
    activation: Activation
    input: int
    hidden: int
    output: int
    up: ChannelMap
    down: ChannelMap
    source: Source
    gate: ChannelMap | None = None
    gate_layout: GateLayout = "none"
    dropout: float = 0.0
    experts: int = 0
    fingerprint: str = ""

    @property
    def maps(self) -> tuple[ChannelMap, ...]:
        """The projections in the order gate, up, down."""
        return tuple(m for m in (self.gate, self.up, self.down) if m is not None)

    @property
    def kind(self) -> MlpKind:
        if self.experts:
            return "experts"
        if self.down.spelling == "conv1x1":
            return "conv1x1"
        if self.gate is None:
            return "plain"
        return "glu" if self.gate_layout == "separate" else "fused_glu"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters of the projections, each once."""
        names = [n for m in self.maps for n in (m.weight, m.bias) if n is not None]
        return tuple(dict.fromkeys(names))

    def renamed(self, rename: Callable[[str], str]) -> MlpSite:
        """The site with every path and parameter name changed."""

        def part(item: ChannelMap | None) -> ChannelMap | None:
            if item is None:
                return None
            bias = None if item.bias is None else rename(item.bias)
            return replace(item, weight=rename(item.weight), bias=bias, module=rename(item.module))

        up, down = part(self.up), part(self.down)
        assert up is not None and down is not None
        learned = tuple(rename(name) for name in self.activation.learned)
        return replace(
            self,
            fqn=rename(self.fqn),
            source=replace(self.source, module=rename(self.source.module)),
            activation=replace(self.activation, learned=learned),
            up=up,
            down=down,
            gate=part(self.gate),
        )

    def core_facts(self) -> dict[str, Any]:
        """Everything a core depends on besides the weights; names are relative to the owner."""
        data = self.to_json()
        for key in ("fqn", "index", "source", "fingerprint"):
            data.pop(key)
        prefix = f"{self.fqn}." if self.fqn else ""
        for name in ("gate", "up", "down"):
            part = data[name]
            for key in ("weight", "bias", "module") if part else ():
                part[key] = part[key] and part[key].removeprefix(prefix)
        return data

    def core_hash(self) -> str:
        text = json.dumps(self.core_facts(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["activation"] = {**asdict(self.activation), "learned": list(self.activation.learned)}
        for name in ("gate", "up", "down"):
            part: ChannelMap | None = out[name]
            out[name] = None if part is None else {**asdict(part), "rows": list(part.rows)}
        out["source"] = asdict(self.source)
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MlpSite:
        values = dict(data)
        activation = dict(data["activation"])
        activation["learned"] = tuple(activation["learned"])
        values["activation"] = Activation(**activation)
        for name in ("gate", "up", "down"):
            part = data[name]
            if part is not None:
                values[name] = ChannelMap(**{**part, "rows": tuple(part["rows"])})
        values["source"] = Source(**data["source"])
        return cls(**values)
