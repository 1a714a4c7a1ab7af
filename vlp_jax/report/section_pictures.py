"""Sections of pictures: heat maps of texts in images, and reconstructions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from vlp_jax.encoders.subject import Subject
from vlp_jax.evaluators.retrieval import RetrievalOutcome
from vlp_jax.evaluators.zero_shot import ZeroShotOutcome
from vlp_jax.inspection import heat_map, overlay
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.report.blocks import Card, Cards, Section, Text
from vlp_jax.report.pictures import Album
from vlp_jax.report.wording import percent
from vlp_jax.training.restore import LoadedParameters

PAINTED = 12
HEATED = 6  # images
_CLASSES = 2  # of each image
_SEED = 1
_SHORT = 30  # letters of a text that stands under its map
VIEWS = ("seen", "painted", "true")


@dataclasses.dataclass(frozen=True)
class HeatMaps:
    """Heat maps of some texts in an image.

    Attributes:
      image: the pixels.
      texts: the texts that are looked for.
      maps: a heat map for each text, in [0, 1].
    """

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
        shown = [album.add(heat.image, f"image: {heat.texts[0]}", "image")]
        lines = []
        for number, (text, heated) in enumerate(zip(heat.texts, heat.maps), start=1):
            label = text if len(text) <= _SHORT else f"text {number}"
            if label != text:
                lines.append((label, text))
            shown.append(album.add(overlay(heat.image, heated), f"heat map of {text}", label))
        pictures = [picture for picture in shown if picture is not None]
        if len(pictures) == len(shown):  # a card without one of its pictures says too little
            cards.append(Card(pictures, lines))
    if not cards:
        return None
    title = "Which region of an image answers a text"
    text = (
        "How similar the text is to the image of which one window "
        "alone is shown, for windows all over it. Dark blue is least, yellow is most. The texts "
        "are the image's own and the classes that it is most similar to; the images are chosen by "
        "chance, and the model was never told where anything is."
    )
    return Section("heat", "Heat maps", [Cards(title, cards, text)])


def paintings_section(
    views: Float[np.ndarray, "images 3 height width 3"], hidden: float | None, album: Album
) -> Section | None:
    """Shows what is seen, what is painted, and the truth; None if there is no room."""
    cards = []
    for number, three in enumerate(views):
        pixels = np.round(255 * np.clip(three, 0, 1)).astype(np.uint8)
        shown = [
            album.add(view, f"image {number + 1}, {label}", label)
            for view, label in zip(pixels, VIEWS)
        ]
        pictures = [picture for picture in shown if picture is not None]
        if len(pictures) == len(VIEWS):
            cards.append(Card(pictures, []))
    if not cards:
        return None
    share = "Patches" if hidden is None else f"{percent(hidden, 0)} of the patches"
    text = f"{share} are hidden (grey) and painted by the model; images it was not trained on."
    return Section("painted", "Reconstructions", [Cards("What it paints", cards, text)])


def left_out(album: Album) -> list[Text]:
    """Returns a line if some pictures had no room."""
    if not album.left_out:
        return []
    return [Text(f"{album.left_out} pictures are left out, so that the page stays small.")]
