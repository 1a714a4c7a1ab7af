"""Everything that a report shows, collected before the page is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float

from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.data.scan import Scan
from vlp_jax.data.source_reader import RAW_TEXT
from vlp_jax.data.wording import captions_of
from vlp_jax.encoders.subject import Findings, Subject
from vlp_jax.errors import UserError
from vlp_jax.evaluators import merged_data
from vlp_jax.evaluators.retrieval import RetrievalOutcome
from vlp_jax.evaluators.zero_shot import ZeroShotOutcome
from vlp_jax.report import pictures, section_retrieval, section_zero_shot
from vlp_jax.report.pictures import HeatMaps
from vlp_jax.report.section_data import scan_training_data
from vlp_jax.training.restore import LoadedParameters

FUNCTION = "reconstruct"
MOST_EVALUATORS = 4  # of a kind that are shown with examples
_BATCH = 64


def paint(
    subject: Subject, loaded: LoadedParameters, evaluator: str, count: int
) -> Float[np.ndarray, "images 3 height width 3"]:
    """Makes three views of each of `count` images, float32 in [0, 1]: seen, painted, true.

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


def images_at(
    subject: Subject,
    name: str,
    places: Sequence[int],
    texts: list[str] | None = None,
    index: Sequence[int] = (),
) -> dict[int, np.ndarray]:
    """Reads images at `places` of an evaluator's data; returns place -> uint8 [height, width, 3].

    A list `texts` gets all texts of a retrieval evaluator in the order of its outcome, whose images
    are at the places `index`.
    """
    wanted, used, found = set(map(int, places)), set(map(int, index)), {}
    section = subject.config.evaluators[name]
    field = section.get("captions")
    extra = () if texts is None else (RAW_TEXT if field is None else field,)
    data = merged_data(subject.config.data, section)
    pipeline = EvalPipeline(
        data, subject.resources.tokenizer, batch_size=_BATCH, extra_fields=extra
    )
    for number, batch in enumerate(pipeline.batches()):
        # Data may be long, and the last place early.
        if texts is None and len(found) == len(wanted):
            break
        for row, place in enumerate(range(number * _BATCH, (number + 1) * _BATCH)):
            if place in used:
                value = batch[extra[0]][row]
                captions = [value] if field is None else captions_of(value)
                # One bad byte must not cost the page.
                texts += [caption.decode("utf-8", "replace") for caption in captions]
            if place in wanted:
                found[place] = np.asarray(batch["image"][row])
    return found


@dataclasses.dataclass(frozen=True)
class Material:
    """The scores, arrays and examples of a model.

    Attributes:
      views: reconstructions of a masked autoencoder; None for another model.
      hidden: share of the patches that the autoencoder does not see, in [0, 1].
      mistakes: zero-shot evaluator -> place in its data -> pixels.
      texts: retrieval evaluator -> its texts, in the order of its outcome.
      pairs: retrieval evaluator -> row of its outcome -> pixels.
      data: training data by part, or the reason why it cannot be read.
    """

    findings: Findings
    views: Float[np.ndarray, "images 3 height width 3"] | None
    hidden: float | None
    parameters: int
    mistakes: Mapping[str, Mapping[int, np.ndarray]] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    pairs: Mapping[str, Mapping[int, np.ndarray]] = dataclasses.field(default_factory=dict)
    heat: Sequence[HeatMaps] = ()
    data: Mapping[str, Scan] | str = ""

    def outcomes(self, kind: type) -> dict[str, object]:
        """Returns evaluator -> outcome of the first evaluators whose outcome is of a type."""
        found = {k: v for k, v in self.findings.outcomes.items() if isinstance(v, kind)}
        return dict(list(found.items())[:MOST_EVALUATORS])


def collect(subject: Subject, loaded: LoadedParameters, findings: Findings) -> Material:
    """Collects everything that a report shows; every process must call it."""
    kinds = {subject.config.evaluators[name].name: name for name in reversed(subject.evaluators)}
    views = None
    if FUNCTION in subject.resources.functions and "reconstruction" in kinds:
        views = paint(subject, loaded, kinds["reconstruction"], pictures.PAINTED)
    material = Material(
        findings=findings,
        views=views,
        hidden=None if views is None else hidden_share(subject),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(loaded.params)),
    )
    if jax.process_index() != 0:
        return material
    return dataclasses.replace(material, **_examples(subject, loaded, material))


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
        heated = [] if heat else pictures.choose_heated(len(outcome.image))
        places = [int(outcome.index[row]) for row in {*shown, *heated}]
        texts[name] = []
        found = images_at(subject, name, places, texts[name], outcome.index)
        # Outcomes leave out images that could not be read, so rows are not places in the data.
        row_of = {int(place): row for row, place in enumerate(outcome.index)}
        pairs[name] = {row_of[place]: pixels for place, pixels in found.items()}
        if heated and jax.process_count() == 1:  # of several, this one alone cannot run the model
            first = next(iter(classes.values()), None)
            asked = [pictures.texts_for(r, outcome, texts[name], first) for r in heated]
            images = [pairs[name][row] for row in heated]
            heat = pictures.make_heat(subject, loaded, images, asked)
    data = scan_training_data(subject)
    return {"mistakes": mistakes, "texts": texts, "pairs": pairs, "heat": heat, "data": data}
