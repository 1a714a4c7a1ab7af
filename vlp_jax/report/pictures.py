"""Pictures inside a page, within a budget of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from vlp_jax.report.blocks import Card, Cards, Picture, Section

LONGEST = 224  # pixels; larger ones are made smaller
_SMALL = 96  # pixels; up to here WebP would blur what little there is
_QUALITY = 82


class Album:
    """Encodes pictures until a budget of bytes is used up.

    Args:
      max_bytes: of all pictures together, in base64.

    Attributes:
      left_out: number of pictures that had no room.
    """

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes
        self.left_out = 0

    def add(
        self, image: UInt8[np.ndarray, "height width 3"], alt: str, label: str = ""
    ) -> Picture | None:
        """Encodes an array as a picture; returns None if there is no room left."""
        shown = PIL.Image.fromarray(np.ascontiguousarray(image))
        shown.thumbnail((LONGEST, LONGEST), PIL.Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        kind = "png" if max(shown.size) <= _SMALL else "webp"
        options = {"optimize": True} if kind == "png" else {"quality": _QUALITY, "method": 4}
        shown.save(stream, kind, **options)
        uri = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
        if len(uri) > self._left:
            self.left_out += 1
            return None
        # Counted as base64, which is what makes a page large.
        self._left -= len(uri)
        return Picture(uri, alt, *shown.size, label)

    def card(
        self,
        pictures: Sequence[tuple[UInt8[np.ndarray, "height width 3"] | None, str, str]],
        lines: Sequence[tuple[str, str]] = (),
        verdict: tuple[str, str] | None = None,
    ) -> Card | None:
        """Makes a card; returns None if a picture is missing or has no room.

        Args:
          pictures: (pixels, description, label) of each; pixels are None if they cannot be read.
          lines, verdict: as in `Card`.
        """
        # A card without one of its pictures would say too little.
        if any(pixels is None for pixels, *_ in pictures):
            return None
        shown = [self.add(*picture) for picture in pictures]
        return None if None in shown else Card(shown, lines, verdict)


def cards_section(
    key: str, title: str, heading: str, cards: Iterable[Card | None], text: str
) -> Section | None:
    """Makes a section of the cards that are there; None if there are none."""
    kept = [card for card in cards if card is not None]
    return Section(key, title, [Cards(heading, kept, text)]) if kept else None
