"""Contracts of a core on random tensors: head map, schedules, causality, padding, limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from rewriter.ir.contract import ContractResult, judged
from rewriter.ir.site import AddTerm, AttentionSite, FillTerm, TermRole
from rewriter.ir.state import State
from rewriter.mixers.base import Mixer, Terms
from rewriter.mixers.tokens import Tokens
from rewriter.passes.compare import max_difference

BOUND = 1e-4  # fp32, outputs of order one


def sample(site: AttentionSite, tokens: int, batch: int = 2, seed: int = 0) -> Tokens:
    """Random operands of a core, fp32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    heads = site.heads
    # Logits of standard deviation two: neither uniform nor one-hot attention.
    width = (2.0 / (site.scale * heads.key_dim**0.5)) ** 0.5
    return Tokens(
        normal(batch, heads.query, tokens, heads.key_dim) * width,
        normal(batch, heads.key_value, tokens, heads.key_dim) * width,
        normal(batch, heads.key_value, tokens, heads.value_dim),
        hidden=normal(batch, tokens, site.hidden_dim) if site.hidden_dim else None,
        bias=normal(1, heads.query, 1, tokens) if site.has_bias else None,
    )


def sample_terms(site: AttentionSite, data: Tokens) -> Terms:
    """The mask and bias tensors that a call without padding brings, as the site's steps read them.

    Learned sinks are logits of 0; a learned factor of the scores is absent.
    """
    steps = torch.arange(data.count)
    shown = site.mask.dense(steps, steps)[None, None]

    def term(index: int, role: TermRole) -> torch.Tensor | None:
        if role == "sink":
            return torch.zeros(1, site.heads.query, 1, 1)
        fill = next((s for s in site.score if isinstance(s, FillTerm) and s.index == index), None)
        if fill is not None:
            return shown if fill.keep else ~shown
        if role == "bias" or not any(
            isinstance(s, AddTerm) and s.index == index for s in site.score
        ):
            return data.bias
        hiding = torch.zeros(shown.shape).masked_fill(~shown, -torch.inf)
        return hiding if role == "mask" or data.bias is None else hiding + data.bias

    roles = enumerate(site.terms)
    return tuple(None if role in ("none", "temperature") else term(i, role) for i, role in roles)


def check_core(core: Mixer, subject: str) -> Iterator[ContractResult]:
    """All core-level contracts of one mixer instance, on the CPU in fp32, without gradients."""
    with torch.no_grad():
        data = sample(core.site, core.test_length())
        whole, _ = core.mix(data)
        yield _head_map(core, data, whole, subject)
        if core.site.mask.causal:
            yield from _schedules(core, data, whole, subject)
            yield _causality(core, data, whole, subject)
        yield from _padding(core, data, whole, subject)
        yield _batch(core, data, whole, subject)
        yield _masked_rows(core, data, subject)
        yield _length_one(core, subject)
        yield _limit(core, data, subject)


def _head_map(core: Mixer, data: Tokens, whole: torch.Tensor, subject: str) -> ContractResult:
    check = "query head h reads KV head h // group"
    if not core.reads_keys:
        detail = f"{core.info.name} reads no keys"
        return ContractResult(2, check, subject, "not applicable", detail=detail)
    heads = core.site.heads
    worst = 0.0
    silent = 0
    for kv in range(heads.key_value):
        k, v = data.k.clone(), data.v.clone()
        k[:, kv] += 1.0
        v[:, kv] -= 1.0
        changed = (core.mix(replace(data, k=k, v=v))[0] - whole).abs().amax(dim=(0, 2, 3))
        mine = torch.arange(heads.query) // heads.group == kv
        if (~mine).any():
            worst = max(worst, float(changed[~mine].max()))
        silent += int((changed[mine] == 0).sum())
    detail = f"{silent} query heads ignore their key/value head" if silent else ""
    measured = float("inf") if silent else worst
    return judged(2, check, subject, measured, BOUND, detail)


def _schedules(
    core: Mixer, data: Tokens, whole: torch.Tensor, subject: str
) -> Iterator[ContractResult]:
    tokens = data.count
    plans = {
        "prefill + decode = full": [tokens - 12, *([1] * 12)],
        "chunks of uneven length = full": [tokens // 3, 1, tokens // 4, 7],
        "token by token from the start = full": [1] * min(tokens, 48),
    }
    for name, sizes in plans.items():
        stop = min(sum(sizes), tokens)
        state = _fresh(core, data)
        outs, at = [], 0
        for size in sizes:
            piece = replace(data.cut(at, min(at + size, tokens)), state=state)
            out, next_state = core.mix(piece)
            assert next_state is not None
            state = next_state
            outs.append(out)
            at += size
        measured = max_difference(torch.cat(outs, dim=2), whole[:, :, :stop])
        yield judged(3, name, subject, measured, BOUND)


def _fresh(core: Mixer, data: Tokens) -> State:
    spec = core.state_spec(core.site, core.options)
    return spec.new(core.site, data.batch, data.v.dtype, data.v.device)


def _causality(core: Mixer, data: Tokens, whole: torch.Tensor, subject: str) -> ContractResult:
    at = data.count // 2

    def later(x: torch.Tensor, dim: int) -> torch.Tensor:
        steps = (torch.arange(x.shape[dim]) >= at).float()
        return x + 3.0 * steps.view([-1 if d == dim else 1 for d in range(x.dim())])

    hidden = None if data.hidden is None else later(data.hidden, 1)
    changed = replace(
        data, q=later(data.q, 2), k=later(data.k, 2), v=later(data.v, 2), hidden=hidden
    )
    measured = max_difference(core.mix(changed)[0][:, :, :at], whole[:, :, :at])
    return judged(4, "later tokens change nothing earlier", subject, measured, 1e-6)


def _padding(
    core: Mixer, data: Tokens, whole: torch.Tensor, subject: str
) -> Iterator[ContractResult]:
    pads, tokens = 5, data.count
    for side, widths in {"left": (pads, 0), "right": (0, pads)}.items():
        out, _ = core.mix(data.padded(*widths, value=7.0))
        measured = max_difference(out[:, :, widths[0] : widths[0] + tokens], whole)
        yield judged(4, f"{side} padding changes nothing", subject, measured, BOUND)


def _batch(core: Mixer, data: Tokens, whole: torch.Tensor, subject: str) -> ContractResult:
    alone, _ = core.mix(data.rows(slice(1)))
    measured = max_difference(alone, whole[:1])
    return judged(4, "batch rows are independent", subject, measured, 1e-5)


def _masked_rows(core: Mixer, data: Tokens, subject: str) -> ContractResult:
    none = torch.zeros(data.batch, data.count, dtype=torch.bool)
    out, _ = core.mix(replace(data, valid=none))
    measured = float(out.abs().max()) if bool(torch.isfinite(out).all()) else float("inf")
    return judged(4, "fully masked rows give 0", subject, measured, 0.0)


def _length_one(core: Mixer, subject: str) -> ContractResult:
    if not core.averages:
        check = "one token attends to itself"
        detail = f"an output of {core.info.name} is not a mean of values"
        return ContractResult(4, check, subject, "not applicable", detail=detail)
    data = sample(core.site, 1, seed=1)
    expected = data.v.repeat_interleave(core.site.heads.group, dim=1)
    measured = max_difference(core.mix(data)[0], expected)
    return judged(4, "one token attends to itself", subject, measured, BOUND)


def _limit(core: Mixer, data: Tokens, subject: str) -> ContractResult:
    tokens = data.q.shape[2]
    options = core.limit_options(core.options, tokens)
    check = "limit case equals full softmax"
    if options is None:
        detail = f"{core.info.name} has no setting that is full softmax attention"
        return ContractResult(5, check, subject, "not applicable", detail=detail)
    wide = type(core)(core.site, options, None)
    wide.load_state_dict(core.state_dict())
    out, _ = wide.mix(data)
    return judged(5, check, subject, max_difference(out, dense_softmax(core.site, data)), BOUND)


def dense_softmax(site: AttentionSite, data: Tokens) -> torch.Tensor:
    """The site's attention, written out over all pairs in fp64: the oracle of the limit cases."""
    tokens = data.q.shape[2]
    k = data.k.double().repeat_interleave(site.heads.group, dim=1)
    v = data.v.double().repeat_interleave(site.heads.group, dim=1)
    scores = data.q.double() @ k.transpose(-1, -2) * site.scale
    if site.softcap is not None:
        scores = site.softcap * torch.tanh(scores / site.softcap)
    if data.bias is not None:
        scores = scores + data.bias
    positions = torch.arange(tokens)
    allowed = site.mask.without_padding().dense(positions, positions)
    scores = scores.masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ v).float()
