"""What the attention of each head does on a probe: the cheapest hints at what it can lose.

A probe is a passage, other text and the passage again. One forward of the original gives, for every
query head, how peaked its weights are, how much of their mass a window would keep, how far its
logits spread, and how much it looks from a repeated token to what followed the first time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.evaluate.scoring import logits_of
from rewriter.ir.site import AttentionSite
from rewriter.planner.space import SearchSpace


@dataclass(frozen=True)
class HeadStatistics:
    """Of one query head, means over the queries.

    Attributes:
        entropy: of the weights, in nats.
        near: mass on the window and the sinks.
        spread: standard deviation of the logits that a query sees.
        retrieval: weight of a repeated token on the token behind its first occurrence.
    """

    entropy: float
    near: float
    spread: float
    retrieval: float


def head_statistics(
    site: AttentionSite, q: Tensor, k: Tensor, passage: int, window: int, sinks: int
) -> list[HeadStatistics]:
    """Of all query heads of a causal site on one probe row.

    Args:
        q, k: (1, H, N, Dk) and (1, Hkv, N, Dk), as the core receives them.
        passage: tokens that are repeated at the end.
        window, sinks: of the mask whose mass is `near`.
    """
    n = q.shape[-2]
    at = torch.arange(n)
    seen = site.mask.without_padding().dense(at, at)
    near = seen & ((at[:, None] - at < window) | (at < sinks))
    counts = seen.sum(-1).clamp_min(1)
    repeats = torch.arange(n - passage, n - 1)
    behind = repeats - (n - passage) + 1
    out = []
    for head in range(q.shape[1]):
        logits = q[0, head].float() @ k[0, head // site.heads.group].float().mT * site.scale
        if site.softcap is not None:
            logits = site.softcap * torch.tanh(logits / site.softcap)
        shown = torch.where(seen, logits, 0.0)
        mean = shown.sum(-1) / counts
        variance = (torch.where(seen, logits - mean[:, None], 0.0) ** 2).sum(-1) / counts
        log_weights = logits.masked_fill(~seen, -torch.inf).log_softmax(-1)
        weights = log_weights.exp()
        entropy = -(weights * torch.where(seen, log_weights, 0.0)).sum(-1)
        out.append(
            HeadStatistics(
                entropy=float(entropy.mean()),
                near=float((weights * near).sum(-1).mean()),
                spread=float(variance.sqrt().mean()),
                retrieval=float(weights[repeats, behind].mean()),
            )
        )
    return out


def block_similarities(model: nn.Module, space: SearchSpace, rows: Tensor) -> list[float | None]:
    """cos(x, x + attention(x)) of the residual stream at every site, mean over tokens.

    The stream is what the module around the owner reads; None where that has no tensor of the
    shape of the owner's output. Catalogue other.md E.3 (block_similarity).
    """
    streams: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def first(values: Any) -> Tensor | None:
        items = values if isinstance(values, tuple | list) else (values,)
        return next((x for x in items if isinstance(x, Tensor) and x.dim() == 3), None)

    def reads(fqn: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            found = first((*args, *kwargs.values()))
            if found is not None:
                streams[fqn] = found.detach()

        return hook

    def gives(fqn: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found = first(output)
            if found is not None:
                outputs[fqn] = found.detach()

        return hook

    handles = []
    for site in space.sites:
        if "." in site.fqn:
            parent = model.get_submodule(site.fqn.rsplit(".", 1)[0])
            handles.append(parent.register_forward_pre_hook(reads(site.fqn), with_kwargs=True))
        handles.append(model.get_submodule(site.fqn).register_forward_hook(gives(site.fqn)))
    try:
        with torch.no_grad():
            logits_of(model, rows)
    finally:
        for handle in handles:
            handle.remove()
    return [_similarity(streams.get(s.fqn), outputs.get(s.fqn)) for s in space.sites]


def _similarity(stream: Tensor | None, output: Tensor | None) -> float | None:
    if stream is None or output is None or stream.shape != output.shape:
        return None
    before = stream.float()
    return float(F.cosine_similarity(before, before + output.float(), dim=-1).mean())


def windows_of(options: Sequence[Any]) -> tuple[int, int]:
    """Window and sinks of the first options that have them, else 64 and 4."""
    for given in options:
        if "window" in given:
            return int(given["window"]), int(given.get("sinks", 0))
    return 64, 4
