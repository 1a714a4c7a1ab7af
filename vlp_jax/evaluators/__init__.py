"""Evaluators, by the names that `config.evaluators.NAME.name` takes. Each scores a whole split."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlp_jax import config as config_lib
from vlp_jax.data.wording import Wording, wording_of
from vlp_jax.errors import UserError
from vlp_jax.evaluators.base import Evaluator, Resources
from vlp_jax.evaluators.captioning import Captions, Likelihood
from vlp_jax.evaluators.classification import Accuracy, Answers
from vlp_jax.evaluators.frozen_features import FewShot, Knn
from vlp_jax.evaluators.geometry import Geometry
from vlp_jax.evaluators.linear_probe import LinearProbe
from vlp_jax.evaluators.loss import Loss
from vlp_jax.evaluators.reconstruction import Reconstruction
from vlp_jax.evaluators.retrieval import Retrieval
from vlp_jax.evaluators.robustness import Robustness
from vlp_jax.evaluators.zero_shot import ZeroShot

EVALUATORS = {
    "accuracy": Accuracy,
    "answers": Answers,
    "captions": Captions,
    "few_shot": FewShot,
    "geometry": Geometry,
    "knn": Knn,
    "likelihood": Likelihood,
    "linear_probe": LinearProbe,
    "loss": Loss,
    "reconstruction": Reconstruction,
    "retrieval": Retrieval,
    "robustness": Robustness,
    "zero_shot": ZeroShot,
}

# Keys of an evaluator's section that are not arguments of its constructor.
COMMON_KEYS = ("data", "every", "train_data")


def merged_data(train_data: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an evaluator's data: its changes to the training data, if of the same source."""
    changes = dict(section.get("data", {}).items())
    if changes.get("source", train_data.get("source")) != train_data.get("source"):
        return changes
    return {**dict(train_data.items()), **changes}


def differing_wordings(
    sections: Mapping[str, Any], train_data: Mapping[str, Any], wording: Wording
) -> tuple[str, ...]:
    """Returns a line for each evaluator that preprocesses its texts in another way than the run."""
    notes = []
    for key in sorted(sections):
        if not getattr(EVALUATORS.get(sections[key].get("name")), "reads_text", False):
            continue
        theirs = wording_of(merged_data(train_data, sections[key]))[0]
        if theirs != wording:
            notes.append(
                f"the texts of config.evaluators.{key} go through other operations ({theirs}) than "
                f"the training texts ({wording}): set config.evaluators.{key}.data.preprocess"
            )
    return tuple(notes)


def make_evaluators(
    sections: Mapping[str, Any], train_data: Mapping[str, Any], resources: Resources
) -> dict[str, Evaluator]:
    """Makes an evaluator for each section of `config.evaluators`, under the section's key.

    A section has `name` (a key of `EVALUATORS`), `data` (differences from `config.data`), `every`
    (a duration) and the arguments of the evaluator. For an evaluator that trains a classifier,
    `train_data` has the differences from the data that it tests on.

    Raises:
      UserError: an unknown name or key, data that does not exist, or a function that the objective
        does not have.
    """
    if resources.train_data is None:
        resources = dataclasses.replace(resources, train_data=train_data)
    evaluators = {}
    for key in sorted(sections):
        section, where = sections[key], f"config.evaluators.{key}"
        constructor = config_lib.select(EVALUATORS, section, where)
        missing = sorted(set(constructor.needs) - set(resources.functions))
        if missing:
            raise UserError(f"{where} needs {', '.join(missing)}, which the objective lacks")
        data = merged_data(train_data, section)
        arguments = {k: v for k, v in section.items() if k not in COMMON_KEYS}
        if "train_data" in section:
            # It differs from the data that is tested on, and not from the run's training data.
            arguments["train_data"] = merged_data(data, {"data": section["train_data"]})
        evaluators[key] = config_lib.build(
            constructor, arguments, where, data=data, resources=resources
        )
    return evaluators
