"""Spellings by the fused attention operator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rewriter.passes.fuzz.edit import Chosen, Edit
from rewriter.passes.fuzz.laid import Laid, Tensor
from rewriter.passes.fuzz.masking import spread
from rewriter.passes.fuzz.spec import Spec


def fits(spec: Spec) -> bool:
    """Whether the operator can express the spec at all."""
    return spec.softcap is None and not spec.sinks


def attend(p: Any, q: Laid, k: Laid, v: Laid, padding: Tensor | None, how: str) -> Laid:
    """The whole core as one call: `how` says in which form the mask is given."""
    q, k, v = (t.unfold(p.spec.heads) for t in (q, k, v))
    n, m = q.size("n"), k.size("m")
    like = Laid(q.data.new_empty(1, 1, 1, 1), "bhnm")
    mask: Tensor | None = None
    if p.spec.mask != "none" and how != "flag":
        mask = spread(p, like, p.use("structure")(p, n, m), "nm")
    if padding is not None:
        kept = spread(p, like, p.use("padding")(p, padding), "bm")
        mask = kept if mask is None else mask & kept
    if mask is not None and how == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    if p.spec.position == "alibi":
        bias = spread(p, like, p.use("alibi")(p, n, m), "hnm")
        if mask is None:
            mask = bias
        else:
            mask = bias.masked_fill(~mask, -torch.inf) if how != "float" else bias + mask
    plain = p.spec.scale == p.spec.width**-0.5
    out = F.scaled_dot_product_attention(
        q.to("bhnd").data,
        k.to("bxmd" if "x" in k.letters else "bhmd").data,
        v.to("bxme" if "x" in v.letters else "bhme").data,
        attn_mask=mask,
        dropout_p=p.spec.dropout if p.training else 0.0,
        is_causal=how == "flag",
        scale=None if plain else p.spec.scale,
        enable_gqa="x" in k.letters,
    )
    return Laid(out, "bhne")


def _causal_only(spec: Spec, chosen: Chosen) -> bool:
    return fits(spec) and spec.mask == "causal" and not spec.padding and spec.position != "alibi"


FUSED = (
    Edit("fused", "no", lambda: None),
    Edit("fused", "bool", lambda: None, lambda s, c: fits(s)),
    Edit("fused", "float", lambda: None, lambda s, c: fits(s)),
    Edit("fused", "flag", lambda: None, _causal_only),
)

GROUPS = (
    Edit("gqa", "repeat", lambda: None),
    Edit("gqa", "flag", lambda: None, lambda s, c: s.group > 1),
)
