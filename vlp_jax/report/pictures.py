"""Pictures inside a page, within a budget of bytes, and the sections that show them."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from vlp_jax.encoders.subject import Subject
from vlp_jax.evaluators.base import Outcome
from vlp_jax.evaluators.retrieval import RetrievalOutcome
from vlp_jax.evaluators.zero_shot import ZeroShotOutcome
from vlp_jax.inspection import heat_map, overlay
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.report.blocks import Card, Cards, Picture, Section
from vlp_jax.report.wording import percent
from vlp_jax.training.restore import LoadedParameters

LONGEST = 224  # pixels; larger ones are made smaller
_SMALL = 96  # pixels; up to here WebP would blur what little there is
_QUALITY = 82


class Album:
    """Encodes pictures until a budget of bytes in base64 is used up.

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
        """Makes a card of (pixels, description, label)s; None if one is missing or has no room."""
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


PAINTED = 12
HEATED = 6  # images
_CLASSES = 2  # of each image
_SEED = 1
_SHORT = 30  # letters of a text that stands under its map
VIEWS = ("seen", "painted", "true")


@dataclasses.dataclass(frozen=True)
class HeatMaps:
    """Heat maps of some texts in an image, in [0, 1]."""

    image: UInt8[np.ndarray, "height width 3"]
    texts: Sequence[str]
    maps: Float[np.ndarray, "texts height width"]


def choose_heated(rows: int) -> list[int]:
    """Chooses rows of an outcome by chance."""
    return sorted(np.random.default_rng(_SEED).permutation(rows)[:HEATED].tolist())


def texts_for(
    row: int, retrieval: RetrievalOutcome, texts: Sequence[str], classes: ZeroShotOutcome | None
) -> list[str]:
    """Returns an image's own first text, and the classes that it is most similar to."""
    own = [texts[int(np.flatnonzero(retrieval.owners == row)[0])]]
    if classes is not None:
        similar = classes.class_embeddings @ retrieval.image[row]
        own += [classes.class_names[n] for n in np.argsort(-similar)[:_CLASSES]]
    return list(dict.fromkeys(own))


def make_heat(
    subject: Subject,
    loaded: LoadedParameters,
    images: Sequence[np.ndarray],
    texts: Sequence[Sequence[str]],
) -> list[HeatMaps]:
    """Computes maps of several texts for each image; [] for a model that is no `DualEncoder`."""
    if not isinstance(subject.module, DualEncoder) or not images:
        return []
    # One batch of pairs, so that the model is compiled once.
    flat = [(image, text) for image, asked in zip(images, texts) for text in asked]
    tokens = subject.resources.tokens([text for _, text in flat])
    maps = heat_map(subject.module, loaded.params, np.stack([i for i, _ in flat]), tokens)
    found, start = [], 0
    for image, asked in zip(images, texts):
        found.append(HeatMaps(image, asked, maps[start : start + len(asked)]))
        start += len(asked)
    return found


def heat_section(found: Sequence[HeatMaps], album: Album) -> Section | None:
    """Shows images under their maps; None if there are none."""
    cards = []
    for heat in found:
        pictures, lines = [(heat.image, f"image: {heat.texts[0]}", "image")], []
        for number, (text, heated) in enumerate(zip(heat.texts, heat.maps), start=1):
            label = text if len(text) <= _SHORT else f"text {number}"
            if label != text:
                lines.append((label, text))
            pictures.append((overlay(heat.image, heated), f"heat map of {text}", label))
        cards.append(album.card(pictures, lines))
    text = (
        "The similarity of the text to the image when all but one window is hidden, for windows "
        "all over the image. Dark blue is least, yellow is most. The texts are the image's own "
        "text and the classes that it is most similar to. The images are chosen by chance, and "
        "the model was never told where anything is."
    )
    heading = "Which region of an image answers a text"
    return cards_section("heat", "Heat maps", heading, cards, text)


def paintings_section(
    views: Float[np.ndarray, "images 3 height width 3"] | None,
    hidden: float | None,
    album: Album,
) -> Section | None:
    """Shows what is seen, what is painted, and the truth; None without views or room."""
    if views is None:
        return None
    pixels = np.round(255 * np.clip(views, 0, 1)).astype(np.uint8)
    cards = [
        album.card([(view, f"image {n}, {name}", name) for view, name in zip(three, VIEWS)])
        for n, three in enumerate(pixels, start=1)
    ]
    share = "Patches" if hidden is None else f"{percent(hidden, 0)} of the patches"
    text = (
        f"{share} are hidden (grey) and painted by the model. It was not trained on these images."
    )
    return cards_section("painted", "Reconstructions", "What the model paints", cards, text)


def samples_section(name: str, outcome: Outcome, album: Album) -> Section | None:
    """Shows the samples of an evaluator, a card each; None if it has none."""
    cards = []
    for number, sample in enumerate(outcome.samples(), start=1):
        alt = next(iter(sample.texts.values()), f"example {number}")
        pictures = [] if sample.picture is None else [(sample.drawn(), alt, "")]
        cards.append(album.card(pictures, list(sample.texts.items())))
    text = "The first examples of a split that the model was not trained on."
    return cards_section(f"samples-{name}", name, f"{name}: what the model says", cards, text)
