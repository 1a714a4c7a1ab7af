"""Evaluates accuracy on corrupted and on attacked images."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Float

from vlp_jax.errors import UserError
from vlp_jax.evaluators import corruptions as corruptions_lib
from vlp_jax.evaluators.attacks import PREFIX
from vlp_jax.evaluators.base import NUMBER, Change, Evaluator, Pairs, Resources
from vlp_jax.evaluators.class_lists import (
    check_field,
    check_labels,
    numbered,
    numbers_of_model,
    renumber,
)
from vlp_jax.evaluators.classification import label_ranks
from vlp_jax.evaluators.zero_shot import ZeroShot

TRUE = "true_label"  # field to score with; an attack takes "label" as its input
# Total length of PGD's steps, in radii (Madry et al. 2018).
REACH = 2.5


class Robustness(Evaluator):
    """Scores top-1 of a classifier on clean images, under common corruptions and under attacks.

    The classifier is the objective's `classify`, or a zero-shot classifier if `templates` are set.

    Args:
      data: images, with the class as a whole number in `label_field`.
      templates, class_names: see `ZeroShot`.
      corruptions: keys of `corruptions.CORRUPTIONS`; None for all, () for none.
      severities: severities of each corruption, 1 to 5.
      radii: largest changes of a pixel's value by an attack, on the scale of 0 to 255; () for no
        attacks.
      steps: number of PGD's steps; each has the length 2.5 * radius / steps.
      logit_scale: factor on the cosine similarity in the softmax that an attack on a zero-shot
        classifier climbs. If it is large, the softmax is flat where the classifier is sure, and the
        attack fails.
      seed: seed of all randomness.
    """

    SMOKE: ClassVar[Mapping[str, Any]] = {
        "templates": ("{}",),
        "corruptions": ("gaussian_noise", "contrast"),
        "severities": (5,),
        "radii": (8,),
        "steps": 2,
    }
    needs = ()

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        resources: Resources,
        label_field: str = "label",
        templates: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        corruptions: Sequence[str] | None = None,
        severities: Sequence[int] = corruptions_lib.SEVERITIES,
        radii: Sequence[float] = (1, 2, 4, 8),
        steps: int = 10,
        logit_scale: float = 1 / 0.07,
        seed: int = 0,
    ):
        chosen = corruptions_lib.CORRUPTIONS if corruptions is None else corruptions
        self._corruptions, self._severities = tuple(chosen), tuple(severities)
        self._radii, self._steps = tuple(radii), steps
        corruptions_lib.check(self._corruptions, self._severities)
        _check_attacks(self._radii, steps)
        if self._corruptions and not self._severities:
            raise UserError("robustness: severities is empty; set corruptions to () for none")
        self._resources, self._label_field = resources, label_field
        self._logit_scale, self._seed = logit_scale, seed
        names = {"class_names": class_names} if class_names else {}
        self._zero_shot = templates and ZeroShot(
            data=data, resources=resources, templates=templates, label_field=label_field, **names
        )
        self._function = "embed_image" if self._zero_shot else "classify"
        for name in (self._function, *(["embed_text"] if self._zero_shot else [])):
            if name not in resources.functions:
                advice = "" if self._zero_shot else "; for a zero-shot classifier set templates"
                raise UserError(f"robustness needs {name}, which the objective lacks{advice}")
        self._pipeline = resources.pipeline(data)
        check_field(self._pipeline, label_field, "robustness")
        self._numbers = self._zero_shot.numbers if self._zero_shot else None
        if self._numbers is None:
            of_model = numbers_of_model(resources, data, self._pipeline, label_field)
            self._numbers = functools.partial(renumber, numbers=of_model)

    def pairs(self, params: Any) -> Pairs:
        """Yields accuracies in [0, 1], and `examples`.

        - `clean`: without changes.
        - `NAME_SEVERITY` of a corruption, and `NAME`, its mean over the severities.
        - `corruption_mean` over all corruptions; `corruption_relative`, divided by `clean`.
        - `fgsm_RADIUS` and `pgd_RADIUS`: under attacks.
        """
        classes = self._zero_shot.class_embeddings(params) if self._zero_shot else None
        right = self._right(params, classes)
        clean = float(right.mean())
        yield "clean", clean
        means = []
        for name in self._corruptions:
            accuracies = []
            for severity in self._severities:
                change = functools.partial(_corrupted, name, severity, self._seed)
                accuracies.append(float(self._right(params, classes, change).mean()))
                yield f"{name}_{severity}", accuracies[-1]
            means.append(float(np.mean(accuracies)))
            yield name, means[-1]
        if means:
            yield "corruption_mean", float(np.mean(means))
            yield "corruption_relative", float(np.mean(means)) / clean if clean else 0.0
        for radius in self._radii:
            for name, settings in (("fgsm", fgsm(radius)), ("pgd", pgd(radius, self._steps))):
                attack = {"radius": radius, **settings}
                accuracy = float(self._right(params, classes, attack=attack).mean())
                yield f"{name}_{radius:g}", accuracy
        yield "examples", float(len(right))

    def _right(
        self,
        params: Any,
        classes: Float[np.ndarray, "classes dim"] | None,
        change: Change = dict,
        attack: Mapping[str, float] | None = None,
    ) -> np.ndarray:
        """Returns which images are classified right, after a change of the batches or an attack."""
        function, inputs, more = self._function, ("image",), None
        if attack is not None:
            # Arrays and not Python numbers: then one compiled program serves all attacks.
            more = {name: np.float32(value) for name, value in attack.items()}
            more |= {"seed": np.uint32(self._seed), "steps": np.int32(attack["steps"])}
            if classes is not None:
                more |= {"classes": classes, "logit_scale": np.float32(self._logit_scale)}
            function, inputs = PREFIX + function, ("image", "label", NUMBER)
        keep = (TRUE,) if attack is not None else (TRUE, NUMBER)
        scores, fields = self._resources.outputs(
            params, self._batches(), function, inputs, keep, change, more
        )
        scores = scores if classes is None or attack is not None else scores @ classes.T
        check_labels(fields[TRUE], scores.shape[1], self._label_field)
        return label_ranks(scores, fields[TRUE]) < 1

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        for batch in numbered(self._pipeline.batches()):
            label = self._numbers(batch[self._label_field])
            kept = {name: batch[name] for name in ("image", "mask", NUMBER)}
            yield {**kept, "label": label, TRUE: label}


def fgsm(radius: float) -> dict[str, float]:
    """Returns the settings of FGSM, one step to the border; see `attacks.attacked_images`."""
    return {"step_size": radius, "steps": 1, "random_start": 0.0}


def pgd(radius: float, steps: int) -> dict[str, float]:
    """Returns the settings of PGD, steps from a random start; see `attacks.attacked_images`."""
    return {"step_size": REACH * radius / steps, "steps": steps, "random_start": 1.0}


def _corrupted(
    name: str, severity: int, seed: int, batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    images = corruptions_lib.corrupt(batch["image"], batch[NUMBER], name, severity, seed)
    return {**batch, "image": images}


def _check_attacks(radii: Sequence[float], steps: int) -> None:
    bad = [r for r in radii if isinstance(r, bool) or not isinstance(r, int | float) or r <= 0]
    if bad:
        raise UserError(
            f"robustness: radii are numbers above 0 on the scale of 0 to 255, got {bad}"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"robustness: steps must be a whole number of at least 1, got {steps!r}")
