"""Computes the cross-entropy of tokens in chunks, because all scores at once may not fit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK_BYTES = 2**27  # largest size of the float32 scores in memory at once


class TokenLosses(NamedTuple):
    """The loss of each target token, and whether it was predicted.

    Attributes:
      loss: cross-entropy, float32.
      hit: True if no token has a higher score than the target.
    """

    loss: Float[Array, "batch tokens"]
    hit: Bool[Array, "batch tokens"]


def token_losses(
    score: Callable[[Float[Array, "batch some width"]], Float[Array, "batch some vocab"]],
    features: Float[Array, "batch tokens width"],
    labels: Int[Array, "batch tokens"],
    vocab_size: int,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenLosses:
    """Computes the cross-entropy of each token.

    A chunk is a few token positions of all examples. Its scores are computed again in the backward
    pass, so that they need not be kept.

    Args:
      score: features -> scores. Parameters that it closes over get their gradients.
      labels: the target tokens.
      label_smoothing: part of a label that is spread evenly over all tokens.
      z_loss: factor on the squared logarithm of the softmax's denominator, which is added to the
        loss. It keeps scores from drifting (Chowdhery et al. 2022, "PaLM", 5, with 1e-4).
      chunk_bytes: largest size of the scores in memory at once.
    """
    batch, tokens = labels.shape
    # 4 bytes for each float32 score of a place: [batch, vocab].
    places = max(1, min(tokens, chunk_bytes // (4 * batch * vocab_size)))
    one = functools.partial(_losses, score, label_smoothing=label_smoothing, z_loss=z_loss)
    if places == tokens:
        return one(features, labels)
    padding = -tokens % places

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, -1, places, *x.shape[2:]), 1, 0)

    # Within a scan the compiler cannot merge the two passes, so nothing has to prevent it.
    again = jax.checkpoint(one, prevent_cse=False)
    _, losses = jax.lax.scan(
        lambda _, chunk: (None, again(*chunk)), None, (split(features), split(labels))
    )
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, tokens + padding)[:, :tokens], losses
    )


def _losses(
    score: Callable[[Array], Array],
    features: Array,
    labels: Array,
    label_smoothing: float,
    z_loss: float,
) -> TokenLosses:
    scores = score(features).astype(jnp.float32)
    denominator = jax.nn.logsumexp(scores, axis=-1)
    target = jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
    loss = denominator - target
    if label_smoothing:
        spread = denominator - scores.mean(axis=-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * spread
    if z_loss:
        loss += z_loss * jnp.square(denominator)
    return TokenLosses(loss, target >= scores.max(axis=-1))
