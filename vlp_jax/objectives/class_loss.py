"""Classification losses, for labels that are class numbers or one share for each class."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlp_jax.models.values import check_choice

Targets = Int[Array, " batch"] | Float[Array, "batch classes"]


def _softmax_loss(
    scores: Float[Array, "batch classes"], shares: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    return -jnp.sum(shares * jax.nn.log_softmax(scores), axis=-1)


def _sigmoid_loss(
    scores: Float[Array, "batch classes"], shares: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
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
        # one_hot gives zeros for a class out of range, which would look like a loss: `known` marks
        # it.
        shares = jax.nn.one_hot(targets, classes)
        known = (targets >= 0) & (targets < classes)
    else:
        shares, known = targets.astype(jnp.float32), jnp.ones(len(targets), bool)
    shares = (1 - label_smoothing) * shares + label_smoothing / classes
    return jnp.where(known, CLASS_LOSSES[kind](scores, shares), jnp.nan)


def loss_and_accuracy(
    scores: Float[Array, "batch classes"], targets: Targets, kind: str, label_smoothing: float
) -> dict[str, tuple[Float[Array, " batch"], Float[Array, " batch"]]]:
    """Computes `class_losses` and accuracy, as metrics of each example.

    With shares, the right class is the one with the largest share.
    """
    losses = class_losses(scores, targets, kind, label_smoothing)
    soft = not jnp.issubdtype(targets.dtype, jnp.integer)
    label = jnp.argmax(targets, axis=-1) if soft else targets
    hits = (jnp.argmax(scores, axis=-1) == label).astype(jnp.float32)
    one = jnp.ones_like(losses)
    return {"loss": (losses, one), "accuracy": (hits, one)}


def check_loss(kind: str, label_smoothing: float) -> None:
    """Raises ValueError for an unknown loss, or smoothing outside of [0, 1)."""
    check_choice("loss", kind, tuple(CLASS_LOSSES))
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
