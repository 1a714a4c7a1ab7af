"""Losses of a batch of image-text pairs: image i belongs to text i.

They see the whole global batch: under `jax.jit` the embeddings are global arrays, so every image
meets every text, on any number of devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def at_least_float32(x: Float[Array, ...]) -> Float[Array, ...]:
    """Casts bfloat16 to float32; float32 and float64 stay as they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def softmax_loss(logits: Float[Array, "images texts"]) -> Float[Array, ""]:
    """Mean cross-entropy of image to text and text to image (Radford et al. 2021, figure 3)."""
    logits = at_least_float32(logits)
    # Not `jnp.diagonal`: its gradient contains a branch with a collective of the devices that share
    # the logits.
    matches = jnp.where(jnp.eye(len(logits), dtype=bool), logits, 0).sum(axis=1)
    image_to_text = jax.nn.logsumexp(logits, axis=1) - matches
    text_to_image = jax.nn.logsumexp(logits, axis=0) - matches
    return 0.5 * (image_to_text.mean() + text_to_image.mean())


def sigmoid_loss(logits: Float[Array, "images texts"]) -> Float[Array, ""]:
    """Binary cross-entropy of all pairs, over the batch size (Zhai et al. 2023, algorithm 1)."""
    logits = at_least_float32(logits)
    count = logits.shape[0]
    signs = 2 * jnp.eye(count, dtype=logits.dtype) - 1
    return -jax.nn.log_sigmoid(signs * logits).sum() / count


PAIRWISE_LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def pair_logits(
    image: Float[Array, "images dim"],
    text: Float[Array, "texts dim"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> Float[Array, "images texts"]:
    """Computes scale * <image, text> + bias, with products and sums in float32 or better."""
    image, text = at_least_float32(image), at_least_float32(text)
    return scale * jnp.einsum("id,td->it", image, text, precision="highest") + bias
