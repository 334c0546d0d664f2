"""Reasons that several mixers share for not serving a site."""

from __future__ import annotations

from rewriter.ir.mask import Causal, KeyPadding
from rewriter.ir.site import AttentionSite


def sees_everything(name: str, site: AttentionSite) -> str | None:
    """Why a mixer with a state over all earlier keys cannot serve the site, or None.

    A softcap is no reason: such a mixer has other weights anyway, and learns the capped ones.
    """
    if site.has_bias:
        return f"{name} has no form for an additive bias of the scores (ALiBi or relative)"
    for atom in site.mask.atoms:
        if not isinstance(atom, Causal | KeyPadding):
            return f"{name} would see keys that the model hides from itself ({atom.name} mask)"
    return None


def plain_scores(name: str, site: AttentionSite) -> str | None:
    """As `sees_everything`, for a mixer that reads the scores themselves and cannot cap them."""
    reason = sees_everything(name, site)
    if reason is None and site.softcap is not None:
        return f"{name} has no form for a softcap of the scores"
    return reason
