"""Contracts of the whole rewritten model: schedules with a cache, causality, padding, batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rewriter.ir.contract import ContractResult, judged
from rewriter.mixers.base import Mixer
from rewriter.passes.examples import Call, Examples
from rewriter.passes.realise.cache_probe import new_cache
from rewriter.passes.verify.compare import first_tensor, max_difference

BOUND = 1e-4
LENGTH = 24


def token_ids(examples: Examples, batch: int, length: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, examples.vocabulary, (batch, length), generator=generator)


def check_model(
    original: nn.Module, rewritten: nn.Module, examples: Examples, causal: bool
) -> Iterator[ContractResult]:
    """Contracts 3 and 4 on the rewritten model itself, for models that take token ids.

    Bounds are relative to the largest output, in the model's dtype (fp32: 1e-4).
    """
    if examples.tokens is None:
        detail = "the model does not take token ids"
        yield ContractResult(4, "whole model", "model", "not applicable", detail=detail)
        return
    ids = token_ids(examples, 2, LENGTH)
    full = _run(rewritten, ids, examples)
    scale = max(1.0, float(full.abs().max()))
    low = 200.0 if full.dtype in (torch.bfloat16, torch.float16) else 1.0
    bound = BOUND * low
    refused = undecodable(rewritten)
    if examples.cached and refused is not None:
        yield ContractResult(3, "logits with a cache", "model", "not applicable", detail=refused)
    elif examples.cached:
        for name, sizes in _splits().items():
            measured = max_difference(_cached(rewritten, ids, examples, sizes), full) / scale
            yield judged(
                3, f"logits with a cache, {name}, = full forward", "model", measured, bound
            )
    if causal:
        changed = ids.clone()
        changed[:, LENGTH // 2 :] = (changed[:, LENGTH // 2 :] + 1) % examples.vocabulary
        after = _run(rewritten, changed, examples)
        half = slice(0, LENGTH // 2)
        measured = max_difference(after[:, half], full[:, half]) / scale
        yield judged(4, "later tokens change no earlier output", "model", measured, bound / 10)
    measured = max_difference(_run(rewritten, ids[:1], examples), full[:1]) / scale
    yield judged(4, "batch rows are independent", "model", measured, bound)
    if examples.padded is not None:
        for side in ("left", "right"):
            ours = _padded_difference(rewritten, ids, examples, side) / scale
            theirs = _padded_difference(original, ids, examples, side) / scale
            detail = f"the original model itself: {theirs:.1e}"
            allowed = max(bound, 2 * theirs)
            yield judged(4, f"{side} padding changes nothing", "model", ours, allowed, detail)
    one = _run(rewritten, ids[:, :1], examples)
    finite = 0.0 if bool(torch.isfinite(one).all()) else float("inf")
    yield judged(4, "length 1 and unseen lengths run", "model", finite, 0.0)


def undecodable(rewritten: nn.Module) -> str | None:
    """Why a rewritten model cannot decode with a cache, or None."""
    for module in rewritten.modules():
        if isinstance(module, Mixer) and module.info.tier != "exact":
            reason = module.stateless()
            if reason is not None:
                return reason
    return None


def _splits() -> dict[str, list[int]]:
    return {
        "prefill then single tokens": [LENGTH - 8, *([1] * 8)],
        "three uneven chunks": [7, 1, LENGTH - 8],
        "token by token": [1] * LENGTH,
    }


def _run(model: nn.Module, ids: torch.Tensor, examples: Examples, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return first_tensor(model(**examples.with_tokens(ids), **_no_cache(model), **kwargs))


def _no_cache(model: nn.Module) -> dict[str, Any]:
    accepts = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if accepts else {}


def _cached(
    model: nn.Module, ids: torch.Tensor, examples: Examples, sizes: list[int]
) -> torch.Tensor:
    cache = new_cache(model)
    outs: list[torch.Tensor] = []
    at = 0
    with torch.no_grad():
        for size in sizes:
            part = ids[:, at : at + size]
            kwargs = examples.with_tokens(part)
            out = model(**kwargs, past_key_values=cache, use_cache=True)
            outs.append(first_tensor(out))
            at += size
    return torch.cat(outs, dim=1)


def _padded_difference(
    model: nn.Module, ids: torch.Tensor, examples: Examples, side: str, pads: int = 5
) -> float:
    """Outputs at real tokens, padded against unpadded, with positions as `generate` sets them."""
    filler = torch.zeros(ids.shape[0], pads, dtype=ids.dtype)
    ones = torch.ones_like(ids)
    order = [filler, ids] if side == "left" else [ids, filler]
    masks = [filler, ones] if side == "left" else [ones, filler]
    wide, mask = torch.cat(order, dim=1), torch.cat(masks, dim=1)
    kwargs: dict[str, Any] = {str(examples.padded): mask}
    if "position_ids" in inspect.signature(model.forward).parameters and side == "left":
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    kept = slice(pads, None) if side == "left" else slice(0, ids.shape[1])
    plain = _run(model, ids, examples, **{str(examples.padded): ones})
    return max_difference(_run(model, wide, examples, **kwargs)[:, kept], plain)


def run_call(model: nn.Module, call: Call) -> torch.Tensor:
    """First floating output of one example call, without gradients."""
    with torch.no_grad():
        return first_tensor(model(*call.args, **dict(call.kwargs)))
