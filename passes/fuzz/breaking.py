"""Edits after which a program computes something else, by the place where they act.

`refuse`: the result is no attention that a core can stand for. `truthful`: it is attention with
other facts; it may be found if the facts found describe it.
"""

from __future__ import annotations

from typing import Any

import torch

from rewriter.passes.fuzz import masking, weighing
from rewriter.passes.fuzz.edit import Chosen, Edit, table
from rewriter.passes.fuzz.laid import Laid
from rewriter.passes.fuzz.leaking import LEAKS, OPERANDS
from rewriter.passes.fuzz.spec import Spec


def _self_attention(spec: Spec, chosen: Chosen) -> bool:
    return not spec.cross


def _keys(t: Laid) -> int:
    return t.dim("m")


def _queries(t: Laid) -> int:
    return t.dim("n")


def _heads(t: Laid) -> int:
    """A dimension that is neither queries nor keys."""
    return next(d for d, c in enumerate(t.letters) if c in "hgfxb")


def _exp_sum(p: Any, s: Laid, over: int, shift: int) -> Laid:
    e = torch.exp(s.data - s.data.amax(shift, keepdim=True))
    return s.of(e / e.sum(over, keepdim=True))


def _one_more(p: Any, s: Laid) -> Laid:
    e = torch.exp(s.data.clamp(max=20))
    return s.of(e / (1.0 + e.sum(_keys(s), keepdim=True)))


def _squared(p: Any, s: Laid) -> Laid:
    e = s.data.clamp(-50, 50).square()
    return s.of(e / (e.sum(_keys(s), keepdim=True) + 1e-6))


def _base_two(p: Any, s: Laid) -> Laid:
    e = torch.exp2(s.data - s.data.amax(_keys(s), keepdim=True))
    return s.of(e / e.sum(_keys(s), keepdim=True))


SOFTMAXES = table(
    "softmax",
    {
        "over_queries": lambda p, s: s.of(s.data.softmax(_queries(s))),
        "over_heads": lambda p, s: s.of(s.data.clamp(min=-50).softmax(_heads(s))),
        "twice": lambda p, s: s.of(s.data.softmax(_keys(s)).softmax(_keys(s))),
        "twice_crossed": lambda p, s: s.of(s.data.softmax(_keys(s)).softmax(_queries(s))),
        "summed_over_queries": lambda p, s: _exp_sum(p, s, _queries(s), _keys(s)),
        "summed_over_heads": lambda p, s: _exp_sum(p, s, _heads(s), _keys(s)),
        "one_more": _one_more,
        "squared": _squared,
        "logarithm": lambda p, s: s.of(s.data.clamp(min=-50).log_softmax(_keys(s))),
        "sigmoid": lambda p, s: s.of(torch.sigmoid(s.data)),
        "relu": lambda p, s: s.of(s.data.clamp(min=-9).relu()),
        "none": lambda p, s: s.of(s.data.clamp(min=-9)),
        "minus": lambda p, s: s.of(1.0 - s.data.softmax(_keys(s))),
        "exp_of_softmax": lambda p, s: s.of(s.data.softmax(_keys(s)).exp()),
        "maximum_only": lambda p, s: s.of(
            (s.data == s.data.amax(_keys(s), keepdim=True)).to(s.data.dtype)
        ),
        "base_two": _base_two,
        "square_of_sum": lambda p, s: s.of(
            s.data.softmax(_keys(s)) / s.data.softmax(_keys(s)).square().sum(_keys(s), True)
        ),
        "cumulative": lambda p, s: s.of(s.data.softmax(_keys(s)).cumsum(_keys(s))),
    },
)


def _top(p: Any, w: Laid, q: Laid, s: Laid) -> Laid:
    kept = w.data.topk(2, _keys(w)).indices
    gate = torch.zeros_like(w.data).scatter(_keys(w), kept, 1.0)
    return w.of(w.data * gate)


def _renormalised(p: Any, w: Laid, over: int) -> Laid:
    return w.of(w.data / w.data.sum(over, keepdim=True))


def _talking(p: Any, w: Laid, *rest: Laid) -> Laid:
    """Probabilities are mixed over heads."""
    moved = w.unfold(p.spec.heads).ungrouped().to("bhnm")
    mixer = p.param("talking", torch.eye(p.spec.heads) * 0.5 + 0.2)
    return Laid(torch.einsum("bhnm,hg->bgnm", moved.data, mixer), "bhnm")


def _after_mask(p: Any, w: Laid, *rest: Laid) -> Laid:
    n, m = w.size("n"), w.size("m")
    seen = torch.arange(m)[None, :] <= torch.arange(n)[:, None] - 1
    return w.of(w.data * masking.spread(p, w, seen.to(w.data.dtype), "nm"))


def _gated(p: Any, w: Laid, q: Laid, s: Laid) -> Laid:
    return w.of(w.data * torch.sigmoid(s.data.clamp(-50, 50)))


PROBABILITIES = table(
    "probabilities",
    {
        "top_two": _top,
        "masked_late": _after_mask,
        "filled_late": lambda p, w, q, s: w.of(
            w.data.masked_fill(
                masking.spread(
                    p, w, torch.arange(w.size("m"))[None] > torch.arange(w.size("n"))[:, None], "nm"
                ),
                0.5,
            )
        ),
        "squared": lambda p, w, q, s: w.of(w.data**2),
        "square_root": lambda p, w, q, s: w.of((w.data + 1e-6).sqrt()),
        "times_itself": lambda p, w, q, s: w.of(w.data * w.data),
        "over_queries": lambda p, w, q, s: _renormalised(p, w, _queries(w)),
        "sharpened": lambda p, w, q, s: _renormalised(p, w.of(w.data**3), _keys(w)),
        "talking": _talking,
        "gated_by_scores": _gated,
        "threshold": lambda p, w, q, s: w.of(torch.where(w.data > 0.2, w.data, 0.0)),
        "less_mean": lambda p, w, q, s: w.of(w.data - w.data.mean(_keys(w), keepdim=True)),
        "plus_uniform": lambda p, w, q, s: w.of(w.data + 0.1),
        "doubled": lambda p, w, q, s: w.of(w.data * 2.0),
        "negative": lambda p, w, q, s: w.of(-w.data),
        "less_others": lambda p, w, q, s: w.of(w.data - 0.5 * w.data.roll(1, _heads(w))),
        "rolled": lambda p, w, q, s: w.of(w.data.roll(1, _keys(w))),
        "flipped": lambda p, w, q, s: w.of(w.data.flip(_keys(w))),
        "sorted": lambda p, w, q, s: w.of(w.data.sort(_keys(w)).values),
        "rounded": lambda p, w, q, s: w.of((w.data * 4).round() / 4),
        "cumulative": lambda p, w, q, s: w.of(w.data.cumsum(_keys(w))),
        "logarithm": lambda p, w, q, s: w.of(torch.log(w.data + 1e-3)),
        "clamped": lambda p, w, q, s: w.of(w.data.clamp(max=0.3)),
        "rectified": lambda p, w, q, s: w.of(torch.relu(w.data - 0.1)),
        "maximum_divided": lambda p, w, q, s: w.of(w.data / w.data.amax(_keys(w), keepdim=True)),
        "averaged_heads": lambda p, w, q, s: w.of(
            w.data.mean(_heads(w), keepdim=True).expand_as(w.data).clone()
        ),
        "times_scores": lambda p, w, q, s: w.of(w.data * s.data.clamp(-50, 50)),
        "normalised_by_entropy": lambda p, w, q, s: w.of(
            w.data / -(w.data * (w.data + 1e-6).log()).sum(_keys(w), keepdim=True).clamp(max=-0.1)
        ),
    },
) + table(
    "probabilities",
    {"transposed": lambda p, w, q, s: w.of(w.data.transpose(_queries(w), _keys(w)))},
    when=_self_attention,
)


def _temperature(p: Any, s: Laid, q: Laid) -> Laid:
    heat = q.to("bhnd" if "b" in q.letters else "fnd").unfold(p.spec.heads).ungrouped()
    mean = heat.to("bhnd").data.mean(-1).abs() + 0.5
    return s.of(s.data.clamp(min=-1e4) * masking.spread(p, s, mean, "bhn"))


def _top_scores(p: Any, s: Laid, q: Laid) -> Laid:
    least = s.data.topk(2, _keys(s)).values.amin(_keys(s), keepdim=True)
    return s.of(s.data.masked_fill(s.data < least, -torch.inf))


def _top_added(p: Any, s: Laid, q: Laid) -> Laid:
    least = s.data.topk(2, _keys(s)).values.amin(_keys(s), keepdim=True)
    hidden = torch.where(s.data < least, -1e9, 0.0)
    return s.of(s.data + hidden)


def _talking_scores(p: Any, s: Laid, q: Laid) -> Laid:
    moved = s.unfold(p.spec.heads).ungrouped().to("bhnm")
    mixer = p.param("talking", torch.eye(p.spec.heads) * 0.5 + 0.2)
    return Laid(torch.einsum("bhnm,hg->bgnm", moved.data.clamp(min=-1e4), mixer), "bhnm")


def _multiplied_mask(p: Any, s: Laid, q: Laid) -> Laid:
    n, m = s.size("n"), s.size("m")
    seen = (torch.arange(m)[None, :] <= torch.arange(n)[:, None]).float()
    return s.of(s.data.clamp(min=-50) * masking.spread(p, s, seen, "nm"))


RAW_SCORES = table(
    "raw_scores",
    {
        "temperature_from_data": _temperature,
        "temperature_from_scores": lambda p, s, q: s.of(
            s.data / (s.data.abs().mean(_keys(s), keepdim=True) + 0.1)
        ),
        "top_two": _top_scores,
        "top_two_added": _top_added,
        "talking": _talking_scores,
        "multiplied_mask": _multiplied_mask,
        "absolute": lambda p, s, q: s.of(s.data.abs()),
        "relu": lambda p, s, q: s.of(s.data.relu()),
        "squared": lambda p, s, q: s.of(s.data * s.data),
        "sigmoid": lambda p, s, q: s.of(torch.sigmoid(s.data) * 3),
        "sine": lambda p, s, q: s.of(s.data.sin()),
        "normalised": lambda p, s, q: s.of(
            s.data / (s.data.norm(dim=_keys(s), keepdim=True) + 1e-3)
        ),
        "standardised": lambda p, s, q: s.of(
            (s.data - s.data.mean(_keys(s), keepdim=True))
            / (s.data.std(_keys(s), keepdim=True) + 0.1)
        ),
        "less_mean_over_queries": lambda p, s, q: s.of(
            s.data - s.data.mean(_queries(s), keepdim=True)
        ),
        "less_maximum_over_queries": lambda p, s, q: s.of(
            s.data - s.data.amax(_queries(s), keepdim=True)
        ),
        "less_maximum_over_heads": lambda p, s, q: s.of(
            s.data - s.data.amax(_heads(s), keepdim=True)
        ),
        "rolled": lambda p, s, q: s.of(s.data.roll(1, _keys(s))),
        "flipped": lambda p, s, q: s.of(s.data.flip(_keys(s))),
        "cumulative": lambda p, s, q: s.of(s.data.cumsum(_keys(s))),
        "doubled_by_itself": lambda p, s, q: s.of(s.data + s.data.tanh()),
        "rounded": lambda p, s, q: s.of(s.data.round()),
        "clamped": lambda p, s, q: s.of(s.data.clamp(-0.5, 0.5)),
        "averaged_heads": lambda p, s, q: s.of(
            s.data.mean(_heads(s), keepdim=True).expand_as(s.data).clone()
        ),
        "softmax": lambda p, s, q: s.of(s.data.softmax(_keys(s)) * 4),
        "logarithm": lambda p, s, q: s.of((s.data.abs() + 1).log()),
    },
) + table(
    "raw_scores",
    {
        "symmetrised": lambda p, s, q: s.of(s.data + s.data.transpose(_queries(s), _keys(s))),
    },
    when=_self_attention,
)


def _masked_then_capped(p: Any, s: Laid, q: Laid) -> Laid:
    return s.of(4.0 * torch.tanh(s.data / 4.0))


def _has_mask(spec: Spec, chosen: Chosen) -> bool:
    return spec.mask != "none" or spec.padding


MASKED_SCORES = table(
    "masked_scores",
    {
        "capped": _masked_then_capped,
        "negated": lambda p, s, q: s.of(s.data.clamp(min=-1e9) * -1.0),
        "clamped": lambda p, s, q: s.of(s.data.clamp(min=-2.0)),
        "absolute": lambda p, s, q: s.of(s.data.clamp(min=-1e9).abs()),
        "softened": lambda p, s, q: s.of(s.data.clamp(min=-1e9) * 1e-9),
        "relu": lambda p, s, q: s.of(s.data.relu()),
    },
    when=_has_mask,
)


def _without_shape_change(spec: Spec, chosen: Chosen) -> bool:
    return spec.width == spec.value_width and not spec.cross


def _values_from_probabilities(p: Any, v: Laid, w: Laid) -> Laid:
    mixed = weighing._matmul(p, w, v).unfold(p.spec.heads)
    near = mixed.to("bxgne" if "x" in mixed.letters else "bhne")
    data = near.data.mean(2) if "x" in mixed.letters else near.data
    return Laid(data, "bxme" if "x" in mixed.letters else "bhme")


def _values_normalised(p: Any, v: Laid, w: Laid) -> Laid:
    whole = w.unfold(p.spec.heads).ungrouped().to("bhnm").data.sum((1, 2))
    if "f" in v.letters:  # every head of a row
        heads = p.spec.kv_heads if v.size("f") != p.spec.heads * whole.shape[0] else p.spec.heads
        return v.of(v.data * v.aligned(whole.repeat_interleave(heads, 0), "fm"))
    return v.of(v.data * v.aligned(whole, "bm"))


VALUES = table(
    "mixed_values", {"mixed_before": _values_from_probabilities}, when=_without_shape_change
) + table(
    "mixed_values",
    {"weighted_by_attention": _values_normalised},
    when=lambda s, c: not s.cross,
)


def _plus_values(p: Any, w: Laid, v: Laid) -> Laid:
    """The product with wrong operands: values transposed over tokens."""
    w, v = weighing.together(p, w, v)
    lead = "bxg" if "x" in v.letters else "bh"
    wide = w.to(lead + "mn").data  # queries are summed, keys stay
    right = v.to("bxme" if "x" in v.letters else "bhme").data
    return Laid(wide @ (right.unsqueeze(2) if "x" in v.letters else right), lead + "ne")


def _squared_map(p: Any, w: Laid, v: Laid) -> Laid:
    w, v = weighing.together(p, w, v)
    square = w.to("bxgnm" if "x" in v.letters else "bhnm")
    return weighing._matmul(p, square.of(square.data @ square.data), v)


MIXES = table("mix", {"over_queries": _plus_values, "squared_map": _squared_map},
               when=_self_attention)  # fmt: skip


BREAKING: tuple[Edit, ...] = (
    *SOFTMAXES,
    *PROBABILITIES,
    *RAW_SCORES,
    *MASKED_SCORES,
    *VALUES,
    *MIXES,
    *LEAKS,
    *OPERANDS,
)
"""Every breaking edit."""
