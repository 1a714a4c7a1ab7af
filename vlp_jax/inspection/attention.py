"""Attention maps of both towers, rollout, and gradient-weighted relevance."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from vlp_jax.inspection.taps import POOLING, TOWERS, Params, Seen, layer_path, tapped
from vlp_jax.models.dual_encoder import DualEncoder

Maps = dict[str, Float[np.ndarray, "..."]]


def attention_maps(
    module: DualEncoder,
    params: Params,
    images: UInt8[np.ndarray, "n height width 3"] | None = None,
    tokens: Int[np.ndarray, "n context"] | None = None,
) -> Maps:
    """Returns the softmax weights of every layer and head, as the forward pass uses them.

    Row i of a map says where token i looks; it sums to 1. The tokens of an image are the class
    token if there is one, the registers, and the patches row by row. Without images or tokens their
    tower is left out.

    Returns:
      "image" and "text", float32 [n, layers, heads, tokens, tokens]; where the pooling is an
      attention also "image_pooling" and "text_pooling", [n, heads, tokens].

    Raises:
      ValueError: neither images nor tokens are given, or the model takes other shapes.
    """
    if images is None and tokens is None:
        raise ValueError("attention_maps needs images or tokens")
    found: Maps = {}
    for tower, inputs in (("image", images), ("text", tokens)):
        if inputs is not None:
            found |= jax.tree.map(np.asarray, _maps(module, tower, params, inputs))
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _maps(module: DualEncoder, tower: str, params: Params, inputs: Array) -> dict[str, Array]:
    _, seen = tapped(module, params, inputs, method=f"embed_{tower}")
    maps = {tower: layers_of(module, tower, seen)}
    if f"{tower}/{POOLING}" in seen:
        maps[f"{tower}_pooling"] = seen[f"{tower}/{POOLING}"][:, :, 0]
    return maps


def layers_of(module: DualEncoder, tower: str, seen: Seen) -> Float[Array, "n layers heads q k"]:
    """Stacks the weights of all layers of a tower that `tapped` has seen."""
    depth = getattr(module, tower).transformer.depth
    return jax.numpy.stack([seen[layer_path(tower, i)] for i in range(depth)], axis=1)


def rollout(
    maps: Float[np.ndarray, "n layers heads tokens tokens"], residual: float = 0.5
) -> Float[np.ndarray, "n tokens tokens"]:
    """Estimates how much of each input token arrives in each output token.

    The mean over heads, mixed with the residual connection, multiplied layer by layer (Abnar and
    Zuidema 2020, "Quantifying Attention Flow in Transformers", 3.1). Rows sum to 1. `residual` is
    the share of a token that goes past the attention, 0.5 in the paper; ValueError outside [0, 1].
    """
    maps = np.asarray(maps, np.float32)
    if maps.ndim != 5:
        raise ValueError(f"maps are [n, layers, heads, tokens, tokens], not {list(maps.shape)}")
    if not 0 <= residual <= 1:
        raise ValueError(f"residual {residual} is not in [0, 1]")
    # The residual connection passes each token on to itself.
    identity = np.eye(maps.shape[-1], dtype=np.float32)
    mixed = (1 - residual) * maps.mean(axis=2) + residual * identity
    return functools.reduce(lambda before, layer: layer @ before, mixed.swapaxes(0, 1))


def image_rollout(module: DualEncoder, maps: Maps) -> Float[np.ndarray, "n rows columns"]:
    """Estimates how much of each patch arrives in the pooled features, from `attention_maps`.

    The patches have the sum 1 less the share of the class token and the registers.
    """
    image, rolled = module.image, rollout(maps["image"])
    first = image.prefix_tokens
    if image.pooling == "cls":
        pooled = rolled[:, 0]
    elif image.pooling == "map":
        pooled = np.einsum("nt,ntk->nk", maps["image_pooling"].mean(axis=1), rolled)
    else:
        pooled = rolled[:, first:].mean(axis=1)
    return pooled[:, first:].reshape(-1, *image.grid)


def token_strings(
    tokenizer: Any, ids: Int[np.ndarray, " context"], eos_id: int, pad_id: int
) -> list[str]:
    """Decodes each id of a text up to and with its eos; the padding is left out."""
    ids = np.asarray(ids)
    ends = np.flatnonzero(ids == eos_id)
    if ends.size:  # a text that was cut may have no eos
        length = int(ends[0]) + 1
    else:
        length = int(np.flatnonzero(ids != pad_id).max(initial=0)) + 1
    # Decoding would print special tokens as nothing.
    special = {pad_id: "<pad>", eos_id: "<eos>", getattr(tokenizer, "bos_id", None): "<bos>"}
    words = [special.get(int(i)) or tokenizer.decode(np.array([[i]]))[0] for i in ids[:length]]
    return [word if word.strip() else "<special>" for word in words]


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
    by a class token, an eos, or the first or last token takes the row of this token. Raises
    ValueError for other shapes, or numbers of texts and images that differ.
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
