"""What a page consists of, independent of HTML and Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

REFUSED = "refused"
Tone = Literal["plain", "good", "bad", "quiet"]


@dataclass(frozen=True)
class Cell:
    """Text of a table cell and how it is meant."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Grid:
    """A table. `numeric` columns are set flush right."""

    kind: ClassVar[str] = "grid"
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numeric: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Facts:
    """Short labelled values."""

    kind: ClassVar[str] = "facts"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Block:
    """One layer in a strip: its number, the name of its group, and what a reader may ask about."""

    label: str
    group: str
    detail: str


@dataclass(frozen=True)
class Strip:
    """The layers of a model as a row of blocks, coloured by group."""

    kind: ClassVar[str] = "strip"
    blocks: tuple[Block, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(b.group for b in self.blocks))

    def tint(self, group: str) -> int:
        """Number of a group's colour; the last one, grey, is for what was refused."""
        others = [g for g in self.groups if g != REFUSED]
        return 5 if group == REFUSED else others.index(group) % 5


@dataclass(frozen=True)
class Line:
    """One curve of a chart: points (x, y), optionally with (low, high) around y."""

    name: str
    points: tuple[tuple[float, float], ...]
    spread: tuple[tuple[float, float], ...] = ()
    joined: bool = True


@dataclass(frozen=True)
class Chart:
    """Curves over a common axis.

    Attributes:
        mark: x of a vertical line, such as a crossover.
    """

    kind: ClassVar[str] = "chart"
    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False
    mark: float | None = None


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    kind: ClassVar[str] = "words"
    text: str


@dataclass(frozen=True)
class Commands:
    """Shell lines a reader can repeat."""

    kind: ClassVar[str] = "commands"
    lines: tuple[str, ...]


Item = Grid | Facts | Strip | Chart | Words | Commands


@dataclass(frozen=True)
class Section:
    """A heading with items below it."""

    title: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    lead: str
    sections: tuple[Section, ...] = field(default_factory=tuple)


def number(value: object) -> str:
    """A figure with four digits that matter; text as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.3e}"
