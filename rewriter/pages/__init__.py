"""Result pages: what commands measured, as one self-contained HTML file and a Markdown twin."""

from rewriter.pages.story import story
from rewriter.pages.write import render_html, render_markdown, write_pages

__all__ = ["render_html", "render_markdown", "story", "write_pages"]
