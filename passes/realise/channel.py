"""Apply the channel part of a plan: the projections of MLP blocks become structured, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from rewriter.errors import UsageError
from rewriter.ir.mlp import ChannelMap, MlpSite
from rewriter.mixers.channel.base import ChannelMixer, ChannelOptions, Dense, Projection, Sizes
from rewriter.mixers.channel.registry import get
from rewriter.passes.examples import Call, Examples
from rewriter.passes.realise.calls import removing
from rewriter.plan import Decision

_AT_ONCE = 8  # blocks whose second moments are held in memory together
_ROWS = 64  # sequences of random tokens that structures are fitted to by default


def rewrite_mlps(
    model: nn.Module, decisions: Sequence[Decision], source: nn.Module, calls: Sequence[Call]
) -> list[Decision]:
    """Replace the projections of every planned block of `model`, fitted to those of `source`.

    Args:
        model: changed in place.
        source: the original, which is only run.
        calls: what the original is run on to see what its projections read.

    Returns:
        The decisions, with the sizes that were chosen among their options.
    """
    done: list[Decision] = []
    todo = list(decisions)
    for start in range(0, len(todo), _AT_ONCE):
        group = todo[start : start + _AT_ONCE]
        changed = [d for d in group if _changes(d)]
        names = [m.module for d in changed for _, m in chosen_maps(_site(d), d.options)]
        moments = second_moments(source, names, calls)
        done += [_fitted(model, d, moments) if _changes(d) else d for d in group]
    return done


def apply_mlps(model: nn.Module, decisions: Sequence[Decision]) -> None:
    """Replace the projections as `rewrite_mlps` did, with parameters still to be loaded."""
    for decision in decisions:
        if _changes(decision):
            mixer, options = _mixer(decision)
            for role, part in chosen_maps(_site(decision), decision.options):
                _place(model, part, mixer, options.sizes[role], None)


def chosen_maps(site: MlpSite, options: Mapping[str, Any]) -> Iterator[tuple[str, ChannelMap]]:
    """(name, projection) of those that are replaced; a fused gate and up projection is 'up'."""
    wanted = options.get("projections", ("gate", "up", "down"))
    for role, part in (("gate", site.gate), ("up", site.up), ("down", site.down)):
        fused = role == "gate" and site.gate_layout != "separate"
        if part is not None and role in wanted and not fused:
            yield role, part


def superseded(decisions: Sequence[Decision]) -> dict[str, str]:
    """Names of the weights that structures replace, each with the module that held it."""
    return {
        part.weight: part.module
        for d in decisions
        if _changes(d)
        for _, part in chosen_maps(_site(d), d.options)
    }


def second_moments(
    model: nn.Module, names: Sequence[str], calls: Sequence[Call]
) -> dict[str, torch.Tensor]:
    """(input, input) fp32 mean of x x^T over all rows that each module reads in `calls`."""
    sums: dict[str, torch.Tensor] = {}
    rows: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            axis = channel_of(module)
            x = args[0].detach().movedim(axis, -1)
            x = x.reshape(-1, x.shape[-1]).float()
            product = x.mT @ x
            sums[name] = sums[name] + product if name in sums else product
            rows[name] = rows.get(name, 0) + x.shape[0]

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name in dict.fromkeys(names):
            handle = model.get_submodule(name).register_forward_pre_hook(watch(name))
            stack.enter_context(removing(handle))
        for call in calls if names else ():
            model(*call.args, **dict(call.kwargs))
    return {name: total / max(rows[name], 1) for name, total in sums.items()}


def example_calls(examples: Examples) -> list[Call]:
    """What structures are fitted to where nobody gives calibration calls: random tokens."""
    if examples.tokens is None or examples.tokens not in examples.primary.kwargs:
        return [examples.primary, *examples.variants.values()]
    name, like = examples.tokens, examples.primary.kwargs[examples.tokens]
    generator = torch.Generator().manual_seed(11)
    shape = (_ROWS, *like.shape[1:])
    ids = torch.randint(0, examples.vocabulary, shape, generator=generator).to(like.device)
    others = {k: v for k, v in examples.primary.kwargs.items() if not isinstance(v, torch.Tensor)}
    return [Call((), {**others, name: ids})]


def channel_of(module: nn.Module) -> int:
    """Dimension of its input in which a projection module expects the channels."""
    weight = getattr(module, "weight", None)
    rank = weight.dim() if isinstance(weight, torch.Tensor) else 2
    return -1 if rank == 2 else 1 - rank


def dense_weight(module: nn.Module, part: ChannelMap) -> torch.Tensor:
    """(output, input) view of the whole weight that a projection module holds."""
    weight = module.get_parameter("weight").detach()
    flat = weight.flatten(1)
    return flat.mT if part.transposed else flat


def _fitted(model: nn.Module, decision: Decision, moments: Mapping[str, torch.Tensor]) -> Decision:
    mixer, options = _mixer(decision)
    sizes: dict[str, Sizes] = {}
    for role, part in chosen_maps(_site(decision), decision.options):
        module = model.get_submodule(part.module)
        if isinstance(module, Projection):  # layers that share their weights
            sizes[role] = options.sizes.get(role, {})
            continue
        dense = mixer.prepare(options, Dense(dense_weight(module, part), moments.get(part.module)))
        sizes[role] = options.sizes.get(role) or mixer.sizes(options, dense)
        _place(model, part, mixer, sizes[role], dense)
    return decision.model_copy(update={"options": {**decision.options, "sizes": sizes}})


def _place(
    model: nn.Module,
    part: ChannelMap,
    mixer: type[ChannelMixer],
    sizes: Sizes,
    dense: Dense | None,
) -> None:
    module = model.get_submodule(part.module)
    if isinstance(module, Projection):
        return
    weight = module.get_parameter("weight")
    outputs, inputs = dense_weight(module, part).shape
    try:
        core = mixer.structure(outputs, inputs, sizes)
    except ValueError as error:
        raise UsageError(f"'{part.module}' cannot become {mixer.info.name}: {error}") from None
    if dense is not None:
        core.fit(dense)
    core = core.to(device=weight.device, dtype=weight.dtype)
    bias = getattr(module, "bias", None)
    held = bias if isinstance(bias, nn.Parameter) else None
    new = Projection(core, held, channel_of(module), weight.shape, part.transposed)
    owner, _, leaf = part.module.rpartition(".")
    setattr(model.get_submodule(owner), leaf, new.train(module.training))


def _changes(decision: Decision) -> bool:
    return decision.status != "refused" and decision.target != "keep"


def _site(decision: Decision) -> MlpSite:
    return MlpSite.from_json(decision.site)


def _mixer(decision: Decision) -> tuple[type[ChannelMixer], ChannelOptions]:
    mixer = get(decision.target)
    return mixer, mixer.Options.model_validate(decision.options)
