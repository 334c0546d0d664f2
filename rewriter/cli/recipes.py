"""`rewriter recipes`: the shipped settings of distillation."""

from __future__ import annotations

from typing import Annotated

import typer

from rewriter.cli.session import Json, Threads, Traceback, session


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Show the settings of this one.", show_default=False),
    ] = None,
    as_json: Json = False,
    threads: Threads = None,
    traceback: Traceback = False,
) -> None:
    """List the recipes that 'distill --config' takes by name, or show the settings of one."""
    with session(as_json, threads) as out:
        import yaml

        from rewriter.cli.tables import bullets, facts, heading
        from rewriter.distill.recipe import recipe, recipe_names

        if name is not None:
            one = recipe(name)
            settings = one.config.model_dump(mode="json")
            rows = [("description", one.description), ("source", one.source)]
            out.show(heading(one.name), facts(rows), heading("settings"))
            out.show(yaml.safe_dump(settings, sort_keys=False).rstrip())
            out.result(one.model_dump(mode="json"))
            return
        listed = [recipe(each) for each in recipe_names()]
        out.show(bullets((f"{r.name}:", r.source) for r in listed))
        out.show("", "More: rewriter recipes NAME")
        out.result({"recipes": [r.model_dump(mode="json") for r in listed]})
