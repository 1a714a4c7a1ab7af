"""A run that has begun: config, tokenizer, objective, checkpoints, and how it takes its inputs."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vlp_jax.data.ops import in_order
from vlp_jax.data.pipeline import split_mixture
from vlp_jax.data.sources.base import as_plain
from vlp_jax.data.tokenizers import Tokenizer
from vlp_jax.data.wording import Wording, common_wording, worded_parts
from vlp_jax.interop.base import INTERPOLATIONS
from vlp_jax.objectives import Objective, make_objective
from vlp_jax.training import checkpoint
from vlp_jax.training import workdir as workdir_lib
from vlp_jax.training.restore import SavedParameters

# How images come to the model's size, by the operation in `data.preprocess` that brings them there.
RESIZED_BY = {"resize": "squash", "resize_shortest_and_center_crop": "crop"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has begun: the resolved config in its workdir. No training data is opened."""

    workdir: epath.Path
    config: ConfigDict

    @classmethod
    def open(cls, workdir: str | os.PathLike[str]) -> Run:
        """Opens the run in `workdir`; UserError if there is none, or its config cannot be read."""
        folder = checkpoint.absolute(workdir)
        return cls(folder, workdir_lib.load_config(folder))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the run; None if it has no text. UserError if it is gone."""
        return workdir_lib.open_kept_tokenizer(self.workdir, self.config)

    @functools.cached_property
    def objective(self) -> Objective:
        """The objective, as the config describes it; of a composite, the whole."""
        return make_objective(self.config.objective, self.tokenizer)

    def steps(self) -> list[int]:
        """The steps of its checkpoints, in order."""
        return checkpoint.saved_steps(self.workdir)

    def saved(self, step: int | None = None, choice: str = "auto") -> SavedParameters:
        """Looks up the parameters of `step` (None: the newest), one of `restore.CHOICES`."""
        step = checkpoint.choose_step(self.workdir, step)
        return SavedParameters.of(self.workdir, step, choice)

    @property
    def wording(self) -> tuple[Wording, tuple[str, ...]]:
        """See `text_wording`."""
        return text_wording(self.config, self.objective)


def text_wording(config: ConfigDict, objective: Objective) -> tuple[Wording, tuple[str, ...]]:
    """How a run words all texts that it embeds, and notes on what that does not say."""
    fed = [
        part.data
        for part in objective.parts().values()
        if "embed_text" in part.objective.functions()
    ]
    parts = []
    # dict.fromkeys drops repetitions and keeps the order. Without a part that embeds texts, the
    # main dataset counts.
    for name in dict.fromkeys(fed or [None]):
        section = config.data if name is None else config.extra_data[name]
        parts += [
            (part if name is None else f"{name}/{part}", weight, wording)
            for part, weight, wording in worded_parts(section)
        ]
    return common_wording(parts)


def bounded(objective: Objective, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters with the logit scale that the loss saw: others do not bound it again."""
    bound = getattr(objective, "max_logit_scale", 0.0)
    if not bound or "logit_scale" not in parameters:
        return parameters
    scale = np.minimum(parameters["logit_scale"], np.float32(np.log(bound)))
    return {**parameters, "logit_scale": scale}


def resizing(config: ConfigDict, notes: list[str]) -> dict[str, str]:
    """`resize` and `interpolation` of the images that a run evaluates on, or else trains on.

    `notes` gets a line for what the image processors of others cannot do.
    """
    sections = [e.data for e in config.evaluators.values() if "preprocess" in e.get("data", {})]
    for section in [*sections, *split_mixture(as_plain(config.data))[0].values()]:
        for name, arguments in in_order(section.get("preprocess")):
            if name in RESIZED_BY:
                method = arguments.get("method", "bicubic")
                if not arguments.get("antialias", True):
                    notes.append(
                        "the run resizes without antialiasing, which image processors always do"
                    )
                if method in INTERPOLATIONS:
                    return {"resize": RESIZED_BY[name], "interpolation": method}
                notes.append(f"the run resizes by {method!r}, which is written as bicubic")
                return {"resize": RESIZED_BY[name]}
    notes.append(
        "the run does not say how whole images come to the model's size: they are squashed "
        "bicubically (or give --resize and --interpolation)"
    )
    return {}
