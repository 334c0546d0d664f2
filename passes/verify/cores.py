"""Contracts of a core on random tensors: head map, schedules, causality, padding, limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from rewriter.ir.contract import ContractResult, judged
from rewriter.ir.site import AttentionSite
from rewriter.ir.state import State
from rewriter.mixers.base import Mixer
from rewriter.passes.verify.compare import max_difference

BOUND = 1e-4  # fp32, outputs of order one


@dataclass(frozen=True)
class Sample:
    """Random operands of a core: q (B, H, N, Dk), k (B, Hkv, N, Dk), v (B, Hkv, N, Dv), fp32."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None

    def cut(self, start: int, stop: int) -> Sample:
        bias = None if self.bias is None else self.bias[..., :stop]
        return Sample(
            self.q[:, :, start:stop], self.k[:, :, start:stop], self.v[:, :, start:stop], bias
        )


def sample(site: AttentionSite, tokens: int, batch: int = 2, seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    heads = site.heads
    # Logits of standard deviation two: neither uniform nor one-hot attention.
    width = (2.0 / (site.scale * heads.key_dim**0.5)) ** 0.5
    return Sample(
        normal(batch, heads.query, tokens, heads.key_dim) * width,
        normal(batch, heads.key_value, tokens, heads.key_dim) * width,
        normal(batch, heads.key_value, tokens, heads.value_dim),
        normal(1, heads.query, 1, tokens) if site.has_bias else None,
    )


def check_core(core: Mixer, subject: str) -> Iterator[ContractResult]:
    """All core-level contracts of one mixer instance, on the CPU in fp32, without gradients."""
    tokens = core.test_length()
    with torch.no_grad():
        data = sample(core.site, tokens)
        run = _runner(core)
        whole = run(data, None)
        yield _head_map(core, data, whole, run, subject)
        if core.site.mask.causal:
            yield from _schedules(core, data, whole, subject)
            yield _causality(data, whole, run, subject)
        yield from _padding(core, data, whole, run, subject)
        yield _batch(data, whole, run, subject)
        yield _masked_rows(data, run, subject)
        yield _length_one(core, run, subject)
        yield _limit(core, data, subject)


Run = Callable[[Sample, torch.Tensor | None], torch.Tensor]


def _runner(core: Mixer) -> Run:
    def run(data: Sample, valid: torch.Tensor | None) -> torch.Tensor:
        out, _ = core.mix(data.q, data.k, data.v, valid=valid, bias=data.bias, state=None)
        return out

    return run


def _head_map(
    core: Mixer, data: Sample, whole: torch.Tensor, run: Run, subject: str
) -> ContractResult:
    heads = core.site.heads
    worst = 0.0
    silent = 0
    for kv in range(heads.key_value):
        k, v = data.k.clone(), data.v.clone()
        k[:, kv] += 1.0
        v[:, kv] -= 1.0
        changed = (run(Sample(data.q, k, v, data.bias), None) - whole).abs().amax(dim=(0, 2, 3))
        mine = torch.arange(heads.query) // heads.group == kv
        if (~mine).any():
            worst = max(worst, float(changed[~mine].max()))
        silent += int((changed[mine] == 0).sum())
    detail = f"{silent} query heads ignore their key/value head" if silent else ""
    measured = float("inf") if silent else worst
    return judged(2, "query head h reads KV head h // group", subject, measured, BOUND, detail)


def _schedules(
    core: Mixer, data: Sample, whole: torch.Tensor, subject: str
) -> Iterator[ContractResult]:
    tokens = data.q.shape[2]
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
            part = data.cut(at, min(at + size, tokens))
            out, next_state = core.mix(
                part.q, part.k, part.v, valid=None, bias=part.bias, state=state
            )
            assert next_state is not None
            state = next_state
            outs.append(out)
            at += size
        measured = max_difference(torch.cat(outs, dim=2), whole[:, :, :stop])
        yield judged(3, name, subject, measured, BOUND)


def _fresh(core: Mixer, data: Sample) -> State:
    spec = core.state_spec(core.site, core.options)
    return spec.new(core.site, data.q.shape[0], data.v.dtype, data.v.device)


def _causality(data: Sample, whole: torch.Tensor, run: Run, subject: str) -> ContractResult:
    at = data.q.shape[2] // 2
    q, k, v = data.q.clone(), data.k.clone(), data.v.clone()
    for tensor in (q, k, v):
        tensor[:, :, at:] += 3.0
    after = run(Sample(q, k, v, data.bias), None)
    measured = max_difference(after[:, :, :at], whole[:, :, :at])
    return judged(4, "later tokens change nothing earlier", subject, measured, 1e-6)


def _padding(
    core: Mixer, data: Sample, whole: torch.Tensor, run: Run, subject: str
) -> Iterator[ContractResult]:
    pads = 5
    tokens = data.q.shape[2]
    valid = torch.ones(data.q.shape[0], tokens + pads, dtype=torch.bool)
    sides = {"left": (slice(pads, None), (pads, 0)), "right": (slice(tokens), (0, pads))}
    for side, (kept, widths) in sides.items():
        mask = valid.clone()
        mask[:, :pads] = side != "left"
        mask[:, tokens:] = mask[:, tokens:] & (side != "right")

        def padded(x: torch.Tensor, widths: tuple[int, int] = widths) -> torch.Tensor:
            return F.pad(x, (0, 0, *widths), value=7.0)

        bias = None if data.bias is None else F.pad(data.bias, widths)
        wide = Sample(padded(data.q), padded(data.k), padded(data.v), bias)
        measured = max_difference(run(wide, mask)[:, :, kept], whole)
        yield judged(4, f"{side} padding changes nothing", subject, measured, BOUND)


def _batch(data: Sample, whole: torch.Tensor, run: Run, subject: str) -> ContractResult:
    alone = run(Sample(data.q[:1], data.k[:1], data.v[:1], data.bias), None)
    measured = max_difference(alone, whole[:1])
    return judged(4, "batch rows are independent", subject, measured, 1e-5)


def _masked_rows(data: Sample, run: Run, subject: str) -> ContractResult:
    none = torch.zeros(data.q.shape[0], data.q.shape[2], dtype=torch.bool)
    out = run(data, none)
    measured = float(out.abs().max()) if bool(torch.isfinite(out).all()) else float("inf")
    return judged(4, "fully masked rows give 0", subject, measured, 0.0)


def _length_one(core: Mixer, run: Run, subject: str) -> ContractResult:
    data = sample(core.site, 1, seed=1)
    expected = data.v.repeat_interleave(core.site.heads.group, dim=1)
    measured = max_difference(run(data, None), expected)
    return judged(4, "one token attends to itself", subject, measured, BOUND)


def _limit(core: Mixer, data: Sample, subject: str) -> ContractResult:
    tokens = data.q.shape[2]
    options = core.limit_options(core.options, tokens)
    check = "limit case equals full softmax"
    if options is None:
        detail = f"{core.info.name} has no setting that is full softmax attention"
        return ContractResult(5, check, subject, "not applicable", detail=detail)
    wide = type(core)(core.site, options, None)
    wide.load_state_dict(core.state_dict())
    out, _ = wide.mix(data.q, data.k, data.v, valid=None, bias=data.bias, state=None)
    return judged(5, check, subject, max_difference(out, dense_softmax(core.site, data)), BOUND)


def dense_softmax(site: AttentionSite, data: Sample) -> torch.Tensor:
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
