"""Contracts of the whole rewritten model: schedules with a cache, causality, padding, batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from rewriter.ir.contract import ContractResult, judged
from rewriter.mixers.base import Mixer
from rewriter.passes.compare import first_tensor, max_difference
from rewriter.passes.examples import Call, Examples
from rewriter.passes.realise.cache_probe import new_cache
from rewriter.passes.verify.exact import HALF

BOUND = 1e-4
LENGTH = 24


def token_ids(examples: Examples, batch: int, length: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, examples.vocabulary, (batch, length), generator=generator)


def check_model(
    original: nn.Module, rewritten: nn.Module, examples: Examples, causal: bool
) -> Iterator[ContractResult]:
    """Contracts 3 and 4 on the rewritten model itself, for models that take token ids.

    Bounds are relative to the largest output: 1e-4 in fp32, 2e-2 in half precision. A deep model
    in half precision is not equal to itself under another schedule, and some models see padding:
    there the bound is twice what the original itself shows, where that is more.
    """
    if examples.tokens is None:
        detail = "the model does not take token ids"
        yield ContractResult(4, "whole model", "model", "not applicable", detail=detail)
        return
    ids = token_ids(examples, 2, LENGTH)
    full = _run(rewritten, ids, examples)
    scale = max(1.0, float(full.abs().max()))
    half = full.dtype in HALF
    bound = BOUND * (200.0 if half else 1.0)

    def judge(
        number: int, check: str, ours: float, own: float | None, bound: float
    ) -> ContractResult:
        if own is None:
            return judged(number, check, "model", ours / scale, bound)
        detail = f"the original model itself: {own / scale:.1e}"
        return judged(number, check, "model", ours / scale, max(bound, 2 * own / scale), detail)

    theirs = _run(original, ids, examples) if half else None

    def rounding(measure: Callable[[nn.Module, torch.Tensor], float]) -> float | None:
        return None if theirs is None else measure(original, theirs)

    refused = undecodable(rewritten)
    if examples.cached and refused is not None:
        yield ContractResult(3, "logits with a cache", "model", "not applicable", detail=refused)
    elif examples.cached:
        drift = partial(_drift, ids=ids, examples=examples)
        own = rounding(lambda model, plain: max(drift(model, plain).values()))
        for name, measured in drift(rewritten, full).items():
            check = f"logits with a cache, {name}, = full forward"
            yield judge(3, check, measured, own, bound)
    if causal:
        leak = partial(_leak, ids=ids, examples=examples)
        check = "later tokens change no earlier output"
        yield judge(4, check, leak(rewritten, full), rounding(leak), bound / 10)
    mixed = partial(_batch_difference, ids=ids, examples=examples)
    check = "batch rows are independent"
    yield judge(4, check, mixed(rewritten, full), rounding(mixed), bound)
    if examples.padded is not None:
        for side in ("left", "right"):
            seen = partial(_padded_difference, ids=ids, examples=examples, side=side)
            check = f"{side} padding changes nothing"
            yield judge(4, check, seen(rewritten), seen(original), bound)
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


def _drift(
    model: nn.Module, full: torch.Tensor, ids: torch.Tensor, examples: Examples
) -> dict[str, float]:
    """Largest difference of logits, cached against full, by schedule."""
    return {
        name: max_difference(_cached(model, ids, examples, sizes), full)
        for name, sizes in _splits().items()
    }


def _leak(model: nn.Module, full: torch.Tensor, ids: torch.Tensor, examples: Examples) -> float:
    """How far changing the second half of the tokens moves the outputs of the first."""
    changed = ids.clone()
    changed[:, LENGTH // 2 :] = (changed[:, LENGTH // 2 :] + 1) % examples.vocabulary
    first = slice(0, LENGTH // 2)
    return max_difference(_run(model, changed, examples)[:, first], full[:, first])


def _batch_difference(
    model: nn.Module, full: torch.Tensor, ids: torch.Tensor, examples: Examples
) -> float:
    return max_difference(_run(model, ids[:1], examples), full[:1])


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
