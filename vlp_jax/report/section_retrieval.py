"""The section of retrieval: ranks, examples that were found, and the worst errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from vlp_jax.evaluators.retrieval import RetrievalOutcome
from vlp_jax.report.blocks import BAD, GOOD, Block, Card, Cards, Chart, Charts, Section
from vlp_jax.report.charts import bars
from vlp_jax.report.pictures import Album
from vlp_jax.report.wording import percent, plain

GOOD_ONES, BAD_ONES = 4, 6
_SEED = 0
_MOST_LETTERS = 160
_EDGES = (1, 5, 10, 100)  # ranks of the histogram


@dataclasses.dataclass(frozen=True)
class ShownExamples:
    """Rows that are shown: images and texts whose answer is ranked first, or lowest."""

    found_images: Int[np.ndarray, " few"]
    lost_images: Int[np.ndarray, " few"]
    found_texts: Int[np.ndarray, " few"]
    lost_texts: Int[np.ndarray, " few"]


def choose(outcome: RetrievalOutcome) -> ShownExamples:
    """Chooses some queries of rank 1 by chance, and the queries of the lowest ranks."""
    # A fixed seed: a report of the same model shows the same examples.
    rng = np.random.default_rng(_SEED)
    chosen = []
    for ranks in (outcome.image_to_text.ranks(), outcome.text_to_image.ranks()):
        found = np.flatnonzero(ranks == 1)
        some = rng.permutation(found)[:GOOD_ONES]
        worst = np.argsort(-ranks, kind="stable")[:BAD_ONES]
        chosen += [np.sort(some), worst[ranks[worst] > 1]]
    return ShownExamples(*chosen)


def images_of(outcome: RetrievalOutcome, choice: ShownExamples) -> list[int]:
    """Returns the rows of all images that a page of `choice` shows."""
    texts = np.concatenate([choice.found_texts, choice.lost_texts])
    rows = [*choice.found_images, *choice.lost_images, *outcome.owners[texts]]
    rows += [int((outcome.image @ outcome.text[text]).argmax()) for text in texts]
    return sorted({int(row) for row in rows})


def retrieval_section(
    name: str,
    outcome: RetrievalOutcome,
    texts: Sequence[str],
    images: Mapping[int, np.ndarray],
    album: Album,
) -> Section:
    """Builds charts of ranks, and cards of examples; `images` are those of `images_of`."""
    choice = choose(outcome)
    page = _Page(outcome, texts, images, album)
    blocks: list[Block] = [Charts([_ranks("image", outcome), _ranks("text", outcome)])]
    for title, cards, note in (
        (
            "Images whose text is ranked first",
            [page.by_image(row) for row in choice.found_images],
            "Chosen by chance among the images at rank 1.",
        ),
        (
            "Images whose text is ranked lowest",
            [page.by_image(row) for row in choice.lost_images],
            "The worst errors. In brackets: cosine similarity.",
        ),
        (
            "Texts whose image is ranked first",
            [page.by_text(row) for row in choice.found_texts],
            "Chosen by chance among the texts at rank 1.",
        ),
        (
            "Texts whose image is ranked lowest",
            [page.by_text(row) for row in choice.lost_texts],
            "The worst errors: the image that is ranked first, and the right image.",
        ),
    ):
        if shown := [card for card in cards if card]:
            blocks.append(Cards(title, shown, note))
    title = "Retrieval" if name == "retrieval" else f"Retrieval: {name}"
    return Section(f"retrieval-{name}", title, blocks)


@dataclasses.dataclass(frozen=True)
class _Page:
    outcome: RetrievalOutcome
    texts: Sequence[str]
    images: Mapping[int, np.ndarray]
    album: Album

    def by_image(self, row: int) -> Card | None:
        """Shows an image with the text that is ranked first, and its own best text."""
        similar = self.outcome.text @ self.outcome.image[row]
        own = np.flatnonzero(self.outcome.owners == row)
        best, first = own[similar[own].argmax()], int(similar.argmax())
        rank = float(self.outcome.image_to_text.ranks()[row])
        lines = [("ranked first", f"{self._text(first)} ({similar[first]:.2f})")]
        if rank > 1 or self._text(first) != self._text(best):
            more = f", best of {len(own)}" if len(own) > 1 else ""
            lines.append((f"its own{more}", f"{self._text(best)} ({similar[best]:.2f})"))
        pictures = [(self.images.get(row), f"shown for: {self._text(best)}", "")]
        return self.album.card(pictures, lines, _verdict(rank, len(self.texts)))

    def by_text(self, row: int) -> Card | None:
        """Shows a text with the image that is ranked first, and its own image."""
        similar = self.outcome.image @ self.outcome.text[row]
        own, first = int(self.outcome.owners[row]), int(similar.argmax())
        rank = float(self.outcome.text_to_image.ranks()[row])
        # Ties share a mean rank, so the right image may come first and have a rank above 1.
        alike = rank == 1 or own == first
        text, right = self._text(row), self.images.get(own)
        if alike:
            pictures = [(right, f"found for: {text}", "")]
        else:
            wrong = (self.images.get(first), f"ranked first for: {text}", "ranked first")
            pictures = [wrong, (right, f"the right image: {text}", "right")]
        lines = [("text", text)]
        similarity = f"{similar[own]:.2f}" if alike else f"{similar[first]:.2f}, {similar[own]:.2f}"
        lines.append(("similarity", similarity))
        return self.album.card(pictures, lines, _verdict(rank, len(self.outcome.image)))

    def _text(self, row: int) -> str:
        text = self.texts[row]
        return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…"


def _verdict(rank: float, total: int) -> tuple[str, str]:
    text = f"rank {plain(rank)} of {total:,}"
    return (text, GOOD) if rank == 1 else (text, BAD)


def _ranks(query: str, outcome: RetrievalOutcome) -> Chart:
    """Draws the share of queries whose right answer has each rank."""
    ranks = (outcome.image_to_text if query == "image" else outcome.text_to_image).ranks()
    edges, shares, low = (*_EDGES, float("inf")), {}, 0.0
    for edge in edges:
        inside = (ranks > low) & (ranks <= edge)
        start = int(low) + 1
        name = f"{start}" if edge == start else f"{start} to {edge:g}"
        shares[f"above {low:g}" if edge == edges[-1] else f"rank {name}"] = float(inside.mean())
        low = edge
    texts = {name: percent(share) for name, share in shares.items()}
    other = "text" if query == "image" else "image"
    label = f"Ranks of the right {other}, by {query}: " + ", ".join(
        f"{name} {text}" for name, text in texts.items()
    )
    median = plain(float(np.median(ranks)))
    return Chart(f"From {query} to {other}", bars(shares, texts, label), f"Median rank {median}.")
