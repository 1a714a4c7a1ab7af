"""Classification of images and of questions about images: fine-tuning, probing, VQA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlp_jax import config as config_lib
from vlp_jax.models.classifier import Classifier, QuestionAnswerer, make_fusion
from vlp_jax.models.text import make_text
from vlp_jax.models.values import Pixels, check_choice, keywords_of
from vlp_jax.models.vit import make_vit
from vlp_jax.objectives.base import (
    LABELS,
    Batch,
    Context,
    Examples,
    Field,
    Function,
    Objective,
    Params,
    of_images,
)
from vlp_jax.objectives.compute import from_tokenizer, make_compute

Targets = Int[Array, " batch"] | Float[Array, "batch classes"]


def _softmax_loss(scores: Array, shares: Array) -> Array:
    return -jnp.sum(shares * jax.nn.log_softmax(scores), axis=-1)


def _sigmoid_loss(scores: Array, shares: Array) -> Array:
    yes, no = jax.nn.log_sigmoid(scores), jax.nn.log_sigmoid(-scores)
    return -jnp.sum(shares * yes + (1 - shares) * no, axis=-1)


# softmax: exactly one class is right. sigmoid: each class is a separate yes-or-no question, and the
# losses of all classes are added (Beyer et al. 2020, "Are we done with ImageNet?", 4.2; ViLT, 4.2).
CLASS_LOSSES: dict[str, Callable[[Array, Array], Array]] = {
    "softmax": _softmax_loss,
    "sigmoid": _sigmoid_loss,
}


def class_losses(
    scores: Float[Array, "batch classes"], targets: Targets, kind: str, label_smoothing: float = 0.0
) -> Float[Array, " batch"]:
    """Computes the cross-entropy of each example, in float32.

    Args:
      scores: logits, before softmax or sigmoid.
      targets: the class of each example, or shares of all classes, as MixUp makes them.
      kind: a key of `CLASS_LOSSES`.
      label_smoothing: part of the label that is spread evenly over all classes (Szegedy et al.
        2016, "Rethinking the Inception Architecture", 7).

    Returns:
      The loss of each example; NaN for a class number out of range. A NaN makes the guard skip the
      step and report it.
    """
    scores = scores.astype(jnp.float32)
    classes = scores.shape[-1]
    if jnp.issubdtype(targets.dtype, jnp.integer):
        # For a class out of range one_hot gives zeros, which would look like a loss.
        shares = jax.nn.one_hot(targets, classes)
        known = (targets >= 0) & (targets < classes)
    else:
        shares, known = targets.astype(jnp.float32), jnp.ones(len(targets), bool)
    shares = (1 - label_smoothing) * shares + label_smoothing / classes
    return jnp.where(known, CLASS_LOSSES[kind](scores, shares), jnp.nan)


class ClassObjective(Objective):
    """Base of objectives that score classes and read them from the field `label_field`."""

    class_loss: str
    label_smoothing: float
    label_field: str

    def forward(self, params: Params, batch: Examples, context: Context) -> Examples:
        """Computes the cross-entropy and the accuracy of each example.

        With shares, the right class is the one with the largest share.
        """
        inputs = [batch[name] for name, field in self.reads.items() if field.kind != LABELS]
        rngs = {"drop_path": context.rng}
        scores = self.model.apply({"params": params}, *inputs, context.train, rngs=rngs)
        targets = batch[self.label_field]
        smoothing = self.label_smoothing if context.train else 0.0
        losses = class_losses(scores, targets, self.class_loss, smoothing)
        label = targets if targets.ndim == 1 else jnp.argmax(targets, axis=-1)
        hits = (jnp.argmax(scores, axis=-1) == label).astype(jnp.float32)
        one = jnp.ones_like(losses)
        return {"loss": (losses, one), "accuracy": (hits, one)}


@dataclasses.dataclass(frozen=True)
class Classification(ClassObjective):
    """Predicts the class of an image.

    Attributes:
      model: the tower and its head.
      class_loss: "softmax" or "sigmoid"; see `CLASS_LOSSES`.
      label_smoothing: share of a label that is spread over all classes, in training alone.
      label_field: the field of a batch with class numbers, or with shares of all classes (MixUp).
    """

    model: Classifier
    class_loss: str = "softmax"
    label_smoothing: float = 0.0
    label_field: str = "label"

    @property
    def reads(self) -> dict[str, Field]:
        """The fields of the loss: an image and its class."""
        return {
            "image": Field.pixels(self.model.image.image_size),
            self.label_field: Field.labels(self.model.classes, "classes"),
        }

    def functions(self) -> dict[str, Function]:
        """Returns `classify` (the score of each class) and `embed_image` (unit vectors).

        Both take images with values in [0, 255]. The vectors are the head's input, normalized.
        """

        def apply(method: str | None) -> Callable[..., Array]:
            return lambda params, x: self.model.apply({"params": params}, x, method=method)

        return {
            "classify": of_images(apply(None), "the score of each class"),
            "embed_image": of_images(apply("embed_image"), "unit vectors of what the head sees"),
        }


@dataclasses.dataclass(frozen=True)
class QuestionAnswering(ClassObjective):
    """Predicts the answer to a question about an image, from a closed list.

    Image and text towers are a dual encoder's, without pooling and projections. The fusion layers,
    which attend to the tokens of both, start from scratch (Dou et al. 2022, "METER"; Kim et al.
    2021, "ViLT", 4.2, for answers as classes).

    Attributes:
      model: the towers, the fusion and the head.
      class_loss, label_smoothing: see `Classification`.
      label_field: the field of a batch with the answer's number, or with shares of all answers.
    """

    model: QuestionAnswerer
    class_loss: str = "softmax"
    label_smoothing: float = 0.0
    label_field: str = "answer"

    @property
    def reads(self) -> dict[str, Field]:
        """The fields of the loss: an image, a question and its answer."""
        return {
            "image": Field.pixels(self.model.image.image_size),
            "text": Field.tokens(self.model.text.context_length),
            self.label_field: Field.labels(self.model.answers, "answers"),
        }

    def functions(self) -> dict[str, Function]:
        """Returns `answer`: {"image": pixels, "text": token ids} to the score of each answer."""

        def answer(params: Params, x: Batch) -> Array:
            return self.model.apply({"params": params}, x["image"], x["text"])

        inputs = {name: field.kind for name, field in self.reads.items() if field.kind != LABELS}
        return {"answer": Function(answer, inputs, "the score of each answer")}


def _check(loss: str, label_smoothing: float, what: str, count: int) -> None:
    check_choice("loss", loss, tuple(CLASS_LOSSES))
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    if count < 2:
        raise ValueError(f"{what} must be at least 2, not {count}")


@keywords_of(make_compute)
def make_classification(
    *,
    image: Mapping[str, Any],
    classes: int,
    loss: str = "softmax",
    label_smoothing: float = 0.0,
    label_field: str = "label",
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
    **compute: Any,
) -> Classification:
    """Makes the `Classification` that `config.objective` describes.

    Args:
      image: arguments of `make_vit`, with a pooling.
      classes: the number of classes.
      loss, label_smoothing, label_field: see `Classification`.
      compute: see `make_compute`.

    Raises:
      ValueError: an unknown variant, loss or dtype, fewer than two classes, smoothing outside of
        [0, 1), or a tower without pooling.
    """
    _check(loss, label_smoothing, "classes", classes)
    how = make_compute(**compute)
    vit = config_lib.build(make_vit, image, "config.objective.image", compute=how)
    if vit.pooling == "none":
        raise ValueError("the image tower needs a pooling to end in one vector")
    model = Classifier(vit, classes, Pixels(tuple(image_mean), tuple(image_std)))
    return Classification(model, loss, label_smoothing, label_field)


@keywords_of(make_compute)
def make_question_answering(
    *,
    tokenizer: Any,
    image: Mapping[str, Any],
    text: Mapping[str, Any],
    fusion: Mapping[str, Any],
    answers: int,
    loss: str = "softmax",
    label_smoothing: float = 0.0,
    label_field: str = "answer",
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
    **compute: Any,
) -> QuestionAnswering:
    """Makes the `QuestionAnswering` that `config.objective` describes.

    Args:
      tokenizer: gives the text tower its vocabulary and context length.
      image, text: arguments of `make_vit` and `make_text`; the pooling is always "none".
      fusion: arguments of `make_fusion`.
      answers: the number of answers.
      loss, label_smoothing, label_field: see `QuestionAnswering`.
      compute: see `make_compute`.

    Raises:
      ValueError: an unknown variant, loss or dtype, no tokenizer, or a number out of range.
    """
    ids = from_tokenizer(tokenizer, "question answering")
    _check(loss, label_smoothing, "answers", answers)
    how = make_compute(**compute)
    # A tower pretrained with "cls" pooling has a class token; here it is one more image token.
    token = {"class_token": image.get("pooling", "cls") == "cls"}
    model = QuestionAnswerer(
        config_lib.build(
            make_vit, {**token, **image, "pooling": "none"}, "config.objective.image", compute=how
        ),
        config_lib.build(
            make_text, {**text, "pooling": "none"}, "config.objective.text", compute=how, **ids
        ),
        config_lib.build(make_fusion, fusion, "config.objective.fusion", compute=how),
        answers,
        Pixels(tuple(image_mean), tuple(image_std)),
    )
    return QuestionAnswering(model, loss, label_smoothing, label_field)
