"""`rewriter report`: results of other commands as one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rewriter.cli.session import Json, Threads, Traceback, session
from rewriter.errors import OutputError, UsageError


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="JSON files: of 'convert --json', 'eval --json', 'sensitivity --out', "
            "'bench --out', a search, or a plan.",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path, typer.Option("--out", help="The page; its Markdown twin gets the suffix .md.")
    ] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Attention rewrite",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a page that exists.")
    ] = False,
    as_json: Json = False,
    threads: Threads = None,
    traceback: Traceback = False,
) -> None:
    """Write one self-contained HTML page, and the same as Markdown.

    The page needs no network and no script; it follows the reader's light or dark setting.
    """
    with session(as_json, threads) as out:
        from rewriter.pages import story, write_pages

        if target.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"--out names an HTML file, not '{target.name}'; use for example "
                             f"{target.with_suffix('.html').name}")  # fmt: skip
        taken = [p for p in (target, target.with_suffix(".md")) if p.exists()]
        if taken and not overwrite:
            raise OutputError(f"{taken[0]} exists already; choose another --out or add --overwrite")
        page = story([pair for path in results for pair in _read(path)], title)
        html, markdown = write_pages(page, target)
        out.show(f"wrote {html} and {markdown}")
        out.result({"html": str(html), "markdown": str(markdown)})


def _read(path: Path) -> list[tuple[str, Any]]:
    """The results in a file, which may hold a list of them."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}); write it with --json") from None
    return [(str(path), item) for item in (data if isinstance(data, list) else [data])]
