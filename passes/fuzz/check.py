"""Judge what the matcher says about a program: found with the right facts, refused, or wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from rewriter.ir.site import AddTerm, AttentionSite, Scale, Softcap
from rewriter.passes.capture import Captured
from rewriter.passes.fuzz.laid import unflatten
from rewriter.passes.fuzz.program import Program, Recipe, inputs
from rewriter.passes.fuzz.spec import Spec
from rewriter.passes.match import Match, MatchResult, Operand
from rewriter.passes.normalise.ops import arguments, op

Answer = Literal["found", "refused", "wrong", "not_equal", "not_different"]

LENGTH, LONGER = 7, 17
"""Tokens at capture, and at the comparison (longer than any window plus padding)."""


@dataclass(frozen=True)
class Verdict:
    """What became of one program.

    Attributes:
        answer: `found` and `refused` are the matcher's; `wrong`: found with facts that do not hold;
            `not_equal` and `not_different`: the program itself is not what its recipe says.
        why: facts that differ, or the reason of the refusal.
    """

    answer: Answer
    why: str = ""


def expected(spec: Spec) -> dict[str, Any]:
    """The facts of a spec, in the terms of `facts`."""
    return {
        "heads": (spec.heads, spec.kv_heads, spec.width, spec.value_width),
        "scale": spec.scale,
        "softcap": spec.softcap,
        "after_cap": 1.0,
        "padding": spec.padding,
        "position": {"none": "external", "alibi": "alibi"}.get(spec.position, "rotary"),
        "rotary_dim": spec.rotary_dim,
        "qk_norm": spec.norm,
        "dropout": spec.dropout,
        "bias": spec.position == "alibi",
        "sites": 1,
    }


def facts(found: MatchResult) -> dict[str, Any]:
    """What was found, freed of spelling: factors multiplied, order of steps only around the cap."""
    if len(found.matches) != 1:
        return {"sites": len(found.matches)}
    site = found.matches[0].site
    before, after = site.prescaled, 1.0
    for step in site.score:
        if isinstance(step, Scale):
            late = site.softcap is not None and _after_cap(site, step)
            before, after = (before, after * step.factor) if late else (before * step.factor, after)
    heads = site.heads
    return {
        "heads": (heads.query, heads.key_value, heads.key_dim, heads.value_dim),
        "scale": before,
        "softcap": site.softcap,
        "after_cap": after,
        "padding": site.mask.padding,
        "position": site.position,
        "rotary_dim": site.rotary_dim,
        "qk_norm": site.qk_norm,
        "dropout": site.dropout,
        "bias": site.has_bias,
        "sites": 1,
    }


def _after_cap(site: AttentionSite, step: Scale) -> bool:
    caps = [i for i, s in enumerate(site.score) if isinstance(s, Softcap)]
    return any(s is step and i > caps[0] for i, s in enumerate(site.score))


def differences(found: MatchResult, recipe: Recipe) -> str:
    """What was found otherwise than the spec says; '' if nothing.

    A factor that the program applies to the keys may lie outside the core, which then has the rest.
    """
    spec = recipe.spec
    wanted, got = expected(spec), facts(found)
    if recipe.edits.get("scale") in ("on_key", "root_on_both", "divided_both"):
        wanted.pop("scale")
    out = []
    for key, value in wanted.items():
        other = got.get(key)
        same = (
            math.isclose(value, other, rel_tol=1e-6) if _numbers(value, other) else value == other  # type: ignore[arg-type]
        )
        if not same and (key in got or key == "sites"):
            out.append(f"{key} is {other}, not {value}")
    if len(found.matches) == 1:
        mask = found.matches[0].site.mask
        if mask.opaque is not None:
            out.append(f"mask is {mask.describe()}")
        else:
            i, j = torch.arange(41), torch.arange(45 if spec.cross else 41)
            seen = spec.seen(i[:, None], j[None, :])
            if not torch.equal(mask.dense(i, j), seen):
                out.append(f"mask is {mask.describe()}, not {spec.mask} {spec.size or ''}")
    return "; ".join(out)


def _numbers(a: Any, b: Any) -> bool:
    return isinstance(a, float) and isinstance(b, float)


def outputs_agree(program: Program, canonical: Program) -> bool:
    """Whether two programs of one spec compute the same, at another length and with padding."""
    return gap(program, canonical) < 2e-4


def gap(program: Program, canonical: Program) -> float:
    """Largest difference of the outputs at rows that see a key, relative to their size."""
    spec = program.spec
    largest = 0.0
    for padded in (False, True) if spec.padding else (False,):
        args = inputs(spec, LONGER, seed=3, padded=padded)
        with torch.no_grad():
            one, two = (m.train(False)(*(a.clone() for a in args)) for m in (program, canonical))
        if one.shape != two.shape:
            return math.inf
        valid = torch.ones(one.shape[:2], dtype=torch.bool)
        if padded and not spec.cross:
            valid[1, LONGER - 2 :] = False
        difference = (one - two).abs()[valid].max() / two.abs()[valid].max()
        largest = max(largest, float(difference) if bool(difference == difference) else math.inf)
    return largest


def described(item: Match, captured: Captured, program: Program) -> float:
    """Largest difference between the core in the graph and the core that its facts describe.

    Everything but the values of biases comes from the facts: the mask is the predicate.
    """
    spec = program.spec
    args = inputs(spec, LONGER, seed=3, padded=spec.padding)
    values = run_all(captured, program.train(False), args)
    site, nodes = item.site, item.nodes
    sizes = {"head": site.heads.query, "kv_head": site.heads.key_value, "group": site.heads.group}
    q, k, v, o = (
        canonical(values[x.node], x, sizes)
        for x in (nodes.query, nodes.key, nodes.value, nodes.output)
    )
    k, v = (t.repeat_interleave(site.heads.query // t.shape[1], 1) for t in (k, v))
    scores = q.float() @ k.float().transpose(-1, -2)
    for step in site.score:
        if isinstance(step, Scale):
            scores = scores * step.factor
        elif isinstance(step, Softcap):
            scores = step.cap * torch.tanh(scores / step.cap)
        elif isinstance(step, AddTerm) and "bias" in site.terms[step.index]:
            term = scores_like(values[nodes.terms[step.index].node], nodes.terms[step.index], sizes)
            term = term * step.factor
            scores = scores + torch.where(term > -1e4, term, 0.0)
    n, m = scores.shape[-2:]
    valid = args[-1].bool() if site.mask.padding else None
    seen = site.mask.dense(torch.arange(n), torch.arange(m), valid)
    out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.float()
    rows = seen.expand(q.shape[0], 1, n, m).any(-1).squeeze(1)[:, None, :, None].expand_as(out)
    return float((out - o.float()).abs()[rows].max() / o.float().abs()[rows].max())


def scores_like(tensor: torch.Tensor, operand: Operand, sizes: Mapping[str, int]) -> torch.Tensor:
    """A term as it broadcasts against (batch, head, query, key)."""
    if ("batch", "head") in operand.layout.dims:
        return unflatten(tensor, 0, (-1, sizes["head"]))
    if tensor.dim() < 4:
        return tensor
    names = [d[0] if d else "" for d in operand.layout.dims]
    if tensor.dim() == 5:  # the equation decides where the groups stand
        return grouped(tensor, names, sizes)
    head = names.index("head") if "head" in names else None
    tokens = [d for d, x in enumerate(names) if x == "token"]
    rest = [d for d in range(4) if d != head and d not in tokens]  # batch, then size-1 dimensions
    order = [rest.pop(0), rest.pop(0) if head is None else head, *rest, *tokens]
    return tensor.permute(order)


def grouped(tensor: torch.Tensor, names: list[str], sizes: Mapping[str, int]) -> torch.Tensor:
    """(batch, head, query, key) from any order of five; a dimension of size 1 has no name."""
    tokens = [d for d, name in enumerate(names) if name == "token"]
    if len(tokens) == 1:  # a bias of keys alone; queries stand before keys
        tokens = [tokens[0] - 1, tokens[0]]
    pair = (1, sizes["head"]) if "head" in names else (sizes["kv_head"], sizes["group"])
    first, second = ("kv_head", "head" if "head" in names else "group")
    rest = iter(d for d, name in enumerate(names) if not name and d not in tokens)
    order = [
        names.index(name) if name in names else next(rest) for name in ("batch", first, second)
    ]
    return tensor.permute([*order, *tokens]).expand(-1, *pair, -1, -1).flatten(1, 2)


def canonical(tensor: torch.Tensor, operand: Operand, sizes: Mapping[str, int]) -> torch.Tensor:
    """(batch, head, token, channel) from any layout."""
    shape: list[int] = []
    roles: list[str] = []
    for size, names in zip(tensor.shape, operand.layout.dims, strict=True):
        rest = size
        for name in names:
            rest //= sizes.get(name, 1)
        shape.extend(sizes.get(name, rest) for name in names)
        roles.extend(names)
    tensor = tensor.reshape(shape)
    heads = [r for r in ("head", "kv_head", "group") if r in roles]
    order = [r for r in ("batch", *heads, "token", "channel") if r in roles]
    tensor = tensor.permute([roles.index(r) for r in order])
    if "batch" not in roles:
        tensor, order = tensor.unsqueeze(0), ["batch", *order]
    if not heads:
        tensor = tensor.unsqueeze(1)
    return tensor.flatten(1, 2) if len(heads) == 2 else tensor


class _Values(fx.Interpreter):
    """Keeps every value of one run, as it was before later in-place writes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.kept: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if op(n) in ("dropout", "native_dropout"):
            out = args[0]
        elif op(n) == "scaled_dot_product_attention":
            given = {**arguments(n), **kwargs, **dict(zip(arguments(n), args, strict=False))}
            out = n.target(**{**given, "dropout_p": 0.0})  # type: ignore[operator]
        else:
            out = super().run_node(n)
        self.kept[n] = out.clone() if isinstance(out, torch.Tensor) else out
        return out


def run_all(
    captured: Captured, module: torch.nn.Module, args: tuple[torch.Tensor, ...]
) -> dict[fx.Node, Any]:
    """Every value of the captured graph on real inputs; dropout does nothing."""
    given = iter(args)
    flat: list[torch.Tensor] = []
    for node in captured.graph_module.graph.find_nodes(op="placeholder"):
        known = captured.parameter(node.name)
        flat.append(next(given).clone() if known is None else known.detach())
    interpreter = _Values(captured.graph_module)
    with torch.no_grad():
        interpreter.run(*flat)
    return interpreter.kept


def canonical_program(recipe: Recipe) -> Program:
    return Program(Recipe(recipe.spec, seed=recipe.seed))
