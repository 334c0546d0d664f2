"""`rewriter inspect`: what is there, and what was not understood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rewriter.cli.checkpoints import Checkpoint, open_source, stored_plan
from rewriter.cli.session import Json, Session, Threads, Traceback, session
from rewriter.errors import NoSiteError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from rewriter.cli.show_sites import Acceptance
    from rewriter.ir.site import AttentionSite, NearMiss


def inspect(
    checkpoint: Checkpoint,
    why: Annotated[
        str | None,
        typer.Option(metavar="MODULE", help="Tell everything about the attention of one module."),
    ] = None,
    as_json: Json = False,
    threads: Threads = None,
    traceback: Traceback = False,
) -> None:
    """Find the attention and MLP blocks of a model, and say what was not understood and why.

    Nothing is changed. Of a rewritten checkpoint its plan is shown. The exit code is 4 if no
    attention was understood.
    """
    with session(as_json, threads) as out:
        source = open_source(checkpoint)
        if source.kind == "rewritten":
            _show_rewritten(out, checkpoint, why)
            return
        from rewriter.api import inspect as find
        from rewriter.cli.show_mlps import mlps_view
        from rewriter.cli.show_sites import sites_view, summary

        with out.working("loading the model"):
            model = source.skeleton
        with out.working("reading its graph"):
            found = find(model)
        if why is not None:
            _show_story(out, model, found.sites, found.misses, why)
            return
        mlps = mlps_view(found.mlps, found.mlp_misses)
        out.show(*sites_view(found.sites, found.misses, mlps))
        if found.whole is not None and found.parts:
            out.show("", f"Parts were traced alone, since {found.whole.describe()}")
        if not found.sites:
            first = f"; first near miss: {found.misses[0].describe()}" if found.misses else ""
            raise NoSiteError(f"no attention was understood in {checkpoint}{first}")
        out.result(
            {
                "checkpoint": str(checkpoint),
                "sites": [site.to_json() for site in found.sites],
                "misses": [miss.to_json() for miss in found.misses],
                "mlps": [site.to_json() for site in found.mlps],
                "mlp_misses": [miss.to_json() for miss in found.mlp_misses],
                "summary": summary(found.sites, found.misses),
            }
        )


def _show_rewritten(out: Session, checkpoint: Path, why: str | None) -> None:
    from rewriter.cli.show_plan import plan_view
    from rewriter.cli.show_sites import story
    from rewriter.ir.site import AttentionSite

    stored = stored_plan(checkpoint)
    if why is None:
        out.show(*plan_view(stored))
        out.result({"checkpoint": str(checkpoint), "rewritten": True, "plan": stored.to_json()})
        return
    decisions = [d for d in stored.decisions if _touches(d.fqn, why)]
    if not decisions:
        known = ", ".join(d.fqn for d in stored.decisions[:3])
        raise UsageError(f"no attention was found in '{why}'; there is {known} ...")
    sites = [AttentionSite.from_json(d.site) for d in decisions if d.site]
    for decision in decisions:
        out.show(f"site {decision.index} became {decision.target} ({decision.status})")
    out.show(*story(sites, (), {}, {}))
    out.result({"decisions": [d.model_dump(mode="json") for d in decisions]})


def _show_story(
    out: Session,
    model: nn.Module,
    sites: Sequence[AttentionSite],
    misses: Sequence[NearMiss],
    why: str,
) -> None:
    from rewriter.cli.show_sites import story
    from rewriter.documents import did_you_mean

    names = [name for name, _ in model.named_modules()]
    if why not in names:
        raise UsageError(f"the model has no module '{why}'{did_you_mean(why, names)}")
    chosen = [site for site in sites if _touches(site.fqn, why)]
    missed = [miss for miss in misses if _touches(miss.source.module, why)]
    if not chosen and not missed:
        out.show(
            f"Nothing in '{why}' looks like attention: its part of the graph has no softmax of a "
            "product of queries and keys. Modules with attention: "
            + (", ".join(site.fqn for site in sites[:4]) or "none")
            + (" ..." if len(sites) > 4 else "")
        )
    alike = {
        site.index: [o.index for o in sites if o.fingerprint == site.fingerprint] for site in chosen
    }
    accepted = {site.index: _accepted(site) for site in chosen}
    out.show(*story(chosen, missed, alike, accepted))
    out.result(
        {
            "module": why,
            "sites": [
                {
                    **site.to_json(),
                    "same_graph_as": [n for n in alike[site.index] if n != site.index],
                    "mixers": {a.mixer: a.refusal for a in accepted[site.index]},
                }
                for site in chosen
            ],
            "misses": [miss.to_json() for miss in missed],
        }
    )


def _accepted(site: AttentionSite) -> list[Acceptance]:
    """What every installed mixer says about the site under its default options."""
    from pydantic import ValidationError

    from rewriter.cli.show_sites import Acceptance
    from rewriter.mixers.registry import available

    answers = []
    for name, mixer in available().items():
        try:
            answers.append(Acceptance(name, mixer.refuse(site, mixer.Options())))
        except ValidationError:  # an option without a default
            answers.append(Acceptance(name, "it depends on its options"))
    return answers


def _touches(module: str, wanted: str) -> bool:
    """One is the other, or inside it. The model itself ('') contains everything."""
    if wanted in ("", module):
        return True
    return module.startswith(f"{wanted}.") or (bool(module) and wanted.startswith(f"{module}."))
