"""The parts of a page: sections of blocks, which the template shows by their `kind`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from markupsafe import Markup

GOOD, BAD, PLAIN = "good", "bad", "plain"  # tones; words beside them always say the same


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"  # no field: the same for all, and read by the template
    text: str


@dataclasses.dataclass(frozen=True)
class Tile:
    """A score that is shown large.

    Attributes:
      label: the name of the score.
      value: the score as text.
      notes: lines below it.
      change: (text, tone) of the difference from the baseline; None for none.
    """

    label: str
    value: str
    notes: Sequence[str] = ()
    change: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Scores side by side."""

    kind: ClassVar[str] = "tiles"
    tiles: Sequence[Tile]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A drawing with its heading.

    Attributes:
      title: the heading.
      svg: the drawing.
      caption: how to read it.
      natural: True if it has a size of its own and scrolls where there is less room.
    """

    title: str
    svg: Markup
    caption: str = ""
    natural: bool = False


@dataclasses.dataclass(frozen=True)
class Charts:
    """Drawings side by side, as many as there is room for."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
      text: its content.
      tone: its color.
      share: in [0, 1], drawn as a small bar before the text; None for no bar.
      mark: in [0, 1], marked on the bar, such as chance; None for no mark.
    """

    text: str
    tone: str = PLAIN
    share: float | None = None
    mark: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a head; the first cell of a row names it.

    Attributes:
      caption: the subject of the table.
      rows: cells; a row of one cell is a heading of the rows below it.
      numeric: indices of the columns that hold numbers.
    """

    kind: ClassVar[str] = "table"
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
      width, height: pixels of the image.
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
class Cards:
    """Cards side by side under a heading."""

    kind: ClassVar[str] = "cards"
    title: str
    cards: Sequence[Card]
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Code:
    """The content of a file."""

    kind: ClassVar[str] = "code"
    label: str
    text: str


@dataclasses.dataclass(frozen=True)
class Fold:
    """Blocks that are hidden until a reader unfolds them."""

    kind: ClassVar[str] = "fold"
    summary: str
    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Beside:
    """Blocks side by side, where there is room."""

    kind: ClassVar[str] = "beside"
    blocks: Sequence[Block]


Block = Text | Tiles | Charts | Table | Cards | Code | Fold | Beside


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page with a heading.

    Attributes:
      key: the target of links, unique on the page.
    """

    key: str
    title: str
    blocks: Sequence[Block]
