"""Heat maps of a text in an image, in the resolution of the image."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from vlp_jax.inspection.attention import relevance
from vlp_jax.inspection.taps import Params, layer_path, tapped
from vlp_jax.models.dual_encoder import DualEncoder

COLORS = "viridis"  # ordered by lightness, so that it reads in grey and with any color vision
STRENGTH = 0.55  # of the colors of the map; the rest is the image, half of it in grey
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def overlay(
    image: UInt8[np.ndarray, "height width 3"], heat: Float[np.ndarray, "rows columns"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Lays the colors of a map over a paler image: from dark (0) through green to yellow (1).

    The cells of a map with fewer rows and columns than the image become rectangles. Raises
    ValueError if they do not divide the image's height and width.
    """
    height, width = image.shape[:2]
    rows, columns = heat.shape
    if height % rows or width % columns:
        raise ValueError(f"a map of {rows} x {columns} does not lie on {height} x {width} pixels")
    heat = np.repeat(np.repeat(heat, height // rows, axis=0), width // columns, axis=1)
    paler = (0.5 * image + 0.5 * (image @ _LUMA)[..., None]) / 255
    colors = matplotlib.colormaps[COLORS](np.clip(heat, 0, 1))[..., :3]
    return np.round(255 * ((1 - STRENGTH) * paler + STRENGTH * colors)).astype(np.uint8)


# Chosen on validation scenes of `shapes`; see docs/inspection.md.
WINDOW = 3 / 8  # of the shorter side of the image
STEPS = 8  # a window's centre lies on each of the seven inner lines that cut a side in eight
SHIFTS = 4  # of a patch, along each axis
_WINDOW_SPREAD = 5 / 64  # standard deviation, of the shorter side
_PATCH_SPREAD = 7 / 16  # likewise, of a patch

Texts = Int[np.ndarray, "n context"] | Float[np.ndarray, "n embed"]


@dataclasses.dataclass(frozen=True)
class PlaceValues:
    """Values of a method at a grid of places of each of n images; more answers the text better.

    Attributes:
      rows, columns: the places, in pixels from the upper left corner.
      spread: standard deviation of the Gaussian that each place becomes, in pixels.
    """

    values: Float[np.ndarray, "n rows columns"]
    rows: Float[np.ndarray, " rows"]
    columns: Float[np.ndarray, " columns"]
    spread: float


def heat_map(
    module: DualEncoder,
    params: Params,
    images: UInt8[np.ndarray, "n height width 3"],
    texts: Texts,
    *,
    method: str = "windows",
    against: Float[np.ndarray, "m embed"] | None = None,
    batch_size: int = 64,
) -> Float[np.ndarray, "n height width"]:
    """Computes where image i answers text i: float32 in [0, 1], 1 at the peak of each map.

    | method | value of a place | forward passes an image |
    |---|---|---|
    | "windows" | similarity of the text and the image of which a window alone is shown | 49 |
    | "occlusion" | what the similarity loses when the window is hidden | 49 |
    | "patches" | similarity of the text and a patch as the pooling would see it alone | 16 |
    | "relevance" | `relevance`, which also needs the gradient | 16 |

    Around a window, or in its place, there is the median color of the image (Zeiler and Fergus
    2014, "Visualizing and Understanding Convolutional Networks", 4.2; Petsiuk et al. 2018, "RISE").
    For "patches" (`patch_embeddings`) and "relevance" the image is shifted by quarters of a patch,
    so that the maps are finer than the grid of patches.

    Args:
      images: of the model's size.
      texts: token ids, or unit vectors (not for "relevance").
      against: embeddings of other texts. Their mean is subtracted from the embedding of each text,
        so that features shared by all texts do not count (Li et al. 2023, "CLIP Surgery", 3.3:
        the redundant features are the mean over texts). None subtracts nothing.
      batch_size: images that are computed at a time.

    Raises:
      ValueError: an unknown method, or shapes that do not fit each other, the model or the method.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r} (known: {', '.join(METHODS)})")
    _check(module, images, texts)
    words = _is_tokens(texts)
    if method == "relevance" and (against is not None or not words):
        raise ValueError("method 'relevance' takes token ids, and nothing to go against")
    if method != "relevance":
        texts = _embed_texts(module, params, texts) if words else texts
        texts = np.asarray(texts, np.float32)
        if against is not None:
            texts = texts - np.asarray(against, np.float32).mean(axis=0)
    maps = np.zeros(images.shape[:3], np.float32)
    for first in range(0, len(images), batch_size):
        part = slice(first, first + batch_size)
        count = len(images[part])
        # Powers of two, since each size of a batch is compiled.
        size = min(1 << (count - 1).bit_length(), batch_size)
        padding = (0, size - count)
        batch = [
            np.pad(x[part], (padding, *((0, 0),) * (x.ndim - 1)), mode="edge")
            for x in (np.asarray(images), np.asarray(texts))
        ]
        samples = METHODS[method](module, params, *batch)
        maps[part] = spread_out(samples, images.shape[1:3])[:count]
    return maps


def patch_embeddings(
    module: DualEncoder, params: Params, images: UInt8[Array, "n height width 3"]
) -> Float[Array, "n rows columns embed"]:
    """Embeds each patch as a unit vector in the space of image embeddings. Call it under jit.

    The vector is the embedding of an image whose pooling sees this one patch alone: in the place of
    the class token, as the mean, or under the query of an attention pooling. In the last layer each
    token attends to itself alone, since it gathers there for the pooling and not for its own place
    (Zhou, Loy and Dai 2022, "Extract Free Dense Labels from CLIP", MaskCLIP, 3.2: the value path of
    the last layer).
    """
    image = module.image
    first = image.prefix_tokens

    def one_by_one(tokens: Array) -> Array:
        patches = einops.rearrange(tokens[:, first:], "n t w -> (n t) 1 w")
        if image.pooling == "mean" and first:  # the mean leaves the first tokens out
            return jnp.pad(patches, ((0, 0), (first, 0), (0, 0)))
        return patches

    edits = {"image/encoder": one_by_one, layer_path("image", image.transformer.depth - 1): _itself}
    embeddings, _ = tapped(module, params, images, method="embed_image", edits=edits)
    rows, columns = image.grid
    return einops.rearrange(embeddings, "(n r c) d -> n r c d", r=rows, c=columns)


def _itself(weights: Array) -> Array:
    return jnp.broadcast_to(jnp.eye(weights.shape[-1], dtype=weights.dtype), weights.shape)


def spread_out(samples: PlaceValues, size: tuple[int, int]) -> Float[np.ndarray, "n height width"]:
    """Spreads values at some places over the whole image, in [0, 1].

    Each place adds a Gaussian whose height is its value above the least. So a map fades beyond the
    outermost places, where nothing was measured.
    """
    # Relative to the least value of each map, since similarities have no zero.
    values = samples.values - samples.values.min(axis=(1, 2), keepdims=True)
    down, across = (
        np.exp(-0.5 * ((np.arange(side)[:, None] + 0.5 - places) / samples.spread) ** 2)
        for side, places in zip(size, (samples.rows, samples.columns))
    )
    maps = np.einsum("hr,nrc,wc->nhw", down, values, across, optimize=True)
    peak = maps.max(axis=(1, 2), keepdims=True)
    return (maps / np.where(peak > 0, peak, 1)).astype(np.float32)


def shifts_of(module: DualEncoder, shifts: int = SHIFTS) -> Int[np.ndarray, " shifts"]:
    """Returns the shifts of an image along an axis, in pixels: `shifts` parts of a patch."""
    patch = module.image.patch_size
    return np.unique(np.round((np.arange(shifts) - shifts // 2) * patch / shifts).astype(int))


def _windows(
    hide: bool, module: DualEncoder, params: Params, images: Array, texts: Array
) -> PlaceValues:
    values = np.asarray(_window_similarities(module, params, images, texts, hide))
    size = module.image.image_size
    rows, columns = (np.arange(1, STEPS) * side / STEPS for side in size)
    return PlaceValues(-values if hide else values, rows, columns, _WINDOW_SPREAD * min(size))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _window_similarities(
    module: DualEncoder, params: Params, images: Array, texts: Array, hide: bool
) -> Float[Array, "n rows columns"]:
    height, width = module.image.image_size
    half = WINDOW * min(height, width) / 2
    y, x = jnp.arange(height)[:, None] + 0.5, jnp.arange(width)[None] + 0.5
    fill = jnp.median(images.astype(jnp.float32), axis=(1, 2), keepdims=True).astype(images.dtype)

    def similarity(place: Array) -> Float[Array, " n"]:
        centre = place * jnp.array([height, width]) / STEPS
        inside = (jnp.abs(y - centre[0]) < half) & (jnp.abs(x - centre[1]) < half)
        # To hide is to show the complement.
        seen = (inside ^ hide)[None, :, :, None]
        shown = jnp.where(seen, images, fill)
        embeddings = module.apply({"params": params}, shown, method="embed_image")
        return jnp.sum(embeddings * texts, axis=-1)

    steps = np.arange(1, STEPS)
    places = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    # One window at a time: all at once would hold 49 copies of the batch.
    values = jax.lax.map(similarity, jnp.asarray(places, jnp.float32))
    return einops.rearrange(values, "(r c) n -> n r c", r=STEPS - 1)


@functools.partial(jax.jit, static_argnums=0)
def _patch_similarities(
    module: DualEncoder, params: Params, images: Array, texts: Array
) -> Float[Array, "n rows columns"]:
    return jnp.einsum("nrcd,nd->nrc", patch_embeddings(module, params, images), texts)


def _shifted_samples(
    module: DualEncoder, images: np.ndarray, values: Callable[[np.ndarray], np.ndarray]
) -> PlaceValues:
    """Evaluates `values` on the image in all shifts; its edges are continued."""
    offsets, patch = shifts_of(module), module.image.patch_size
    (height, width), (rows, columns) = module.image.image_size, module.image.grid
    padded = np.pad(images, ((0, 0), (patch, patch), (patch, patch), (0, 0)), mode="edge")
    found = np.empty((len(images), rows, len(offsets), columns, len(offsets)), np.float32)
    for i, down in enumerate(patch + offsets):
        for j, across in enumerate(patch + offsets):
            found[:, :, i, :, j] = values(padded[:, down : down + height, across : across + width])
    places = [
        ((np.arange(count)[:, None] + 0.5) * patch + offsets).reshape(-1)
        for count in (rows, columns)
    ]
    grids = einops.rearrange(found, "n r i c j -> n (r i) (c j)")
    return PlaceValues(grids, *places, _PATCH_SPREAD * patch)


METHODS: dict[str, Callable[..., PlaceValues]] = {
    "windows": functools.partial(_windows, False),
    "occlusion": functools.partial(_windows, True),
    "patches": lambda module, params, images, texts: _shifted_samples(
        module, images, lambda shifted: _patch_similarities(module, params, shifted, texts)
    ),
    "relevance": lambda module, params, images, texts: _shifted_samples(
        module, images, lambda shifted: relevance(module, params, shifted, texts).image
    ),
}


@functools.partial(jax.jit, static_argnums=0)
def _embed_texts(module: DualEncoder, params: Params, tokens: Array) -> Float[Array, "n embed"]:
    return module.apply({"params": params}, tokens, method="embed_text")


def _is_tokens(texts: Texts) -> bool:
    return np.issubdtype(np.asarray(texts).dtype, np.integer)


def _check(module: DualEncoder, images: np.ndarray, texts: Texts) -> None:
    size = tuple(module.image.image_size)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (*size, 3):
        raise ValueError(
            f"images are uint8 [n, {size[0]}, {size[1]}, 3], not {images.dtype} {images.shape}"
        )
    width = module.text.context_length if _is_tokens(texts) else module.embed_dim
    if np.shape(texts) != (len(images), width):
        raise ValueError(
            f"the texts of {len(images)} images are {[len(images), width]}, not "
            f"{list(np.shape(texts))}"
        )
