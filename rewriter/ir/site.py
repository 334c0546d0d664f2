"""What the matcher knows about one attention block: pure data, no graph nodes, safe to serialise.

The *core* of a site is the part that a mixer replaces. It takes queries (B, H, N, Dk), keys
(B, Hkv, N, Dk) and values (B, Hkv, N, Dv) as the graph has them right before they meet (after
projection, rotary embedding and QK-norm, before key/value heads are repeated) and returns
(B, H, N, Dv). Everything around the core stays as it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from rewriter.ir.advice import advice
from rewriter.ir.mask import Mask

Spelling = Literal["sdpa", "eager"]
PositionKind = Literal["rotary", "alibi", "relative_bias", "content_bias", "external"]


@dataclass(frozen=True)
class Source:
    """Where in the person's program something was found."""

    node: str
    module: str = ""
    file: str | None = None
    line: int | None = None

    def describe(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else "unknown source line"
        return f"node '{self.node}' in '{self.module or 'the model itself'}' ({place})"


@dataclass(frozen=True)
class HeadGroups:
    """Query head h reads key/value head h // (query // key_value) (contract 2)."""

    query: int
    key_value: int
    key_dim: int
    value_dim: int

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.query // self.key_value


@dataclass(frozen=True)
class ScoreStep:
    """One operation between QK^T and the softmax, in the order the graph applies them."""

    name: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        return {"step": self.name, **asdict(self)}


@dataclass(frozen=True)
class Scale(ScoreStep):
    """Multiply (or divide) by a constant; `on` says which tensor the graph scales."""

    value: float
    on: Literal["query", "key", "scores"] = "scores"
    divide: bool = False
    name: ClassVar[str] = "scale"

    @property
    def factor(self) -> float:
        return 1.0 / self.value if self.divide else self.value


@dataclass(frozen=True)
class Softcap(ScoreStep):
    """cap * tanh(scores / cap)."""

    cap: float
    name: ClassVar[str] = "softcap"


@dataclass(frozen=True)
class AddTerm(ScoreStep):
    """scores + factor * terms[index]: an additive mask, a bias, or both in one tensor."""

    index: int
    factor: float = 1.0
    name: ClassVar[str] = "add"

    def to_json(self) -> dict[str, Any]:
        out = super().to_json()
        if self.factor == 1.0:  # as it always was, so that hashes of saved sites stay
            del out["factor"]
        return out


@dataclass(frozen=True)
class FillTerm(ScoreStep):
    """scores filled with `value` where terms[index] is true, or with `keep` where it is false."""

    index: int
    value: float
    keep: bool
    name: ClassVar[str] = "fill"


@dataclass(frozen=True)
class SinkTerm(ScoreStep):
    """terms[index], broadcast to (B, H, Nq, 1), is one more logit of the softmax.

    It takes its share of the probabilities and gives no value: o = sum_j p_j v_j with
    sum_j p_j < 1.
    """

    index: int
    name: ClassVar[str] = "sink"


@dataclass(frozen=True)
class TemperatureTerm(ScoreStep):
    """scores times terms[index], or divided by it, which broadcasts to (B, H, Nq, 1).

    It is learned, so it is no constant; all keys of a query share it.
    """

    index: int
    divide: bool = False
    name: ClassVar[str] = "temperature"


STEPS: Mapping[str, type[ScoreStep]] = {
    s.name: s for s in (Scale, Softcap, AddTerm, FillTerm, SinkTerm, TemperatureTerm)
}

_PLACE = ("slot", "slots", "run", "runs")
TermRole = Literal["mask", "bias", "mask_and_bias", "sink", "temperature", "none"]


@dataclass(frozen=True)
class Projection:
    """A linear map next to the core: the module that holds it, and whether others share it."""

    module: str
    fused: bool = False


@dataclass(frozen=True)
class AttentionSite:
    """One matched attention block.

    Attributes:
        fqn: path of the smallest module that owns the core and its projections; '' is the model.
        index: position among all sites of the model, in the order they run.
        heads: head counts and widths.
        score: operations on the scores, in graph order. For the `sdpa` spelling: one `Scale` on
            the scores, then `AddTerm(0)` or `FillTerm(0)` if a mask tensor is given.
        terms: role of each run-time mask or bias tensor that the core receives.
        mask: which keys a query may see, over all terms and the causal flag together.
        position: how positions enter. `external` means before the projections (learned or none),
            `content_bias` through a bias that is computed from activations.
        rotary_dim: rotated channels of each head (0 without rotary embedding).
        softmax_dtype: dtype the graph casts the scores to for the softmax, or None for no cast.
        dropout: dropout probability on the attention weights when training.
        projections: 'query', 'key', 'value', 'output' where they were identified.
        prescaled: product of scalars applied to the query between its projection and the core.
        causal_flag: the graph uses SDPA's is_causal instead of a mask tensor.
        qk_norm: a normalisation stands between projection and core.
        cross: keys and values come from another sequence than the queries.
        hidden_dim: Dm, width of the (B, N, Dm) tensor that all three projections read; 0 if they
            do not read one such tensor.
        fingerprint: hash of the owner's part of the graph; equal for layers that compute the same
            function of their own parameters.
        normaliser: what turns scores into weights: 'softmax', or the name of an `Anchor` of another
            package (`rewriter.extension`).
        slot, slots: which of the blocks that one run of the owner computes, and how many there are.
        run, runs: which run of the owner, and how often one forward pass runs it. All runs share
            the owner's weights, so they are rewritten together and share one mixer.
    """

    fqn: str
    index: int
    heads: HeadGroups
    score: tuple[ScoreStep, ...]
    terms: tuple[TermRole, ...]
    mask: Mask
    spelling: Spelling
    source: Source
    position: PositionKind = "external"
    rotary_dim: int = 0
    softmax_dtype: str | None = None
    dropout: float = 0.0
    projections: Mapping[str, Projection] | None = None
    prescaled: float = 1.0
    causal_flag: bool = False
    qk_norm: bool = False
    cross: bool = False
    hidden_dim: int = 0
    fingerprint: str = ""
    normaliser: str = "softmax"
    slot: int = 0
    slots: int = 1
    run: int = 0
    runs: int = 1

    @property
    def core(self) -> str:
        """Path of the site's mixer inside its owner."""
        return "core" if self.slots == 1 else f"core.{self.slot}"

    @property
    def label(self) -> str:
        """The owner, and which of its blocks and runs, for people."""
        parts = [self.fqn or "the model"]
        if self.slots > 1:
            parts.append(f"block {self.slot + 1} of {self.slots}")
        if self.runs > 1:
            parts.append(f"run {self.run + 1} of {self.runs}")
        return ", ".join(parts)

    @property
    def scale(self) -> float:
        """Factor between q.k (as the core receives them) and the logits, softcap aside."""
        out = 1.0
        for step in self.score:
            if isinstance(step, Scale):
                out *= step.factor
        return out

    @property
    def softcap(self) -> float | None:
        return next((s.cap for s in self.score if isinstance(s, Softcap)), None)

    @property
    def sinks(self) -> bool:
        """A learned logit takes part in the softmax and in nothing else."""
        return "sink" in self.terms

    @property
    def temperature(self) -> TemperatureTerm | None:
        """The learned factor of the scores, which `scale` leaves out, if there is one."""
        return next((s for s in self.score if isinstance(s, TemperatureTerm)), None)

    @property
    def has_bias(self) -> bool:
        return any(role in ("bias", "mask_and_bias") for role in self.terms)

    @property
    def kind(self) -> Literal["causal", "bidirectional"]:
        return "causal" if self.mask.causal else "bidirectional"

    def core_facts(self) -> dict[str, Any]:
        """Everything a core depends on; equal facts mean interchangeable cores."""
        data = self.to_json()
        for key in ("fqn", "index", "source", "projections", "fingerprint", *_PLACE):
            data.pop(key)
        return data

    def core_hash(self) -> str:
        text = json.dumps(self.core_facts(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["heads"] = asdict(self.heads)
        out["score"] = [s.to_json() for s in self.score]
        out["terms"] = list(self.terms)
        out["mask"] = self.mask.to_json()
        out["source"] = asdict(self.source)
        out["projections"] = {k: asdict(v) for k, v in (self.projections or {}).items()}
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AttentionSite:
        values = dict(data)
        values["heads"] = HeadGroups(**data["heads"])
        values["score"] = tuple(
            STEPS[s["step"]](**{k: v for k, v in s.items() if k != "step"}) for s in data["score"]
        )
        values["terms"] = tuple(data["terms"])
        values["mask"] = Mask.from_json(data["mask"])
        values["source"] = Source(**data["source"])
        values["projections"] = {k: Projection(**v) for k, v in data["projections"].items()}
        return cls(**values)


Stage = Literal["capture", "normalise", "match", "mask", "plan", "realise", "verify"]


@dataclass(frozen=True)
class NearMiss:
    """Something that looked like attention and was refused.

    Attributes:
        stage: the pipeline stage that refused it.
        reason: one sentence that says what stopped it.
        source: node, module and source line.
        facts: what had been understood until then, as 'step: fact'.
        step: the step of matching that stopped it.
        graph: the nodes around the one that stopped it, one a line.
    """

    stage: Stage
    reason: str
    source: Source
    facts: tuple[str, ...] = ()
    step: str = ""
    graph: tuple[str, ...] = ()

    @property
    def advice(self) -> str:
        """What a person can do about it."""
        return advice(self.reason)

    def describe(self) -> str:
        return f"{self.stage}: {self.reason}; {self.source.describe()}"

    def to_json(self) -> dict[str, Any]:
        lists = {"facts": list(self.facts), "graph": list(self.graph)}
        return {**asdict(self), **lists, "advice": self.advice}
