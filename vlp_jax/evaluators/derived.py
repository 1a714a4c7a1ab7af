"""Derives functions for evaluators from any objective: its loss on examples, and attacks."""

from __future__ import annotations

from collections.abc import Mapping

from vlp_jax.evaluators.attacks import attack_functions
from vlp_jax.evaluators.loss import loss_functions
from vlp_jax.objectives import Objective
from vlp_jax.objectives.base import Function


def evaluator_functions(objective: Objective) -> dict[str, Function]:
    """Returns the objective's functions, its loss on examples, and attacks on its classifiers.

    Nothing is compiled until a function is called.
    """
    return {**loss_functions(objective), **with_attacks(objective.functions())}


def with_attacks(functions: Mapping[str, Function]) -> dict[str, Function]:
    """Adds attacks on the functions that classify."""
    return {**attack_functions(functions), **functions}
