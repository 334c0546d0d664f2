"""A module that computes one spec in one choice of spellings."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rewriter.passes.fuzz import fused, masking, positions, projecting, scoring, weighing
from rewriter.passes.fuzz.edit import Edit
from rewriter.passes.fuzz.laid import Laid, Tensor
from rewriter.passes.fuzz.spec import CHANNELS, Spec

_TABLES: tuple[tuple[Edit, ...], ...] = (
    fused.FUSED,
    fused.GROUPS,
    projecting.PROJECTIONS,
    *(tuple(Edit(f"split_{n}", e.name, e.write, e.when) for e in projecting.SPLITS) for n in "qkv"),
    positions.NORMS,
    positions.ROTARIES,
    scoring.SCALES,
    scoring.FACTORS,
    scoring.REPEATS,
    scoring.PRODUCTS,
    scoring.CAPS,
    masking.STRUCTURES,
    masking.PADDINGS,
    masking.JOINS,
    masking.APPLICATIONS,
    masking.ALIBIS,
    weighing.SOFTMAXES,
    weighing.DROPOUTS,
    weighing.MIXES,
    weighing.MERGES,
    *weighing.NOTHINGS,
    projecting.OUTPUTS,
    weighing.RESIDUALS,
)

SLOTS: Mapping[str, tuple[Edit, ...]] = {t[0].slot: t for t in _TABLES}
"""Every slot with its spellings; the first that fits a spec is the canonical one."""


@dataclass(frozen=True)
class Recipe:
    """A spec and the edits that differ from its canonical spelling.

    Attributes:
        edits: slot -> name of an edit in `SLOTS`.
        breaking: an edit that changes what is computed, or None.
    """

    spec: Spec
    edits: Mapping[str, str] = field(default_factory=dict)
    breaking: Edit | None = None
    seed: int = 0

    def describe(self) -> str:
        lines = [f"{slot}: {name}" for slot, name in self.edits.items()]
        if self.breaking is not None:
            lines.append(f"{self.breaking.slot}: {self.breaking.name} (breaking)")
        return f"{self.spec}\n" + "\n".join(f"  {line}" for line in lines)


def chosen(recipe: Recipe) -> dict[str, Edit]:
    """The edit of every slot: the one asked for where it fits, else the first that does."""
    out: dict[str, Edit] = {}
    names: dict[str, str] = {}
    for slot, table in SLOTS.items():
        fitting = [e for e in table if e.when(recipe.spec, names)] or [table[0]]
        wanted = recipe.edits.get(slot)
        edit = next((e for e in fitting if e.name == wanted), fitting[0])
        out[slot], names[slot] = edit, edit.name
    return out


def random_edits(spec: Spec, rng: random.Random, chance: float = 0.6) -> dict[str, str]:
    """A random choice for each slot, left canonical with probability 1 - `chance`."""
    names: dict[str, str] = {}
    out: dict[str, str] = {}
    for slot, table in SLOTS.items():
        fitting = [e for e in table if e.when(spec, names)] or [table[0]]
        often = chance / 2 if slot.startswith("at_") else chance
        edit = rng.choice(fitting) if rng.random() < often else fitting[0]
        names[slot] = edit.name
        if edit is not fitting[0]:
            out[slot] = edit.name
    return out


class Program(nn.Module):
    """The recipe as a module: (x[, context][, padding]) -> x + attention.

    x is (batch, tokens, CHANNELS) float32, context the same with another length, padding
    (batch, keys) int64 with 1 at valid keys.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.spec = recipe, recipe.spec
        self._edits = chosen(recipe)
        self.raw = _weights(recipe.spec, recipe.seed)
        with torch.no_grad():
            self.train(False)(*inputs(recipe.spec, 5))  # makes the parameters
        self.train(recipe.spec.dropout > 0.0)

    def use(self, slot: str) -> Callable[..., Any]:
        """The code of a slot, a breaking edit included."""
        breaking = self.recipe.breaking
        if breaking is not None and breaking.slot == slot:
            return breaking.write
        if slot in self._edits:
            return self._edits[slot].write
        return _all if slot == "operands" else _first

    def param(self, name: str, value: Tensor) -> Tensor:
        if name not in self._parameters:
            self.register_parameter(name, nn.Parameter(value.clone()))
        return self.get_parameter(name)

    def buffer(self, name: str, value: Tensor) -> Tensor:
        if name not in self._buffers:
            self.register_buffer(name, value.clone(), persistent=False)
        return self.get_buffer(name)

    def child(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        if name not in self._modules:
            self.add_module(name, make())
        return self.get_submodule(name)

    def linear(self, name: str, weight: Tensor | None = None, bias: Tensor | None = None) -> Any:
        weight = self.raw[name] if weight is None else weight
        bias = self.raw["b" + name] if bias is None else bias
        return self.child(f"project_{name}", lambda: projecting.linear(weight, bias))

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        spec, extra = self.spec, list(rest)
        source = extra.pop(0) if spec.cross else x
        padding = extra.pop(0) if spec.padding else None
        flat = self.use("project")(self, x, source)
        kv = "h" if spec.group == 1 else "x"
        q: Laid = self.use("split_q")(flat[0], spec.heads, "hnd")
        k: Laid = self.use("split_k")(flat[1], spec.kv_heads, kv + "md")
        v: Laid = self.use("split_v")(flat[2], spec.kv_heads, kv + "me")
        if spec.norm:
            q, k = self.use("norm")(self, q, "q"), self.use("norm")(self, k, "k")
        if spec.rotary_dim:
            q, k = self.use("rotary")(self, q), self.use("rotary")(self, k)
        q = self.use("at_query")(self, q)
        q, k, v = self.use("operands")(self, q, k, v)
        how = self._edits["fused"].name
        if spec.group > 1 and not (how != "no" and self._edits["gqa"].name == "flag"):
            k, v = self.use("repeat")(self, k), self.use("repeat")(self, v)
        if how == "no":
            o = self._eager(q, k, v, padding)
        else:
            o = fused.attend(self, q, k, v, padding, how)
        o = self.use("at_output")(self, o)
        y = self.use("output")(self, self.use("merge")(self, o))
        out: Tensor = self.use("residual")(self, x, y)
        return out

    def _masked(self, s: Laid, padding: Tensor | None) -> Laid:
        breaking = self.recipe.breaking
        if breaking is not None and breaking.slot == "mask":
            out: Laid = breaking.write(self, s, padding)
            return out
        return masking.masked(self, s, padding)

    def _eager(self, q: Laid, k: Laid, v: Laid, padding: Tensor | None) -> Laid:
        q, k, factor = self.use("scale")(self, q, k)
        s, factor = self.use("product")(self, q, k, factor)
        if factor != 1.0:
            s = self.use("factor")(self, s, factor)
        s = self.use("raw_scores")(self, s, q)
        if self.spec.softcap is not None:
            s = self.use("softcap")(self, s)
        s = masking.biased(self, self.use("at_scores")(self, s))
        s = self._masked(s, padding)
        s = self.use("masked_scores")(self, s, q)
        w = self.use("softmax")(self, s)
        w = self.use("probabilities")(self, w, q, s)
        if self.spec.dropout:
            w = self.use("dropout")(self, w)
        w = self.use("at_weights")(self, w)
        v = self.use("mixed_values")(self, v, w)
        out: Laid = self.use("mix")(self, w, v)
        return out


def _first(p: Any, item: Laid, *rest: Laid) -> Laid:
    """Slots that only breaking edits fill."""
    return item


def _all(p: Any, *items: Laid) -> tuple[Laid, ...]:
    return items


def inputs(spec: Spec, length: int, seed: int = 0, padded: bool = False) -> tuple[Tensor, ...]:
    """Arguments of a program; `padded` hides keys at the end of the second row."""
    generator = torch.Generator().manual_seed(seed)
    out = [torch.randn(2, length, CHANNELS, generator=generator)]
    keys = length
    if spec.cross:
        keys = length + 4
        out.append(torch.randn(2, keys, CHANNELS, generator=generator))
    if spec.padding:
        mask = torch.ones(2, keys, dtype=torch.long)
        if padded:
            mask[1, keys - 2 :] = 0
        out.append(mask)
    return tuple(out)


def _weights(spec: Spec, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random_(*shape: int, size: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * size

    rows = {
        "q": spec.heads * spec.width,
        "k": spec.kv_heads * spec.width,
        "v": spec.kv_heads * spec.value_width,
    }
    spread = (2.0 * CHANNELS**-1) ** 0.5 / (spec.scale * spec.width**0.5) ** 0.5
    raw = {n: random_(r, CHANNELS, size=spread) for n, r in rows.items()}
    raw.update({"b" + n: random_(r, size=0.3) for n, r in rows.items()})
    raw["o"] = random_(CHANNELS, spec.heads * spec.value_width, size=0.3)
    raw["bo"] = random_(CHANNELS, size=0.3)
    raw["norm"] = 1.0 + random_(spec.width, size=0.2)
    raw["slopes"] = torch.tensor([2.0 ** -(h + 1) for h in range(spec.heads)])
    half = max(spec.rotary_dim // 2, 1)
    raw["frequencies"] = 0.7 ** torch.arange(half, dtype=torch.float32)
    raw["sinks"] = random_(spec.heads)
    return raw
