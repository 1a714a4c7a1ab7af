"""Classification of images: fine-tunes a tower, or trains a linear probe on a frozen tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array

from vlp_jax import config as config_lib
from vlp_jax.models.classifier import Classifier
from vlp_jax.models.values import Pixels, keywords_of
from vlp_jax.models.vit import make_vit
from vlp_jax.objectives.base import Context, Examples, Field, Function, Objective, Params, of_images
from vlp_jax.objectives.class_loss import check_loss, loss_and_accuracy
from vlp_jax.objectives.compute import make_compute


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """Predicts the class of an image.

    Attributes:
      model: the tower and its head.
      class_loss: "softmax" or "sigmoid"; see `class_loss.CLASS_LOSSES`.
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

    def forward(self, params: Params, batch: Examples, context: Context) -> Examples:
        """Computes the cross-entropy and the accuracy of each example."""
        rngs = {"drop_path": context.rng}
        scores = self.model.apply({"params": params}, batch["image"], context.train, rngs=rngs)
        smoothing = self.label_smoothing if context.train else 0.0
        return loss_and_accuracy(scores, batch[self.label_field], self.class_loss, smoothing)

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
    check_loss(loss, label_smoothing)
    if classes < 2:
        raise ValueError(f"classes must be at least 2, not {classes}")
    how = make_compute(**compute)
    vit = config_lib.build(make_vit, image, "config.objective.image", compute=how)
    if vit.pooling == "none":
        raise ValueError("the image tower needs a pooling to end in one vector")
    model = Classifier(vit, classes, Pixels(tuple(image_mean), tuple(image_std)))
    return Classification(model, loss, label_smoothing, label_field)
