"""Visual question answering: chooses an answer from a closed list."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from vlp_jax import config as config_lib
from vlp_jax.models.classifier import QuestionAnswerer, make_fusion
from vlp_jax.models.text import make_text
from vlp_jax.models.values import Pixels, keywords_of
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
)
from vlp_jax.objectives.class_loss import check_loss, loss_and_accuracy
from vlp_jax.objectives.compute import make_compute


@dataclasses.dataclass(frozen=True)
class QuestionAnswering(Objective):
    """Predicts the answer to a question about an image.

    Image and text towers are a dual encoder's, without pooling and projections. The fusion layers,
    which attend to the tokens of both, start from scratch (Dou et al. 2022, "METER"; Kim et al.
    2021, "ViLT", 4.2, for answers as classes).

    Attributes:
      model: the towers, the fusion and the head.
      class_loss: "softmax" or "sigmoid"; see `class_loss.CLASS_LOSSES`.
      label_smoothing: share of a label that is spread over all answers, in training alone.
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

    def forward(self, params: Params, batch: Examples, context: Context) -> Examples:
        """Computes the cross-entropy and the accuracy of each example."""
        rngs = {"drop_path": context.rng}
        inputs = (batch["image"], batch["text"])
        scores = self.model.apply({"params": params}, *inputs, context.train, rngs=rngs)
        smoothing = self.label_smoothing if context.train else 0.0
        return loss_and_accuracy(scores, batch[self.label_field], self.class_loss, smoothing)

    def functions(self) -> dict[str, Function]:
        """Returns `answer`: {"image": pixels, "text": token ids} to the score of each answer."""

        def answer(params: Params, x: Batch) -> Array:
            return self.model.apply({"params": params}, x["image"], x["text"])

        inputs = {name: field.kind for name, field in self.reads.items() if field.kind != LABELS}
        return {"answer": Function(answer, inputs, "the score of each answer")}


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
    check_loss(loss, label_smoothing)
    if tokenizer is None:
        raise ValueError("question answering needs config.tokenizer")
    if answers < 2:
        raise ValueError(f"answers must be at least 2, not {answers}")
    how = make_compute(**compute)
    ids = {
        name: getattr(tokenizer, name)
        for name in ("vocab_size", "context_length", "eos_id", "pad_id")
    }
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
