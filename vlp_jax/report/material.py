"""Everything that a report shows, collected before the page is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float

from vlp_jax.data.scan import Scan
from vlp_jax.encoders.subject import Findings, Subject
from vlp_jax.evaluators.retrieval import RetrievalOutcome
from vlp_jax.evaluators.zero_shot import ZeroShotOutcome
from vlp_jax.report import section_pictures, section_retrieval, section_zero_shot
from vlp_jax.report.examples import captions_and_images, images_at
from vlp_jax.report.paintings import FUNCTION, hidden_share, paint
from vlp_jax.report.section_data import scan_training_data
from vlp_jax.report.section_pictures import HeatMaps
from vlp_jax.training.restore import LoadedParameters

MOST_EVALUATORS = 4  # of a kind that are shown with examples


@dataclasses.dataclass(frozen=True)
class Material:
    """The scores, arrays and examples of a model.

    Attributes:
      findings: scores and outcomes of the evaluators.
      mistakes: zero-shot evaluator -> place in its data -> pixels.
      texts: retrieval evaluator -> its texts, in the order of its outcome.
      pairs: retrieval evaluator -> row of its outcome -> pixels.
      heat: images with their heat maps.
      views: reconstructions of a masked autoencoder; None for another model.
      hidden: share of the patches that the autoencoder does not see, in [0, 1].
      data: training data by part, or the reason why it cannot be read.
      parameters: number of parameters of the model.
    """

    findings: Findings
    mistakes: Mapping[str, Mapping[int, np.ndarray]]
    texts: Mapping[str, Sequence[str]]
    pairs: Mapping[str, Mapping[int, np.ndarray]]
    heat: Sequence[HeatMaps]
    views: Float[np.ndarray, "images 3 height width 3"] | None
    hidden: float | None
    data: Mapping[str, Scan] | str
    parameters: int

    def outcomes(self, kind: type) -> dict[str, object]:
        """Returns evaluator -> outcome of the first evaluators whose outcome is of a type."""
        found = {k: v for k, v in self.findings.outcomes.items() if isinstance(v, kind)}
        return dict(list(found.items())[:MOST_EVALUATORS])


def collect(subject: Subject, loaded: LoadedParameters, findings: Findings) -> Material:
    """Collects everything that a report shows; every process must call it."""
    views = _views(subject, loaded)
    material = Material(
        findings=findings,
        mistakes={},
        texts={},
        pairs={},
        heat=(),
        views=views,
        hidden=None if views is None else hidden_share(subject),
        data="",
        parameters=sum(leaf.size for leaf in jax.tree.leaves(loaded.params)),
    )
    if jax.process_index() != 0:
        return material
    return dataclasses.replace(material, **_examples(subject, loaded, material))


def _views(subject: Subject, loaded: LoadedParameters) -> np.ndarray | None:
    if FUNCTION not in subject.resources.functions:
        return None
    for name in subject.evaluators:
        if subject.config.evaluators[name].name == "reconstruction":
            return paint(subject, loaded, name, section_pictures.PAINTED)
    return None


def _examples(subject: Subject, loaded: LoadedParameters, material: Material) -> dict[str, object]:
    """Returns the fields of `Material` that only process 0 needs, which writes the page."""
    mistakes, texts, pairs, heat = {}, {}, {}, ()
    classes = material.outcomes(ZeroShotOutcome)
    for name, outcome in classes.items():
        places = outcome.index[section_zero_shot.mistakes(outcome)]
        mistakes[name] = images_at(subject, name, places)
    for name, outcome in material.outcomes(RetrievalOutcome).items():
        shown = section_retrieval.images_of(outcome, section_retrieval.choose(outcome))
        # Maps of one evaluator are enough: a text in an image costs 49 forward passes.
        heated = [] if heat else section_pictures.choose_heated(len(outcome.image))
        places = [int(outcome.index[row]) for row in {*shown, *heated}]
        texts[name], found = captions_and_images(subject, name, outcome.index, places)
        # Outcomes leave out images that could not be read, so rows are not places in the data.
        row_of = {int(place): row for row, place in enumerate(outcome.index)}
        pairs[name] = {row_of[place]: pixels for place, pixels in found.items()}
        if heated and jax.process_count() == 1:  # of several, this one alone cannot run the model
            first = next(iter(classes.values()), None)
            asked = [section_pictures.texts_for(r, outcome, texts[name], first) for r in heated]
            images = [pairs[name][row] for row in heated]
            heat = section_pictures.make_heat(subject, loaded, images, asked)
    data = scan_training_data(subject)
    return {"mistakes": mistakes, "texts": texts, "pairs": pairs, "heat": heat, "data": data}
