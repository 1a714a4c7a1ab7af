"""A model with its loss: the one interface between a task and the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlp_jax import config as config_lib
from vlp_jax.objectives.base import Objective
from vlp_jax.objectives.classification import make_classification
from vlp_jax.objectives.composite import Composite, make_composite
from vlp_jax.objectives.contrastive import make_contrastive
from vlp_jax.objectives.masked_autoencoding import make_masked_autoencoding
from vlp_jax.objectives.question_answering import make_question_answering


def make_objective(
    section: Mapping[str, Any],
    tokenizer: Any,
    microbatches: int = 1,
    where: str = "config.objective",
) -> Objective:
    """The objective that `config.objective` describes.

    Args:
      section: `name`, a key of `OBJECTIVES`, and the arguments of what it names.
      tokenizer: has `vocab_size`, `context_length`, `pad_id` and `eos_id`; None if there is none.
      microbatches: parts in which a batch is computed, one after the other.
      where: what the section is called in an error.

    Raises:
      UserError: unknown names or keys, sizes that do not fit each other.
    """
    constructor = config_lib.select(OBJECTIVES, section, where)
    return config_lib.build(
        constructor, section, where, tokenizer=tokenizer, microbatches=microbatches
    )


def _composite(*, parts: Mapping[str, Any], tokenizer: Any, microbatches: int) -> Composite:
    return make_composite(make_objective, parts, tokenizer=tokenizer, microbatches=microbatches)


OBJECTIVES = {
    "classification": make_classification,
    "composite": _composite,
    "contrastive": make_contrastive,
    "masked_autoencoding": make_masked_autoencoding,
    "question_answering": make_question_answering,
}
