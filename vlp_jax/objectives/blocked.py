"""Computes the pairwise losses in blocks, so that memory does not grow with the devices.

The plain form (`pairwise.py`) gives each device the texts of the whole batch and the logits of its
images against them. Both grow with the number of devices. Here the texts travel around the ring of
devices in blocks, one block per device. At any time a device holds its images, one block of texts,
and the logits of `block_size` images against that block:

    1. for each block of texts on the ring            (`Ring.around`, calls `visit`)
    2.   for each `block_size` images of the device   (`_by_rows`, calls `step`)
    3.     compute a tile of logits, reduce it, forget it

Gradients are written by hand. Automatic differentiation of the loops would save the blocks of all
rounds, which is the whole batch again. The softmax goes around twice: first for the denominators of
its rows and columns, then for the gradients. The sigmoid goes around once.

Sources: Zhai et al. 2023, section 3.3, for the ring; Milakov and Gimelshein 2018 (arXiv:1805.02867)
for the running maximum and sum of exponentials, here along rows and columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int

from vlp_jax.objectives.pairwise import pair_logits
from vlp_jax.parallel.mesh import BATCH_AXES
from vlp_jax.parallel.ring import SPREAD, WHOLE, Ring

Gradients = tuple[Array, Array, Array, Array]  # with respect to image, text, scale, bias


def blocked_loss(
    name: str,
    image: Float[Array, "batch dim"],
    text: Float[Array, "texts text_dim"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    mesh: Mesh | AbstractMesh,
    block_size: int = 256,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes `PAIRWISE_LOSSES[name](pair_logits(...))`, and how often the argmax is right.

    The batch is split over `BATCH_AXES`; devices along other mesh axes repeat the work. A device
    needs memory for a few copies of its embeddings and for one tile of logits [block_size, texts of
    one device]. All computation, and the texts that travel, are in float32 or better. Gradients
    have the dtypes of the arguments; only reverse-mode differentiation is defined, and only once.

    Args:
      name: "softmax" (CLIP) or "sigmoid" (SigLIP).
      image, text: embeddings of the global batch; image i belongs to text i.
      mesh: has the axes `BATCH_AXES`, and the product of their sizes divides the batch. Inside
        `jax.set_mesh` it must be the mesh that is set.
      block_size: images of a device whose logits are in memory at once. It need not divide the
        batch.

    Returns:
      The loss, and the number of images whose text has the highest logit of its row: float32,
      without a gradient. Among equal logits the first text in the batch wins, as in argmax.

    Raises:
      ValueError: arguments that do not fit each other.
    """
    if name not in _LOSSES:
        raise ValueError(f"unknown loss {name!r} (known: {', '.join(_LOSSES)})")
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"not [batch dim] of pairs: images {image.shape}, texts {text.shape}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    missing = [axis for axis in BATCH_AXES if axis not in mesh.shape]
    if missing:
        raise ValueError(f"the mesh {dict(mesh.shape)} has no axis {', '.join(missing)}")
    ring = Ring(mesh)
    if image.shape[0] % ring.devices:
        raise ValueError(
            f"a batch of {image.shape[0]} is not divisible by the {ring.devices} devices along "
            f"{' x '.join(BATCH_AXES)}"
        )
    dtype = jnp.result_type(image, text, scale, bias, jnp.float32)
    arguments = (jnp.asarray(x, dtype) for x in (image, text, scale, bias))
    return _LOSSES[name](ring, block_size, *arguments)


# Building blocks of both losses. They run inside `shard_map`: an array is one device's part of the
# batch. Images stay on their device; the texts are the block that is visiting.


def _by_rows(size: int, step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: Any) -> Any:
    """Runs `jax.lax.scan` of `step` over blocks of `size` rows, then `step` on the remainder."""
    count, rest = divmod(jax.tree.leaves(rows)[0].shape[0], size)

    def split(x: Array) -> Array:
        return x[: count * size].reshape(count, size, *x.shape[1:])

    def join(x: Array) -> Array:
        return x.reshape(count * size, *x.shape[2:])

    carry, out = jax.lax.scan(step, carry, jax.tree.map(split, rows))
    out = jax.tree.map(join, out)
    if rest:
        carry, tail = step(carry, jax.tree.map(lambda x: x[count * size :], rows))
        out = jax.tree.map(lambda *parts: jnp.concatenate(parts), out, tail)
    return carry, out


class _Block(NamedTuple):
    """A tile of logits, with the positions of its images and texts in the global batch."""

    logits: Float[Array, "images texts"]
    row: Int[Array, "images 1"]
    column: Int[Array, "1 texts"]

    @property
    def is_pair(self) -> Bool[Array, "images texts"]:
        """True where image and text belong together."""
        return self.row == self.column


class _Ranking(NamedTuple):
    """For each image, the logit of its text, and whether it beats all texts so far."""

    match: Float[Array, " images"]
    leads: Bool[Array, " images"]

    @classmethod
    def start(cls, image: Float[Array, "images dim"]) -> _Ranking:
        return cls(jnp.zeros_like(image[:, 0]), jnp.ones_like(image[:, 0], bool))

    def add(self, block: _Block) -> _Ranking:
        """Adds a tile. The tile that holds the images' own texts must be the first."""
        # Only the first tile has pairs. Its sum picks each image's match out of the row, without a
        # gather; later tiles add 0.
        match = self.match + jnp.where(block.is_pair, block.logits, 0).sum(axis=1)
        limit = match[:, None]
        # argmax takes the first of equal logits: an earlier text must be smaller, a later one may
        # be equal. A NaN compares as False, so a row with a NaN has no hit.
        behind = jnp.where(block.column < block.row, block.logits < limit, block.logits <= limit)
        return _Ranking(match, self.leads & (behind | block.is_pair).all(axis=1))

    def hits(self, ring: Ring) -> Float[Array, ""]:
        """Counts the images of the global batch whose own text leads."""
        return ring.sum(self.leads.sum().astype(jnp.float32))


class _LogSum(NamedTuple):
    """log(sum(exp(x))) as `top + log(total)`. `top` is the maximum, so `total` is at least 1."""

    top: Float[Array, " n"]
    total: Float[Array, " n"]

    @classmethod
    def start(cls, embedding: Float[Array, "n dim"]) -> _LogSum:
        return cls(jnp.full_like(embedding[:, 0], -jnp.inf), jnp.zeros_like(embedding[:, 0]))

    def add(self, block: _Block, axis: int) -> _LogSum:
        """Adds the logits of a tile, summed along `axis`."""
        top = block.logits.max(axis=axis)
        total = jnp.exp(block.logits - jnp.expand_dims(top, axis)).sum(axis=axis)
        return self.merge(_LogSum(top, total))

    def merge(self, other: _LogSum) -> _LogSum:
        """Sums the terms of both. One of them may be empty (top = -inf); two would give NaN."""
        top = jnp.maximum(self.top, other.top)
        ours, theirs = self.total * jnp.exp(self.top - top), other.total * jnp.exp(other.top - top)
        return _LogSum(top, ours + theirs)

    def minus(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        """Computes log(sum(exp)) - x; exact also where both are large and close to each other."""
        # (top + log(total)) - x would round log(total) away before the subtraction.
        return self.top - x + jnp.log(self.total)

    def shares(self, block: _Block, axis: int) -> Float[Array, "images texts"]:
        """Computes the softmax exp(logits) / sum, for a sum that was taken along `axis`."""
        top, total = jnp.expand_dims(self.top, axis), jnp.expand_dims(self.total, axis)
        # One division per row (or column) and not per logit.
        return jnp.exp(block.logits - top) * (1 / total)


class _Slopes(NamedTuple):
    """The slopes d(batch * loss) / d(logit) of each image, summed over the texts."""

    times_text: Float[Array, "images dim"]  # sum of slope * text
    total: Float[Array, " images"]

    @classmethod
    def start(cls, image: Float[Array, "images dim"]) -> _Slopes:
        return cls(jnp.zeros_like(image), jnp.zeros_like(image[:, 0]))

    def add(self, slope: Float[Array, "images texts"], text: Float[Array, "texts dim"]) -> _Slopes:
        """Adds the slopes of a tile."""
        times_text = jnp.einsum("it,td->id", slope, text, precision="highest")
        return _Slopes(self.times_text + times_text, self.total + slope.sum(axis=1))

    def gradients(
        self, ring: Ring, times_image: Float[Array, "texts dim"], image: Array, scale: Array
    ) -> Gradients:
        """Computes the gradients of the loss.

        Args:
          times_image: the sum of slope * image over all images of the global batch.
        """
        batch = image.shape[0] * ring.devices
        # d(logit) / d(scale) = <image, text>. The sum over texts of slope * <image, text> is
        # <image, times_text>, so the logits are not needed again.
        to_scale = ring.sum((self.times_text * image).sum()) / batch
        to_bias = ring.sum(self.total.sum()) / batch
        return scale / batch * self.times_text, scale / batch * times_image, to_scale, to_bias


def _times_image(
    slope: Float[Array, "images texts"], image: Float[Array, "images dim"]
) -> Float[Array, "texts dim"]:
    return jnp.einsum("it,id->td", slope, image, precision="highest")


def _positions(owner: Int[Array, ""], count: int) -> Int[Array, " count"]:
    """Returns the positions in the global batch of the examples that device `owner` holds."""
    return owner * count + jnp.arange(count)


def _chain(unit: Gradients, cotangents: tuple[Array, Array]) -> Gradients:
    """Multiplies the gradients by the cotangent of the loss. The hits have no gradient."""
    return jax.tree.map(lambda x: cotangents[0] * x, unit)


# CLIP's softmax. The texts go around once for the sums of exponentials, and in the backward pass
# once more for the gradients, which need the finished sums.


def _softmax_sums(
    size: int, ring: Ring, image: Array, text: Array, scale: Array, bias: Array
) -> tuple[Array, Array, _LogSum, _LogSum]:
    """Computes loss, hits, and the sums of this device's rows (images) and columns (texts)."""
    count = image.shape[0]

    def visit(owner: Array, text: Array, local: Any) -> tuple[_LogSum, Any]:
        column = _positions(owner, count)[None]

        def step(columns: _LogSum, rows: Any) -> tuple[_LogSum, Any]:
            image, row, (ranking, sums) = rows
            block = _Block(pair_logits(image, text, scale, bias), row[:, None], column)
            return columns.add(block, axis=0), (ranking.add(block), sums.add(block, axis=1))

        rows = image, _positions(ring.here(), count), local
        return _by_rows(size, step, _LogSum.start(text), rows)

    # Sums of rows stay with their images; sums of columns travel with their texts.
    local = _Ranking.start(image), _LogSum.start(image)
    columns, (ranking, rows) = ring.around(visit, _LogSum.merge, text, _LogSum.start(text), local)
    # Column i is back on the device of image i, and the logit of pair i is the match of both.
    losses = 0.5 * (rows.minus(ranking.match) + columns.minus(ranking.match))
    loss = ring.sum(losses.sum()) / (count * ring.devices)
    return loss, ranking.hits(ring), rows, columns


def _softmax_gradients(
    size: int,
    ring: Ring,
    image: Array,
    text: Array,
    scale: Array,
    bias: Array,
    rows: _LogSum,
    columns: _LogSum,
) -> Gradients:
    """Computes the gradients of the loss from the sums that `_softmax_sums` returned."""
    count = image.shape[0]

    def visit(owner: Array, texts: Any, local: _Slopes) -> tuple[Array, _Slopes]:
        text, columns = texts
        column = _positions(owner, count)[None]

        def step(times_image: Array, rows: Any) -> tuple[Array, _Slopes]:
            image, row, sums, slopes = rows
            block = _Block(pair_logits(image, text, scale, bias), row[:, None], column)
            # d(cross-entropy) / d(logit) = softmax - 1 at the match, averaged over both directions.
            shares = sums.shares(block, axis=1) + columns.shares(block, axis=0)
            slope = 0.5 * shares - block.is_pair
            return times_image + _times_image(slope, image), slopes.add(slope, text)

        by_row = image, _positions(ring.here(), count), rows, local
        return _by_rows(size, step, jnp.zeros_like(text), by_row)

    times_image, slopes = ring.around(
        visit, jnp.add, (text, columns), jnp.zeros_like(text), _Slopes.start(image)
    )
    return slopes.gradients(ring, times_image, image, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softmax(
    ring: Ring, size: int, image: Array, text: Array, scale: Array, bias: Array
) -> tuple[Array, Array]:
    return _softmax_forward(ring, size, image, text, scale, bias)[0]


def _softmax_forward(ring: Ring, size: int, *arguments: Array) -> tuple[tuple[Array, Array], Any]:
    function = functools.partial(_softmax_sums, size)
    run = ring.run(function, (SPREAD, SPREAD, WHOLE, WHOLE), (WHOLE, WHOLE, SPREAD, SPREAD))
    loss, hits, rows, columns = run(*arguments)
    return (loss, hits), (*arguments, rows, columns)


def _softmax_backward(
    ring: Ring, size: int, residuals: Any, cotangents: tuple[Array, Array]
) -> Gradients:
    function = functools.partial(_softmax_gradients, size)
    in_specs = (SPREAD, SPREAD, WHOLE, WHOLE, SPREAD, SPREAD)
    unit = ring.run(function, in_specs, (SPREAD, SPREAD, WHOLE, WHOLE))(*residuals)
    return _chain(unit, cotangents)


_softmax.defvjp(_softmax_forward, _softmax_backward)


# SigLIP's sigmoid. Logits do not depend on each other, so the forward pass computes the gradients
# in the same round. The backward pass only multiplies them by the cotangent.


def _sigmoid_sums(
    size: int,
    with_gradients: bool,
    ring: Ring,
    image: Array,
    text: Array,
    scale: Array,
    bias: Array,
) -> tuple[Array, Array, Any]:
    """Computes loss, hits, and the gradients; () in their place if `with_gradients` is False."""
    count = image.shape[0]

    def visit(owner: Array, text: Array, local: Any) -> tuple[Any, Any]:
        column = _positions(owner, count)[None]

        def step(times_image: Any, rows: Any) -> tuple[Any, Any]:
            image, row, (ranking, losses, slopes) = rows
            block = _Block(pair_logits(image, text, scale, bias), row[:, None], column)
            # -log sigmoid(x) = softplus(-x): a pair wants a high logit, all others a low one.
            against = jnp.where(block.is_pair, -block.logits, block.logits)
            losses = losses + jax.nn.softplus(against).sum(axis=1)
            if with_gradients:
                away = jax.nn.sigmoid(against)
                slope = jnp.where(block.is_pair, -away, away)
                times_image = times_image + _times_image(slope, image)
                slopes = slopes.add(slope, text)
            return times_image, (ranking.add(block), losses, slopes)

        return _by_rows(size, step, start, (image, _positions(ring.here(), count), local))

    # Evaluation needs no gradients, and then nothing but the texts travels.
    start, slopes = (jnp.zeros_like(text), _Slopes.start(image)) if with_gradients else ((), ())
    combine = jnp.add if with_gradients else lambda block_sum, contribution: ()
    local = _Ranking.start(image), jnp.zeros_like(image[:, 0]), slopes
    times_image, (ranking, losses, slopes) = ring.around(visit, combine, text, start, local)
    loss = ring.sum(losses.sum()) / (count * ring.devices)
    unit = slopes.gradients(ring, times_image, image, scale) if with_gradients else ()
    return loss, ranking.hits(ring), unit


def _run_sigmoid(ring: Ring, size: int, with_gradients: bool, *arguments: Array) -> Any:
    function = functools.partial(_sigmoid_sums, size, with_gradients)
    in_specs = (SPREAD, SPREAD, WHOLE, WHOLE)
    out_specs = (WHOLE, WHOLE, in_specs if with_gradients else ())
    return ring.run(function, in_specs, out_specs)(*arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sigmoid(
    ring: Ring, size: int, image: Array, text: Array, scale: Array, bias: Array
) -> tuple[Array, Array]:
    return _run_sigmoid(ring, size, False, image, text, scale, bias)[:2]


def _sigmoid_forward(
    ring: Ring, size: int, *arguments: Array
) -> tuple[tuple[Array, Array], Gradients]:
    loss, hits, unit = _run_sigmoid(ring, size, True, *arguments)
    return (loss, hits), unit


def _sigmoid_backward(
    ring: Ring, size: int, unit: Gradients, cotangents: tuple[Array, Array]
) -> Gradients:
    return _chain(unit, cotangents)


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)

_LOSSES = {"softmax": _softmax, "sigmoid": _sigmoid}
