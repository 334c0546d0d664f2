"""What the run-time terms of a site are to a kernel: key lengths, a bias, a sink, or none of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewriter.errors import UnsupportedError
from rewriter.ir.mask import Mask
from rewriter.ir.site import AttentionSite
from rewriter.mixers import terms as site_terms
from rewriter.mixers.base import Terms


@dataclass(frozen=True)
class Reading:
    """Inputs of a kernel besides q, k and v.

    Attributes:
        lengths: (B,) int32, keys of each row that are no padding, which is on the right.
        bias: (1|B, 1|H, 1|Nq, Nk), added to the scores.
        mask: what the kernel hides by itself where that is not the site's own mask.
    """

    lengths: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    mask: Mask | None = None


def read(
    site: AttentionSite, terms: Terms, seen: int, new: int, first: int | None, keys: int, batch: int
) -> Reading | str:
    """Read the terms of a call, or say why no kernel input expresses them.

    Args:
        seen, new, keys: earlier tokens, new ones, and keys at hand.
        first: the first key that one new token sees, where that is known.
        batch: rows.
    """
    roles = zip(terms, site.terms, strict=False)  # a caller without any gives none
    given = [t for t, role in roles if t is not None and role not in site_terms.NO_MASK]
    if not given:
        if site.has_bias:
            return "the bias is missing"
        if site.cross or masks_alone(site):
            return Reading()
        return "without its mask tensor nothing is hidden"
    if torch.compiler.is_compiling():
        return "the values of a mask are not known while a graph is made"
    if site.has_bias and new == 1:
        return "the bias of one token is left to the original"
    if "mask_and_bias" in site.terms and not site.causal_flag:
        whole = site_terms.whole(site, terms, keys)
        if whole is not None:
            return Reading(bias=whole, mask=Mask())
    if seen:
        if new == 1 and site_terms.all_visible(site, terms, first or 0, keys):
            return Reading()
        return "earlier tokens may be padding"
    try:
        if site.cross:
            valid, bias = site_terms.keys_seen(site, terms, keys)
            valid = valid if valid is None else valid.expand(batch, -1)
        else:
            split = site_terms.split(site, terms, 0, new).of_batch(batch)
            valid, bias = split.valid, split.bias
    except UnsupportedError as error:
        return str(error)
    if valid is None:
        return Reading(bias=bias)
    if on_the_right(valid):
        return Reading(valid.sum(-1, dtype=torch.int32), bias)
    return "the padding is not on the right"


def masks_alone(site: AttentionSite) -> bool:
    """Whether the site's predicate holds without a mask tensor, as `keep` runs it then."""
    flag = site.causal_flag or (site.kind == "causal" and site.spelling == "sdpa")
    return not site.mask.given and (flag or not site.mask.without_padding().atoms)


def on_the_right(valid: torch.Tensor) -> bool:
    """Whether all padding of (B, N) is at the end of each row."""
    steps = torch.arange(valid.shape[-1], device=valid.device)
    return bool((valid == (steps < valid.sum(-1, keepdim=True))).all())


def sinks_of(site: AttentionSite, terms: Terms) -> torch.Tensor | None:
    """(H,) float32: the logit of every head's sink, or None if it is not one number a head."""
    given = [t for t, role in zip(terms, site.terms, strict=False) if role == "sink"]
    if len(given) != 1 or given[0] is None:
        return None
    term = given[0][(None,) * (4 - given[0].dim())]
    sizes = zip(term.shape, term.stride(), strict=True)
    if any(size > 1 and stride for d, (size, stride) in enumerate(sizes) if d != 1):
        return None
    return term[0, :, 0, 0].float().expand(site.heads.query)
