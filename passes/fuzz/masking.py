"""Spellings of masks and of ALiBi: how they are made, joined and applied."""

from __future__ import annotations

from typing import Any

import torch

from rewriter.passes.fuzz.edit import Edit
from rewriter.passes.fuzz.laid import Laid, Tensor, unflatten

LONGEST = 320
"""Tokens that a mask kept in a buffer covers."""


def spread(p: Any, s: Laid, item: Tensor, letters: str) -> Tensor:
    """`item` so that it broadcasts against the scores."""
    if "g" in s.letters and "h" in letters:
        at = letters.index("h")
        item = unflatten(item, at, (p.spec.kv_heads, p.spec.group))
        letters = letters.replace("h", "xg")
    if "f" not in s.letters or not set(letters) & {"b", "h"}:
        return s.aligned(item, letters)
    whole = Laid(item, letters)
    for letter in "bhnm":
        if letter not in whole.letters:
            whole = Laid(whole.data.unsqueeze(0), letter + whole.letters)
    whole = whole.to("bhnm")
    batch = s.size("f") // p.spec.heads
    wide = whole.data.expand(batch, p.spec.heads, -1, -1)
    return wide.reshape(batch * p.spec.heads, *wide.shape[2:])


def _compare(p: Any, n: int, m: int) -> Tensor:
    """bool (n, m) from positions."""
    i, j = torch.arange(n)[:, None], torch.arange(m)[None, :]
    kind, size = p.spec.mask, p.spec.size
    if kind == "causal":
        return j <= i
    if kind == "window":
        return (j <= i) & (i - j < size)  # type: ignore[no-any-return]
    if kind == "local":
        return (i - j).abs() <= size  # type: ignore[no-any-return]
    return (j <= i) & (i // size == j // size)  # type: ignore[no-any-return]


def _compare_reversed(p: Any, n: int, m: int) -> Tensor:
    i, j = torch.arange(n).unsqueeze(-1), torch.arange(m).unsqueeze(0)
    kind, size = p.spec.mask, p.spec.size
    if kind == "causal":
        return torch.logical_not(i < j)
    if kind == "window":
        return torch.logical_and(i >= j, j > i - size)
    if kind == "local":
        return ((j - i) <= size) & ((j - i) >= -size)  # type: ignore[no-any-return]
    return torch.logical_and(i >= j, (i - i % size) == (j - j % size))


def _triangles(p: Any, n: int, m: int) -> Tensor:
    ones = torch.ones(n, m, dtype=torch.bool)
    kind, size = p.spec.mask, p.spec.size
    if kind == "causal":
        return ones.tril()
    if kind == "window":
        return torch.tril(ones) & torch.triu(ones, 1 - size)
    if kind == "local":
        return torch.tril(ones, size).triu(-size)
    blocks = torch.arange(n) // size
    return ones.tril() & (blocks[:, None] == blocks[None, :])  # type: ignore[no-any-return]


def _not_triangles(p: Any, n: int, m: int) -> Tensor:
    ones = torch.ones(n, m)
    kind, size = p.spec.mask, p.spec.size
    if kind == "causal":
        return torch.triu(ones, diagonal=1) == 0
    if kind == "window":
        return (torch.triu(ones, 1) + torch.tril(ones, -size)) < 1
    if kind == "local":
        return ~(ones.triu(size + 1).bool() | ones.tril(-size - 1).bool())
    edges = torch.arange(n).div(size, rounding_mode="trunc")
    return ~((ones.triu(1) != 0) | edges.unsqueeze(1).ne(edges))


def _buffer(p: Any, n: int, m: int) -> Tensor:
    """A table made with the module, cut to length."""
    table = p.buffer("table", _compare(p, LONGEST, LONGEST))
    return table[:n, :m]  # type: ignore[no-any-return]


def _counted(p: Any, n: int, m: int) -> Tensor:
    """Positions counted instead of numbered."""
    i = torch.ones(n, dtype=torch.long).cumsum(0)[:, None] - 1
    j = torch.ones(m, dtype=torch.long).cumsum(0)[None, :] - 1
    return p.spec.seen(i, j)  # type: ignore[no-any-return]


STRUCTURES = (
    Edit("structure", "compare", _compare),
    Edit("structure", "compare_reversed", _compare_reversed),
    Edit("structure", "triangles", _triangles),
    Edit("structure", "not_triangles", _not_triangles),
    Edit("structure", "buffer", _buffer),
    Edit("structure", "counted", _counted),
)

PADDINGS = (
    Edit("padding", "bool", lambda p, mask: mask.bool()),
    Edit("padding", "nonzero", lambda p, mask: mask != 0),
    Edit("padding", "equal_one", lambda p, mask: mask == 1),
    Edit("padding", "not_zero", lambda p, mask: ~(mask == 0)),
    Edit("padding", "half", lambda p, mask: mask.float() > 0.5),
    Edit("padding", "inverted", lambda p, mask: (1.0 - mask.float()) < 0.5),
)


def _where(p: Any, s: Laid, seen: Tensor) -> Laid:
    return s.of(torch.where(seen, s.data, -torch.inf))


def _where_least(p: Any, s: Laid, seen: Tensor) -> Laid:
    return s.of(torch.where(seen, s.data, torch.finfo(s.data.dtype).min))


def _where_tensor(p: Any, s: Laid, seen: Tensor) -> Laid:
    least = torch.full([], torch.finfo(s.data.dtype).min, dtype=s.data.dtype)
    return s.of(torch.where(seen, s.data, least))


def _where_swapped(p: Any, s: Laid, seen: Tensor) -> Laid:
    return s.of(torch.where(~seen, torch.tensor(-1e9), s.data))


def _fill(p: Any, s: Laid, seen: Tensor) -> Laid:
    return s.of(s.data.masked_fill(~seen, float("-inf")))


def _fill_large(p: Any, s: Laid, seen: Tensor) -> Laid:
    return s.of(s.data.masked_fill(seen.logical_not(), -1e9))


def _fill_in_place(p: Any, s: Laid, seen: Tensor) -> Laid:
    return s.of(s.data.masked_fill_(seen == 0, torch.finfo(s.data.dtype).min))


def _add_product(p: Any, s: Laid, seen: Tensor) -> Laid:
    return s.of(s.data + (1.0 - seen.to(s.data.dtype)) * torch.finfo(s.data.dtype).min)


def _add_large(p: Any, s: Laid, seen: Tensor) -> Laid:
    return s.of(s.data + (~seen).float() * -1e9)


def _add_filled(p: Any, s: Laid, seen: Tensor) -> Laid:
    zero = torch.zeros(seen.shape, dtype=s.data.dtype)
    return s.of(zero.masked_fill(~seen, -torch.inf) + s.data)


def _add_where(p: Any, s: Laid, seen: Tensor) -> Laid:
    return s.of(s.data + torch.where(seen, 0.0, -torch.inf))


def _add_written(p: Any, s: Laid, seen: Tensor) -> Laid:
    bias = torch.full(seen.shape, torch.finfo(s.data.dtype).min)
    bias.masked_fill_(seen, 0.0)
    return s.of(s.data.add_(bias))


def _add_logarithm(p: Any, s: Laid, seen: Tensor) -> Laid:
    return s.of(s.data + seen.to(s.data.dtype).log())


def _viewed(p: Any, s: Laid, seen: Tensor) -> Laid:
    hidden = torch.where(seen, 0.0, torch.finfo(s.data.dtype).min)
    return s.of(s.data + hidden.expand_as(s.data).contiguous().view_as(s.data))


def _subtract(p: Any, s: Laid, seen: Tensor) -> Laid:
    return s.of(s.data - 1e9 * (~seen))


def _subtract_alpha(p: Any, s: Laid, seen: Tensor) -> Laid:
    return s.of(torch.sub(s.data, (~seen).to(s.data), alpha=1e9))


def _add_alpha(p: Any, s: Laid, seen: Tensor) -> Laid:
    return s.of(torch.add(s.data, seen.float() - 1.0, alpha=1e9))


def _blend(p: Any, s: Laid, seen: Tensor) -> Laid:
    keep = seen.to(s.data.dtype)
    return s.of(s.data * keep - 1e4 * (1 - keep))


def _blend_hidden(p: Any, s: Laid, seen: Tensor) -> Laid:
    hidden = (~seen).type_as(s.data)
    return s.of((1.0 - hidden) * s.data + hidden * -1e9)


APPLICATIONS = (
    Edit("apply", "where", _where),
    Edit("apply", "where_least", _where_least),
    Edit("apply", "where_tensor", _where_tensor),
    Edit("apply", "where_swapped", _where_swapped),
    Edit("apply", "fill", _fill),
    Edit("apply", "fill_large", _fill_large),
    Edit("apply", "fill_in_place", _fill_in_place),
    Edit("apply", "add_product", _add_product),
    Edit("apply", "add_large", _add_large),
    Edit("apply", "add_filled", _add_filled),
    Edit("apply", "add_where", _add_where),
    Edit("apply", "add_written", _add_written),
    Edit("apply", "add_logarithm", _add_logarithm),
    Edit("apply", "viewed", _viewed),
    Edit("apply", "subtract", _subtract),
    Edit("apply", "subtract_alpha", _subtract_alpha),
    Edit("apply", "add_alpha", _add_alpha),
    Edit("apply", "blend", _blend),
    Edit("apply", "blend_hidden", _blend_hidden),
)

JOINS = (
    Edit("join", "together", lambda p: "together"),
    Edit("join", "apart", lambda p: "apart"),
    Edit("join", "padding_first", lambda p: "padding_first"),
)


def masked(p: Any, s: Laid, padding: Tensor | None) -> Laid:
    """Scores with the mask of the spec, written as the program's edits say."""
    n, m = s.size("n"), s.size("m")
    parts: list[Tensor] = []
    if p.spec.mask != "none":
        parts.append(spread(p, s, p.use("structure")(p, n, m), "nm"))
    if padding is not None:
        parts.append(spread(p, s, p.use("padding")(p, padding), "bm"))
    if not parts:
        return s
    join = p.use("join")(p)
    if len(parts) == 2 and join == "together":
        parts = [parts[0] & parts[1]]
    if join == "padding_first":
        parts.reverse()
    for part in parts:
        s = p.use("apply")(p, s, part)
    return s


def _slope_distance(p: Any, n: int, m: int) -> Tensor:
    """(heads, n, m)."""
    slopes = p.buffer("slopes", p.raw["slopes"])
    distance = torch.arange(m)[None, :] - torch.arange(n)[:, None]
    return slopes[:, None, None] * distance  # type: ignore[no-any-return]


def _slope_position(p: Any, n: int, m: int) -> Tensor:
    slopes = p.buffer("slopes", p.raw["slopes"])
    return slopes.view(-1, 1, 1) * torch.arange(m, dtype=torch.float32).view(1, 1, -1)  # type: ignore[no-any-return]


def _slope_from_end(p: Any, n: int, m: int) -> Tensor:
    slopes = p.buffer("slopes", p.raw["slopes"])
    return (torch.arange(1 - m, 1)[None, None, :] * slopes[:, None, None]).expand(-1, n, -1)  # type: ignore[no-any-return]


ALIBIS = (
    Edit("alibi", "distance", _slope_distance),
    Edit("alibi", "position", _slope_position),
    Edit("alibi", "from_end", _slope_from_end),
)


def biased(p: Any, s: Laid) -> Laid:
    """Scores with ALiBi, if the spec has it."""
    if p.spec.position != "alibi":
        return s
    table = p.use("alibi")(p, s.size("n"), s.size("m"))
    return s.of(s.data + spread(p, s, table, "hnm"))
