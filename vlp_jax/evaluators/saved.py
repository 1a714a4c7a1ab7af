"""Saves the embeddings behind scores, so that anybody can compute the scores again."""

from __future__ import annotations

import os

import numpy as np
from etils import epath

from vlp_jax.evaluators.base import Outcome


def save_embeddings(outcome: Outcome, file: str | os.PathLike[str]) -> None:
    """Writes the arrays of an outcome, and its scores, as one .npz.

    The file holds `kind` (the name of the outcome's class), the arrays of `outcome.arrays()`, and
    `score_names` with `score_values`, float64. `python -m tools.compare_scores` reads it.
    """
    scores = outcome.scores()
    arrays = {
        **outcome.arrays(),
        "kind": np.array(type(outcome).__name__),
        "score_names": np.array(list(scores)),
        "score_values": np.array(list(scores.values()), np.float64),
    }
    with epath.Path(file).open("wb") as stream:
        np.savez(stream, **arrays)
