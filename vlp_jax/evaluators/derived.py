"""Functions that evaluators call and that follow from any objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlp_jax.evaluators.attacks import attack_functions
from vlp_jax.evaluators.loss import loss_functions
from vlp_jax.objectives import Objective


def functions_of(objective: Objective) -> dict[str, Callable[..., Any]]:
    """The objective's own functions, its loss on examples, and attacks on its classifiers.

    They cost nothing until one is called.
    """
    own = objective.functions()
    return {**loss_functions(objective), **attack_functions(own), **own}
