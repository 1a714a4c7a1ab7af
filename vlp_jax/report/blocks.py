"""The parts of a page: sections of blocks, which the template shows by their `kind`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from markupsafe import Markup

GOOD, BAD, PLAIN = "good", "bad", "plain"  # tones; words beside them always say the same


class Block:
    """A part of a section. The template shows it by its kind."""

    @property
    def kind(self) -> str:
        """The name of the class in lower case."""
        return type(self).__name__.lower()


@dataclasses.dataclass(frozen=True)
class Text(Block):
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Tile:
    """A score that is shown large, with lines below it.

    Attributes:
      change: (text, tone) of the difference from the baseline; None for none.
    """

    label: str
    value: str
    notes: Sequence[str] = ()
    change: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Tiles(Block):
    """Scores side by side."""

    tiles: Sequence[Tile]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A drawing with its heading, and a caption that tells how to read it.

    Attributes:
      natural: True if it has a size of its own and scrolls where there is less room.
    """

    title: str
    svg: Markup
    caption: str = ""
    natural: bool = False


@dataclasses.dataclass(frozen=True)
class Charts(Block):
    """Drawings side by side, as many as there is room for."""

    charts: Sequence[Chart]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
      tone: its color.
      share: in [0, 1], drawn as a small bar before the text; None for no bar.
      mark: in [0, 1], marked on the bar, such as chance; None for no mark.
    """

    text: str
    tone: str = PLAIN
    share: float | None = None
    mark: float | None = None


@dataclasses.dataclass(frozen=True)
class Table(Block):
    """Rows under a head; the first cell of a row names it.

    Attributes:
      rows: cells; a row of one cell is a heading of the rows below it.
      numeric: indices of the columns that hold numbers.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    numeric: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image inside the page.

    Attributes:
      uri: "data:...".
      alt: a description for those who do not see it.
      label: a word above it.
    """

    uri: str
    alt: str
    width: int
    height: int
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Card:
    """Pictures with lines of text.

    Attributes:
      lines: (label, text) pairs.
      verdict: (text, tone); None for none.
    """

    pictures: Sequence[Picture]
    lines: Sequence[tuple[str, str]]
    verdict: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Cards(Block):
    """Cards side by side under a heading."""

    title: str
    cards: Sequence[Card]
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Code(Block):
    """The content of a file."""

    label: str
    text: str


@dataclasses.dataclass(frozen=True)
class Fold(Block):
    """Blocks that are hidden until a reader unfolds them."""

    summary: str
    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Beside(Block):
    """Blocks side by side, where there is room."""

    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page with a heading; `key` is the target of links, unique on the page."""

    key: str
    title: str
    blocks: Sequence[Block]
