"""Contract 10: the measured length at which the new core overtakes the one it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from rewriter.ir.contract import ContractResult
from rewriter.ir.site import AttentionSite
from rewriter.mixers.base import Mixer, Terms
from rewriter.mixers.tokens import Tokens
from rewriter.passes.verify.cores import sample, sample_terms
from rewriter.timing import interleaved

LENGTHS = (256, 1024, 4096)


def original_core(site: AttentionSite, data: Tokens) -> Callable[[], torch.Tensor]:
    """The site's softmax core as torch's fused attention, the way unpadded calls run it."""
    k = data.k.repeat_interleave(site.heads.group, dim=1)
    v = data.v.repeat_interleave(site.heads.group, dim=1)
    causal = site.mask.causal

    def run() -> torch.Tensor:
        return F.scaled_dot_product_attention(data.q, k, v, is_causal=causal, scale=site.scale)

    return run


def _reads_terms(core: Mixer) -> bool:
    """Whether a call without mask tensors, as SDPA's flag allows, is another attention."""
    site = core.site
    brought = site.spelling == "eager" or site.has_bias or site.sinks
    return core.info.tier == "exact" and brought


def check_speed(
    core: Mixer, subject: str, wanted: int | None, forced: bool
) -> Iterator[ContractResult]:
    """Time the core against fused softmax attention at a few lengths, batch 1, this device.

    Args:
        wanted: length in tokens at which the rewrite must not be slower, or None to only report.
        forced: report instead of fail.
    """
    crossover: int | None = None
    figures: list[str] = []
    at_wanted: float | None = None
    lengths = sorted({*LENGTHS, *([wanted] if wanted is not None else [])})
    for tokens in lengths:
        data = sample(core.site, tokens, batch=1)

        terms = sample_terms(core.site, data) if _reads_terms(core) else ()

        def run(data: Tokens = data, terms: Terms = terms) -> object:
            if core.info.tier == "exact":
                return core(data.q, data.k, data.v, terms)
            return core.mix(data)

        with torch.no_grad():
            contenders: dict[str, Callable[[], object]] = {
                "core": run,
                "original": original_core(core.site, data),
            }
            times = interleaved(contenders, seconds=0.0, rounds=(3, 3))
        ratio = times["original"].median / times["core"].median
        figures.append(f"{tokens}: {ratio:.2f}x")
        if ratio >= 1.0 and crossover is None:
            crossover = tokens
        if tokens == wanted:
            at_wanted = ratio
    detail = "speed-up over fused softmax by length: " + ", ".join(figures)
    measured = float("inf") if crossover is None else float(crossover)
    yield ContractResult(
        10, "crossover length (tokens)", subject, "reported", measured, detail=detail
    )
    if wanted is not None and at_wanted is not None:
        slower = at_wanted < 1.0 and not forced
        yield ContractResult(
            10,
            f"not slower at {wanted} tokens",
            subject,
            "fail" if slower else "pass",
            1.0 / at_wanted,
            1.0,
        )
