"""A page as HTML (one file, no network) and as Markdown."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rewriter.atomic import write_file
from rewriter.pages.charts import svg
from rewriter.pages.content import Chart, Page


def render_html(page: Page) -> str:
    """The page as one HTML document: styles and charts inline, no script, nothing fetched.

    Raises:
        UnsupportedError: it has charts, and matplotlib is not installed.
    """
    return _environment(html=True).get_template("page.html.jinja").render(page=page)


def render_markdown(page: Page) -> str:
    """The page as Markdown; charts become tables of their points."""
    text = _environment(html=False).get_template("page.md.jinja").render(page=page)
    lines = [line.rstrip() for line in text.splitlines()]
    out: list[str] = []
    for line in lines:
        if line or (out and out[-1]):
            out.append(line)
    return "\n".join(out).strip() + "\n"


def write_pages(page: Page, target: Path) -> tuple[Path, Path]:
    """Write `target` (HTML) and its Markdown twin beside it, each atomically.

    Raises:
        OutputError: a file cannot be written.
    """
    twin = target.with_suffix(".md")
    html, markdown = render_html(page), render_markdown(page)
    write_file(target, html.encode())
    write_file(twin, markdown.encode())
    return target, twin


def _environment(html: bool) -> Environment:
    env = Environment(
        loader=PackageLoader("rewriter.pages", "templates"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["chart"] = lambda chart: Markup(svg(chart))
    env.filters["pipe"] = lambda text: text.replace("|", "\\|").replace("\n", " ")
    env.filters["points"] = _points
    return env


def _points(chart: Chart) -> list[list[str]]:
    """Rows of a chart: x, then every line's y."""
    xs = sorted({x for line in chart.lines for x, _ in line.points})
    known = [dict(line.points) for line in chart.lines]
    return [[f"{x:.4g}", *(f"{ys[x]:.4g}" if x in ys else "-" for ys in known)] for x in xs[:60]]
