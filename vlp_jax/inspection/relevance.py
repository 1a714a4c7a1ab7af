"""Gradient-weighted relevance: which patches and which words make a pair similar."""

from __future__ import annotations

import dataclasses
import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from vlp_jax.inspection.taps import POOLING, TOWERS, Params, Seen, layer_path, tapped
from vlp_jax.models.dual_encoder import DualEncoder


@dataclasses.dataclass(frozen=True)
class Relevance:
    """Reasons for the similarity of each of n pairs: relevance >= 0 of patches and of token ids.

    Padding is not masked. `similarity` is the cosine of the two embeddings.
    """

    image: Float[np.ndarray, "n rows columns"]
    text: Float[np.ndarray, "n context"]
    similarity: Float[np.ndarray, " n"]


def relevance(
    module: DualEncoder,
    params: Params,
    images: UInt8[np.ndarray, "n height width 3"],
    tokens: Int[np.ndarray, "n context"],
) -> Relevance:
    """Computes the relevance of patches and tokens for the cosine similarity of image i and text i.

    Layer by layer R <- R + E_heads[(gradient * attention)+] R from the identity (Chefer, Gur and
    Wolf 2021, "Generic Attention-model Explainability", 3.2, eqs. 5 and 6), in each tower on its
    own. The last step is the pooling. An attention pooling is one more such layer with one query. A
    mean is a layer of equal weights, where gradient times weight is gradient times token. Pooling
    by a class token, an eos, or the first or last token takes the row of this token.

    Args:
      params: the parameters, of layers stacked or not.
      images: of the model's size.
      tokens: as many rows as images.

    Raises:
      ValueError: the model takes other shapes, or the numbers of texts and images differ.
    """
    if len(images) != len(tokens):
        raise ValueError(f"{len(images)} images and {len(tokens)} texts are no pairs")
    image, text, similarity = _relevance(module, params, images, tokens)
    return Relevance(np.asarray(image), np.asarray(text), np.asarray(similarity))


@functools.partial(jax.jit, static_argnums=0)
def _relevance(module: DualEncoder, params: Params, images: Array, tokens: Array) -> tuple:
    def run(added: dict[str, Array]) -> tuple[Array, tuple[Array, Seen]]:
        edits = {path: functools.partial(jnp.add, x) for path, x in added.items()}
        out, seen = tapped(module, params, images, tokens, edits=edits)
        cosine = jnp.sum(out["image"] * out["text"], axis=-1)
        # Pairs do not depend on each other, so one gradient of the sum serves all.
        return cosine.sum(), (cosine, seen)

    shapes = jax.eval_shape(lambda: run({})[1][1])
    # The gradient by a zero that is added to a value is the gradient by the value.
    zeros = {
        path: jnp.zeros(shapes[path].shape, shapes[path].dtype)
        for tower in TOWERS
        for path in _paths(module, tower)
    }
    gradients, (cosine, seen) = jax.grad(run, has_aux=True)(zeros)
    image = _tower_relevance(module, "image", seen, gradients, tokens)
    image = image[:, module.image.prefix_tokens :]
    rows, columns = module.image.grid
    return (
        einops.rearrange(image, "n (r c) -> n r c", r=rows, c=columns),
        _tower_relevance(module, "text", seen, gradients, tokens),
        cosine,
    )


def _paths(module: DualEncoder, tower: str) -> list[str]:
    """Lists the values that need a gradient: attention of all layers, and the pooled value."""
    part = getattr(module, tower)
    pooled = f"{tower}/{POOLING}" if part.pooling == "map" else f"{tower}/encoder"
    return [*(layer_path(tower, i) for i in range(part.transformer.depth)), pooled]


def _tower_relevance(
    module: DualEncoder, tower: str, seen: Seen, gradients: Seen, tokens: Array
) -> Float[Array, "n tokens"]:
    *layers, pooled = _paths(module, tower)
    size = seen[pooled].shape[-1 if pooled.endswith(POOLING) else 1]
    relevant = jnp.eye(size)[None]
    for path in layers:
        positive = jnp.maximum(gradients[path] * seen[path], 0).mean(axis=1)
        relevant = relevant + positive @ relevant
    weights = _pooling_weights(module, tower, seen[pooled], gradients[pooled], tokens)
    return jnp.einsum("nt,ntk->nk", weights, jnp.broadcast_to(relevant, (len(weights), size, size)))


def _pooling_weights(
    module: DualEncoder, tower: str, value: Array, gradient: Array, tokens: Array
) -> Float[Array, "n tokens"]:
    """Returns how much each output token counts for the pooled features, >= 0."""
    part = getattr(module, tower)
    if part.pooling == "map":
        return jnp.maximum(gradient * value, 0).mean(axis=1)[:, 0]
    if part.pooling == "mean":
        return jnp.maximum((gradient * value).sum(axis=-1), 0)
    size = value.shape[1]
    if part.pooling in ("eos", "argmax"):
        place = jnp.argmax(tokens == part.eos_id if part.pooling == "eos" else tokens, axis=1)
    else:
        place = jnp.full(len(value), size - 1 if part.pooling == "last" else 0)
    return jax.nn.one_hot(place, size)
