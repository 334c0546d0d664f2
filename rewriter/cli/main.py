"""The command `rewriter`: its commands, and examples of each."""

from __future__ import annotations

from collections.abc import Callable
from inspect import cleandoc
from typing import Annotated

import typer

from rewriter.cli.benching import bench
from rewriter.cli.catalogue import mixers
from rewriter.cli.converting import convert
from rewriter.cli.distilling import distill
from rewriter.cli.evaluating import evaluate
from rewriter.cli.generating import generate
from rewriter.cli.guard import GuardedGroup
from rewriter.cli.inspecting import inspect
from rewriter.cli.planning import plan
from rewriter.cli.profiling import profile
from rewriter.cli.recipes import recipes
from rewriter.cli.reporting import report
from rewriter.cli.sensing import sensitivity

app = typer.Typer(
    name="rewriter",
    cls=GuardedGroup,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Rewrite the attention of a trained model: find it in the graph, replace it, prove it, "
    "distil it, save it.",
    epilog="Example: rewriter inspect ./model\n\n"
    "Exit codes: 0 done, 2 wrong request, 3 unreadable input, 4 no attention found, 5 a contract "
    "failed, 6 cannot write, 7 not supported, 70 a bug, 130 interrupted.",
)


def _add(command: Callable[..., None], name: str, *examples: str) -> None:
    """Register a command; paragraphs of its docstring become lines that wrap to the terminal."""
    paragraphs = (cleandoc(command.__doc__ or "")).split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(name=name, help=text, epilog=_examples(*examples))(command)


def _examples(*lines: str) -> str:
    return "\n\n".join(["Example:" if len(lines) == 1 else "Examples:", *lines])


_add(
    inspect,
    "inspect",
    "rewriter inspect ./SmolLM2-135M-Instruct.Q4_1.gguf",
    "rewriter inspect ./model --why model.layers.3.self_attn",
)
_add(
    plan,
    "plan",
    "rewriter plan ./model --policy hybrid --out plan.json",
    "rewriter plan ./model --latency 0.5x --context 8192 --text book.txt --out plan.json",
)
_add(
    convert,
    "convert",
    "rewriter convert ./model --policy sink-window --out ./converted",
    "rewriter convert ./model --plan plan.json --out ./converted --verify quick",
)
_add(
    distill,
    "distill",
    "rewriter distill ./model ./converted --text book.txt --out ./student --minutes 10",
    "rewriter distill ./model ./converted --text book.txt --out ./student --config lolcats",
)
_add(
    evaluate,
    "eval",
    "rewriter eval ./student --teacher ./model --text book.txt --held-out 0.1",
)
_add(
    generate,
    "generate",
    'rewriter generate ./student --prompt "Once upon a time" --max-new-tokens 40',
)
_add(recipes, "recipes", "rewriter recipes", "rewriter recipes hedgehog")
_add(mixers, "mixers", "rewriter mixers hedgehog_window")
_add(
    bench,
    "bench",
    "rewriter bench --only dense,linear --lengths 1024,4096",
    "rewriter bench --dtype bfloat16 --threads 2 --out figures.json --plot figures.svg",
)
_add(
    profile,
    "profile",
    "rewriter profile ./model",
    "rewriter profile --device h100-sxm-80gb",
)
_add(
    sensitivity,
    "sensitivity",
    "rewriter sensitivity ./model --text book.txt --out sensitivities.json",
)
_add(report, "report", "rewriter report convert.json eval.json figures.json --out report.html")


def _version(wanted: bool) -> None:
    if wanted:
        from rewriter.plan import tool_version

        typer.echo(tool_version())
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Entry point of the console script; leaves through SystemExit."""
    app(prog_name="rewriter")
