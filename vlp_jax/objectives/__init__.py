"""A model with its loss: the one interface between a task and the loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlp_jax import config as config_lib
from vlp_jax.objectives.base import Objective
from vlp_jax.objectives.contrastive import make_contrastive

OBJECTIVES = {"contrastive": make_contrastive}


def make_objective(section: Mapping[str, Any], tokenizer: Any) -> Objective:
    """The objective that `config.objective` describes.

    Args:
      section: `name`, a key of `OBJECTIVES`, and the arguments of what it names.
      tokenizer: has `vocab_size`, `context_length`, `pad_id` and `eos_id`.

    Raises:
      UserError: unknown names or keys, sizes that do not fit each other.
    """
    constructor = config_lib.select(OBJECTIVES, section, "config.objective")
    return config_lib.build(constructor, section, "config.objective", tokenizer=tokenizer)
