"""Objectives: models with their losses, by the names that `config.objective.name` takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from vlp_jax import config as config_lib
from vlp_jax.objectives.base import Objective
from vlp_jax.objectives.captioning import make_captioning
from vlp_jax.objectives.classification import make_classification, make_question_answering
from vlp_jax.objectives.coca import make_coca
from vlp_jax.objectives.composite import Composite, make_composite
from vlp_jax.objectives.contrastive import make_contrastive
from vlp_jax.objectives.masked_autoencoding import make_masked_autoencoding
from vlp_jax.objectives.weight import StepsOf


def make_objective(
    section: Mapping[str, Any],
    tokenizer: Any,
    steps_of: StepsOf | None = None,
    where: str = "config.objective",
) -> Objective:
    """Makes the objective that `config.objective` describes.

    Args:
      section: `name`, a key of `OBJECTIVES`, and the arguments of its constructor.
      tokenizer: has `vocab_size`, `context_length`, `pad_id` and `eos_id`; None without text.
      steps_of: converts durations to steps, for weights that change during a run; None where
        nothing is trained.
      where: the name of the section in errors.

    Raises:
      UserError: unknown names or keys, sizes that do not fit each other.
    """
    constructor = config_lib.select(OBJECTIVES, section, where)
    # A constructor takes these two only if it has a use for them.
    given = {"tokenizer": tokenizer, "steps_of": steps_of}
    asked = inspect.signature(constructor).parameters
    return config_lib.build(
        constructor, section, where, **{key: given[key] for key in given if key in asked}
    )


def _composite(*, parts: Mapping[str, Any], tokenizer: Any, steps_of: StepsOf | None) -> Composite:
    def make_part(section: Mapping[str, Any], where: str) -> Objective:
        return make_objective(section, tokenizer, steps_of, where)

    return make_composite(make_part, parts, steps_of)


OBJECTIVES = {
    "captioning": make_captioning,
    "classification": make_classification,
    "coca": make_coca,
    "composite": _composite,
    "contrastive": make_contrastive,
    "masked_autoencoding": make_masked_autoencoding,
    "question_answering": make_question_answering,
}
