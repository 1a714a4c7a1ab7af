"""The section of samples: a model's answers, example by example."""

from __future__ import annotations

from vlp_jax.evaluators.base import Outcome
from vlp_jax.report.blocks import Card, Cards, Section
from vlp_jax.report.pictures import Album


def samples_section(name: str, outcome: Outcome, album: Album) -> Section | None:
    """Shows the samples of an evaluator, a card each; None if it has none."""
    cards = []
    for number, sample in enumerate(outcome.samples()):
        shown = None
        if sample.picture is not None:
            alt = next(iter(sample.texts.values()), f"example {number + 1}")
            shown = album.add(sample.drawn(), alt)
        if shown is not None or sample.picture is None:
            cards.append(Card([] if shown is None else [shown], list(sample.texts.items())))
    if not cards:
        return None
    text = "The first examples of a split that the model was not trained on."
    return Section(f"samples-{name}", name, [Cards(f"{name}: what the model says", cards, text)])
