"""Breaking edits of masks and operands: attention still, mostly, but another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rewriter.passes.fuzz import masking, scoring
from rewriter.passes.fuzz.edit import Edit, table
from rewriter.passes.fuzz.laid import Laid, Tensor


def _keys(t: Laid) -> int:
    return t.dim("m")


def _queries(t: Laid) -> int:
    return t.dim("n")


def _self_attention(spec: Any, chosen: Any) -> bool:
    return not spec.cross


def _leaking(p: Any, s: Laid, padding: Tensor | None, change: Callable[..., Tensor]) -> Laid:
    i, j = torch.arange(s.size("n"))[:, None], torch.arange(s.size("m"))[None, :]
    seen = masking.spread(p, s, change(i, j), "nm")
    if padding is not None:
        seen = seen & masking.spread(p, s, padding.bool(), "bm")
    return s.of(s.data.masked_fill(~seen, -torch.inf))


_LEAKS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "one_ahead": lambda p, i, j: j <= i + 1,
    "reversed": lambda p, i, j: (j >= i) | (j == 0),
    "strict": lambda p, i, j: (j < i) | (j == 0),
    "hole": lambda p, i, j: (j <= i) & ~((i == 9) & (j == 4)),
    "stride": lambda p, i, j: (j <= i) & ((i - j) % 2 == 0),
    "every_third_sees_all": lambda p, i, j: (j <= i) | (i % 3 == 2),
    "first_sees_all": lambda p, i, j: (j <= i) | (j == 5),
    "window_and_first": lambda p, i, j: (j <= i) & ((i - j < 3) | (j < 1)),
    "prefix": lambda p, i, j: (j <= i) | (j < 4),
    "dilated": lambda p, i, j: ((i - j).abs() % 3 == 0) | (i == j),
    "late_leak": lambda p, i, j: (j <= i) | ((i >= 15) & (j < 17)),
    "only_far": lambda p, i, j: (j <= i) & ((i - j >= 4) | (i == j)),
    "no_diagonal": lambda p, i, j: i != j,
}

LEAKS = tuple(
    Edit(
        "mask",
        f"leak_{name}",
        lambda p, s, padding, change=change: _leaking(p, s, padding, lambda i, j: change(p, i, j)),
        lambda s, c: not s.cross and s.mask in ("causal", "none"),
        "truthful",
    )
    for name, change in _LEAKS.items()
) + table(
    "mask",
    {
        "weak_fill": lambda p, s, padding: s.of(
            s.data.masked_fill(
                masking.spread(
                    p, s, torch.arange(s.size("m"))[None] > torch.arange(s.size("n"))[:, None], "nm"
                ),
                -1.0,
            )
        ),
        "zero_fill": lambda p, s, padding: s.of(
            torch.where(
                masking.spread(
                    p, s, torch.arange(s.size("m"))[None] > torch.arange(s.size("n"))[:, None], "nm"
                ),
                0.0,
                s.data,
            )
        ),
        "positive_fill": lambda p, s, padding: s.of(
            s.data.masked_fill(
                masking.spread(
                    p, s, torch.arange(s.size("m"))[None] > torch.arange(s.size("n"))[:, None], "nm"
                ),
                1e4,
            )
        ),
        "random": lambda p, s, padding: s.of(
            s.data.masked_fill(torch.rand_like(s.data) < 0.3, -1e9)
        ),
        "noise": lambda p, s, padding: s.of(s.data - (-torch.rand_like(s.data).log()).log()),
        "from_queries": lambda p, s, padding: s.of(s.data + s.data.detach().cumsum(_keys(s)) * 0.1),
    },
    when=lambda s, c: s.mask in ("causal", "none") and not s.padding,
)


def _swapped(p: Any, q: Laid, k: Laid, v: Laid) -> tuple[Laid, Laid, Laid]:
    return q, Laid(v.data, v.letters.replace("e", "d")), Laid(k.data, k.letters.replace("d", "e"))


def _tiled(p: Any, t: Laid) -> Laid:
    times = [1] * t.data.dim()
    times[t.dim("x")] = p.spec.group
    return scoring._as_heads(t, t.data.repeat(times))


def _query_for_key(p: Any, q: Laid, k: Laid, v: Laid) -> tuple[Laid, Laid, Laid]:
    return q, Laid(q.data, q.letters.replace("n", "m")), v


def _post_scaled(p: Any, s: Laid, q: Laid) -> Laid:
    return s.of(s.data * 2.0)


OPERANDS = (
    Edit("operands", "keys_and_values_swapped", _swapped,
         lambda s, c: s.width == s.value_width, "truthful"),
    Edit("operands", "keys_are_queries", _query_for_key,
         lambda s, c: s.group == 1 and not s.cross, "truthful"),
    Edit("repeat", "tiled", _tiled, lambda s, c: 1 < s.kv_heads < s.heads, "truthful"),
    Edit("masked_scores", "scaled_late", _post_scaled, effect="truthful"),
    Edit("masked_scores", "scaled_after_cap", _post_scaled,
         lambda s, c: s.softcap is not None, "truthful"),
    Edit("raw_scores", "transposed",
         lambda p, s, q: s.of(s.data.transpose(_queries(s), _keys(s))),
         _self_attention, "truthful"),
    Edit("raw_scores", "negated", lambda p, s, q: s.of(-1.0 * s.data), effect="truthful"),
)  # fmt: skip
