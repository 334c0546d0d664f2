"""Losses on attention weights: a student's rows of the map against the teacher's.

The student's core is called with the teacher's own queries, keys and masks, since stage 1 trains
the cores alone. So the teacher's weights are the softmax of the same tokens. A few query rows of
both maps are held at a time, and their gradients are taken before the next ones are made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rewriter.distill.config import AttentionLoss
from rewriter.errors import UsageError
from rewriter.ir.site import AttentionSite
from rewriter.mixers.base import Mixer
from rewriter.mixers.tokens import Tokens

FLOOR = 1e-12


def check_attention(core: Mixer) -> None:
    """Raises:
    UsageError: the mixer has no weights to state, or the original's are not a softmax.
    """
    if type(core).attention_rows is Mixer.attention_rows:
        raise UsageError(
            f"'{core.site.fqn}': {core.info.name} does not state its attention weights, so it "
            "cannot learn from the teacher's: leave out 'attention' of the stage 'layers'."
        )
    if core.site.normaliser != "softmax":
        raise UsageError(
            f"'{core.site.fqn}' normalises by {core.site.normaliser}, and losses on attention "
            "weights are for a softmax: leave out 'attention' of the stage 'layers'."
        )


def softmax_rows(site: AttentionSite, x: Tokens, queries: slice) -> Tensor:
    """The original's attention weights of some queries, (B, H, queries, n) float32.

    Rows of padding, and rows that see nothing, are 0.
    """
    keys = x.k.float().repeat_interleave(site.heads.group, 1)
    logits = x.q[:, :, queries].float() @ keys.transpose(-1, -2) * site.scale
    if site.softcap is not None:
        logits = site.softcap * torch.tanh(logits / site.softcap)
    if x.bias is not None:
        rows = queries if x.bias.shape[2] > 1 else slice(None)
        logits = logits + x.bias[:, :, rows].float()
    at = torch.arange(x.count, device=x.q.device)
    seen = site.mask.dense(at[queries], at, x.valid)
    if x.valid is not None:
        seen = seen & x.valid[:, None, queries, None]
    top = logits.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weight = (logits - top).masked_fill(~seen, -torch.inf).exp()
    mass = weight.sum(-1, keepdim=True)
    return weight / torch.where(mass > 0, mass, 1.0)


def drawn(count: int, rows: int, some: int | None) -> list[slice]:
    """Blocks of at most `rows` of `count` queries: all of them, or disjoint ones at random.

    Args:
        some: about how many queries, or None for all. Drawn from torch's generator.
    """
    starts = list(range(0, count, rows))
    if some is not None and some < count:
        late = int(torch.randint(min(rows, count), ()))  # blocks begin anywhere, not at multiples
        starts = [0, *range(late, count, rows)] if late else starts
        order = torch.randperm(len(starts))[: -(-some // rows)].sort().values
        chosen = [starts[i] for i in order.tolist()]
    else:
        chosen = starts
    ends = dict(zip(starts, [*starts[1:], count], strict=True))
    return [slice(start, ends[start]) for start in chosen]


def attention_losses(
    core: Mixer, x: Tokens, kind: AttentionLoss, rows: int, some: int | None = None
) -> Iterator[Tensor]:
    """Parts whose sum is the loss of one core; run backward on each before asking for the next.

    'cross_entropy' is the mean over queries and heads of -sum_j A_ij log M_ij (Hedgehog), in nats;
    it never falls below the entropy of the teacher's rows. 'frobenius' is the mean over queries
    and heads of sum_j (M_ij - A_ij)^2: the squared distance of the matrices over their rows
    (matrix orientation of MOHAWK, which takes the root of it). A is the teacher's map and M the
    student's; queries at padding do not count.

    Args:
        core: the student's.
        x: what it is given, from the start of the sequences.
        kind: which loss.
        rows: queries whose weights are held at once.
        some: about how many queries are drawn at random, or None for all.
    """
    blocks = drawn(x.count, rows, some)
    valid = x.batch * sum(b.stop - b.start for b in blocks)
    if x.valid is not None:
        valid = max(1, sum(int(x.valid[:, block].sum()) for block in blocks))
    count = valid * x.q.shape[1]
    causal = core.site.kind == "causal"
    for queries in blocks:
        seen = x.cut(0, queries.stop) if causal else x  # later keys have no weight
        with torch.no_grad():
            target = softmax_rows(core.site, seen, queries)
        out = core.attention_rows(seen, queries)
        if kind == "cross_entropy":
            yield -(target * out.clamp_min(FLOOR).log()).sum() / count
        else:
            yield (out - target).square().sum() / count
