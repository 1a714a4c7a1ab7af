"""Reconstructions of a masked autoencoder."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from vlp_jax.encoders.subject import Subject
from vlp_jax.errors import UserError
from vlp_jax.training.restore import LoadedParameters

FUNCTION = "reconstruct"


def paint(
    subject: Subject, loaded: LoadedParameters, evaluator: str, count: int
) -> Float[np.ndarray, "images 3 height width 3"]:
    """Returns three views of each of `count` images, float32 in [0, 1]: seen, painted, true.

    Raises:
      UserError: the objective of the run does not reconstruct, or there is no such evaluator.
    """
    if FUNCTION not in subject.resources.functions:
        raise UserError("the objective of this run does not paint: it is no masked autoencoder")
    if evaluator not in subject.config.evaluators:
        known = ", ".join(subject.config.evaluators) or "none"
        raise UserError(f"the run has no evaluator {evaluator!r} (it has: {known})")
    pipeline, views, found = subject.open_evaluation_data(evaluator), [], 0
    for batch in pipeline.batches():
        painted, _ = subject.resources.embed(loaded.params, iter([batch]), {"image": FUNCTION})
        views.append(painted["image"])
        found += len(views[-1])
        if found >= count:
            break
    return np.concatenate(views)[:count]


def hidden_share(subject: Subject) -> float | None:
    """Returns the share of hidden patches, in [0, 1]; None if the objective does not say."""
    kept = getattr(subject.objective, "kept", None)
    return None if kept is None else 1 - kept / subject.module.image.patches
