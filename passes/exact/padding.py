"""Padding packed away: a layer of an encoder runs on its tokens alone, end to end in one row.

Outside attention a token of a transformer layer does not see the others, so a batch of rows with
padding can run as one row of all tokens, with attention kept inside each sequence. A layer is
changed where its graph shows that (`tokenwise`) and where packed outputs equal the original's on
padded batches. Its outputs at padded positions become 0: nothing may look at them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers.utils import output_capturing

from rewriter.errors import UnsupportedError, UsageError
from rewriter.ir.contract import ContractResult, judged
from rewriter.mixers import terms as site_terms
from rewriter.mixers.exact.fused import Fused
from rewriter.mixers.exact.packing import CannotPackError, packed
from rewriter.passes.compare import max_difference
from rewriter.passes.exact.tokenwise import mixing
from rewriter.passes.examples import Examples
from rewriter.passes.realise.calls import Observed, Path, Signature, map_leaves, observe, walk
from rewriter.passes.realise.subclass import InPlace, become
from rewriter.plan import PackedLayer

STATE = "_packed_layer"
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_WORTH = 0.9  # share of real tokens above which a batch runs as it is


@dataclass(frozen=True)
class Packing:
    """What a packed layer knows: its signature, its inputs by role, the path of its core."""

    signature: Signature
    tokens: frozenset[str]
    masks: frozenset[str]
    core: str


class Packed(InPlace):
    """Mixin of all packed layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = super().forward
        state: Packing = self.__dict__[STATE]
        valid = None if _watched(self) else _valid(self, state, args, kwargs)
        if valid is None:
            return run(*args, **kwargs)
        try:
            return _run_packed(run, state, args, kwargs, valid)
        except CannotPackError:
            return run(*args, **kwargs)


def plan(model: nn.Module, rewritten: nn.Module, examples: Examples) -> list[PackedLayer]:
    """Which layers of a rewritten model can leave padding out, proved on padded calls.

    Args:
        model: the original. rewritten: the result so far, its attention fused; it is not changed.
    """
    padded = [c for name, c in examples.variants.items() if "padding" in name]
    if not padded:
        return []
    found: list[PackedLayer] = []
    read: dict[Any, str | None] = {}
    modules = rewritten.named_modules()
    owners = [name for name, m in modules if isinstance(getattr(m, "core", None), Fused)]
    for layer, site in _layers(model, owners).items():
        core = rewritten.get_submodule(site).core
        assert isinstance(core, Fused)
        if core.site.kind != "bidirectional":
            continue
        found.append(_planned(model, rewritten, layer, site, examples, read))
    return found


def apply(model: nn.Module, layers: Sequence[PackedLayer]) -> None:
    """Make the planned layers of a rewritten model leave padding out, in place.

    Raises:
        UsageError: the model has no such layer.
    """
    for layer in layers:
        if layer.status == "refused":
            continue
        try:
            owner = model.get_submodule(layer.fqn)
            core = model.get_submodule(layer.site).core
        except AttributeError:
            raise UsageError(
                f"the plan packs the layer '{layer.fqn}' with the attention '{layer.site}', which "
                "this model does not have; make a new plan for it"
            ) from None
        if not isinstance(core, Fused):
            raise UsageError(f"the attention of '{layer.fqn}' is not of the mixer 'fused'")
        owner.__dict__[STATE] = _packing(owner, layer)
        become(owner, Packed)


def _packing(owner: nn.Module, layer: PackedLayer) -> Packing:
    inside = layer.site.removeprefix(layer.fqn).lstrip(".")
    return Packing(
        signature=Signature(type(owner).forward, method=True),
        tokens=frozenset(layer.tokens),
        masks=frozenset(layer.masks),
        core=f"{inside}.core".lstrip("."),
    )


def results(layers: Sequence[PackedLayer], dtype: torch.dtype) -> list[ContractResult]:
    """Contract 8 of the layers that leave padding out."""
    done = [x for x in layers if x.status != "refused"]
    if not done:
        return []
    worst = max(done, key=lambda x: x.error)
    check = "packed layers: outputs at real tokens equal the original"
    detail = f"{len(done)} layers; outputs at padded positions are 0"
    return [judged(8, check, worst.fqn, worst.error, BOUND.get(dtype, 2e-2), detail)]


def _layers(model: nn.Module, owners: Sequence[str]) -> dict[str, str]:
    """The outermost callable module around each site that holds no other site."""
    out: dict[str, str] = {}
    for owner in owners:
        parts = owner.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            inside = [o for o in owners if o == path or o.startswith(f"{path}.")]
            callable_ = type(model.get_submodule(path)).forward is not nn.Module.forward
            if (
                len(inside) == 1
                and callable_
                and not isinstance(model.get_submodule(path), nn.ModuleList | nn.ModuleDict)
            ):
                out[path] = owner
                break
    return out


def _planned(
    model: nn.Module,
    rewritten: nn.Module,
    fqn: str,
    site: str,
    examples: Examples,
    read: dict[Any, str | None],
) -> PackedLayer:
    """`read` holds what the graphs of layers like this one showed."""
    calls = [examples.primary, *(c for n, c in examples.variants.items() if "padding" in n)]
    seen = [observe(model, [fqn], call)[fqn] for call in calls]
    refused = functools.partial(PackedLayer, fqn=fqn, site=site, status="refused")
    if any(len(s) != 1 for s in seen):
        return refused(reason="it does not run exactly once in a call")
    first, *padded = [s[0] for s in seen]
    roles = _roles(padded[0])
    if isinstance(roles, str):
        return refused(reason=roles)
    module = model.get_submodule(fqn)
    core = rewritten.get_submodule(site).core
    assert isinstance(core, Fused)
    fingerprint = core.site.fingerprint
    key = (type(module), fingerprint or fqn)
    if key not in read:
        read[key] = mixing(module, first.named)
    if (reason := read[key]) is not None:
        return refused(reason=reason)
    tokens, masks = roles
    layer = PackedLayer(fqn=fqn, site=site, tokens=tokens, masks=masks)
    error = _proof(module, rewritten.get_submodule(fqn), layer, padded)
    dtype = next(rewritten.parameters()).dtype
    if isinstance(error, str):
        return refused(reason=error)
    if not error <= BOUND.get(dtype, 0.0):
        return refused(reason=f"packed outputs differ by {error:.2g} from the original's")
    return layer.model_copy(update={"error": error})


def _roles(seen: Observed) -> tuple[list[str], list[str]] | str:
    """Dotted paths of the inputs with a token axis, and of the masks, or why one has no role."""
    leaves = {p: x for p, x in walk(dict(seen.named)) if isinstance(x, torch.Tensor)}
    hidden = next((x for x in leaves.values() if x.is_floating_point() and x.dim() == 3), None)
    if hidden is None:
        return "it takes no (batch, tokens, channels) input"
    batch, length = hidden.shape[:2]
    tokens, masks = [], []
    for path, x in leaves.items():
        if x.dim() == 4 and x.shape[-1] == length and x.shape[-2] in (1, length):
            masks.append(_dotted(path))
        elif x.dim() >= 3 and x.shape[0] in (1, batch) and x.shape[1] == length:
            tokens.append(_dotted(path))
        else:
            return f"its input '{_dotted(path)}' is neither a mask nor has it a token axis"
    if len(masks) != 1:
        return f"it takes {len(masks)} mask inputs, not one"
    return tokens, masks


def _proof(
    original: nn.Module, changed: nn.Module, layer: PackedLayer, calls: Sequence[Observed]
) -> float | str:
    """Largest relative difference at real tokens, on inputs as large as those seen."""
    state = _packing(changed, layer)
    worst = 0.0
    for number, seen in enumerate(calls):
        generator = torch.Generator().manual_seed(number)

        def noisy(path: Path, x: Any, generator: torch.Generator = generator) -> Any:
            if isinstance(x, torch.Tensor) and x.dim() == 3 and _dotted(path) in layer.tokens:
                return x + x.std() * torch.randn(x.shape, generator=generator).to(x.dtype)
            return x

        named = map_leaves(seen.named, noisy)
        args, kwargs = _arguments(state.signature, named)
        with torch.no_grad():
            valid = _valid(changed, state, args, kwargs, worth=1.0)
            if valid is None:
                return "its mask does not say which tokens are padding"
            try:
                ours = _run_packed(changed.forward, state, args, kwargs, valid)
            except CannotPackError:
                return "its attention cannot run on packed rows"
            theirs = original(*args, **kwargs)
        for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
            if not isinstance(b, torch.Tensor):
                continue
            if a.shape != b.shape or b.shape[:2] != valid.shape:
                return "an output has no token axis"
            scale = max(1e-6, float(b[valid].float().abs().max()))
            worst = max(worst, max_difference(a[valid], b[valid]) / scale)
    return worst


def _watched(owner: nn.Module) -> bool:
    """Whether somebody looks inside the layer, or a graph is being made of it."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return True
    inner = (m for m in owner.modules() if m is not owner)
    hooks = (h for m in inner for t in (m._forward_hooks, m._forward_pre_hooks) for h in t.values())
    return any(not _idle(hook) for hook in hooks)


def _idle(hook: Any) -> bool:
    """Whether it is one of transformers' hooks for intermediate outputs, and none are wanted now.

    They are put on every layer the first time that somebody asks for such outputs, and stay.
    """
    if getattr(hook, "__module__", "") != output_capturing.__name__:
        return False
    collector = getattr(output_capturing, "_active_collector", None)
    return collector is not None and not collector.get()


def _valid(
    owner: nn.Module, state: Packing, args: Any, kwargs: Any, worth: float = _WORTH
) -> torch.Tensor | None:
    """(B, N) bool where tokens are, or None where packing is not possible or not worth it."""
    named = state.signature.bind(args, kwargs)
    leaves = {_dotted(p): x for p, x in walk(named) if isinstance(x, torch.Tensor)}
    if leaves.keys() != state.tokens | state.masks:
        return None
    batch, length = max((leaves[name].shape[:2] for name in state.tokens), key=lambda s: s[0])
    core = owner.get_submodule(state.core)
    assert isinstance(core, Fused)
    (mask,) = (leaves[name] for name in state.masks)
    try:
        valid = site_terms.split(core.site, (mask,), 0, length).of_batch(batch).valid
    except UnsupportedError:
        return None
    if valid is None or float(valid.float().mean()) > worth:
        return None
    return valid


def _run_packed(run: Any, state: Packing, args: Any, kwargs: Any, valid: torch.Tensor) -> Any:
    batch, length = valid.shape
    flat = valid.reshape(-1)
    index = flat.nonzero().squeeze(1)
    counts = valid.sum(1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))

    def pack(path: Path, x: Any) -> Any:
        name = _dotted(path)
        if name in state.masks:
            return None
        if name not in state.tokens:
            return x
        rows = x.expand(batch, *x.shape[1:]).reshape(batch * length, *x.shape[2:])
        return rows.index_select(0, index)[None]

    def unpack(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        wide = x.new_zeros((batch * length, *x.shape[2:])).index_copy(0, index, x[0])
        return wide.reshape(batch, length, *x.shape[2:])

    named = map_leaves(state.signature.bind(args, kwargs), pack)
    args, kwargs = _arguments(state.signature, named)
    with packed(cu_seqlens):
        out = run(*args, **kwargs)
    return pytree.tree_map(unpack, out)


def _arguments(
    signature: Signature, named: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call with these named arguments: those before the first keyword-only one by position."""
    kinds = signature.signature.parameters
    by_place = [
        n for n, p in kinds.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    args = tuple(named[n] for n in by_place)
    return args, {n: x for n, x in named.items() if n not in by_place}


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))
