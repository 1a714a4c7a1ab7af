"""The pairwise losses in blocks that travel around the devices.

The plain form (`pairwise.py`) gives each device the texts of the whole batch, and its images' rows
of the logits: both grow with the number of devices. Here a device holds its own images, one
visiting block of texts, and the logits of `block_size` images against that block. The texts go
around the ring of devices, so that every image meets every text, and nothing of a visit is kept:
the gradients are written by hand, and the softmax computes its logits again on a second round. (A
loop under automatic differentiation would keep the visitors of all rounds, the whole batch again.)

The ring of the sigmoid loss: Zhai et al. 2023, section 3.3. For the softmax, the running maximum
and sum of exponentials of Milakov and Gimelshein 2018 (arXiv:1805.02867), for rows and columns.
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

Gradients = tuple[Array, Array, Array, Array]  # with regard to image, text, scale, bias


def blocked_loss(
    name: str,
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    mesh: Mesh | AbstractMesh,
    block_size: int = 256,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`PAIRWISE_LOSSES[name](pair_logits(image, text, scale, bias))`, and the hits of its argmax.

    The batch is spread over `BATCH_AXES`; along other axes of the mesh the work is repeated. The
    memory of a device depends on its part of the batch alone: a few times its embeddings, and a
    block of logits [block_size, part of the batch]. Everything is computed in float32 or better,
    and texts travel so; gradients leave in the types of the arguments.

    Only reverse-mode differentiation is defined, and only once.

    Args:
      name: "softmax" (CLIP) or "sigmoid" (SigLIP).
      image, text: of the global batch, pair i being (image i, text i).
      mesh: has the axes `BATCH_AXES`, whose sizes together divide the batch. Inside `jax.set_mesh`
        it must be the mesh that is set.
      block_size: images of a device whose logits are alive at once. It need not divide the batch.

    Returns:
      The loss, and the number of images whose own text has the highest logit of their row: float32,
      with no gradient. Of texts with equal logits the first in the batch counts, as in argmax.

    Raises:
      ValueError: an unknown name, shapes that are not those of pairs, a block_size below 1, or a
        mesh that lacks an axis or does not divide the batch.
    """
    if name not in _LOSSES:
        raise ValueError(f"unknown loss {name!r} (known: {', '.join(_LOSSES)})")
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"not [batch dim] of pairs: images {image.shape}, texts {text.shape}")
    if block_size < 1:
        raise ValueError(f"block_size is at least 1, not {block_size}")
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


# What both losses are made of. All of it runs on one device and sees its part of the batch: its
# images, which stay, and a block of texts.


def _by_rows(size: int, step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: Any) -> Any:
    """`jax.lax.scan` of `step` over blocks of `size` rows, and then over the rows that are left."""
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
    """Logits of some images and texts, and which of the batch these are."""

    logits: Float[Array, "images texts"]
    row: Int[Array, "images 1"]
    column: Int[Array, "1 texts"]

    @property
    def own(self) -> Bool[Array, "images texts"]:
        """Where an image meets its own text."""
        return self.row == self.column


class _Ranking(NamedTuple):
    """Of each image: the logit of its own text, and whether no text seen so far beats it."""

    match: Float[Array, " images"]
    leads: Bool[Array, " images"]

    @classmethod
    def start(cls, image: Float[Array, "images dim"]) -> _Ranking:
        return cls(jnp.zeros_like(image[:, 0]), jnp.ones_like(image[:, 0], bool))

    def see(self, block: _Block) -> _Ranking:
        """With a block added. The images' own texts have to come first."""
        match = self.match + jnp.where(block.own, block.logits, 0).sum(axis=1)
        limit = match[:, None]
        # A row with a NaN has no hit, since NaN is not behind anything.
        behind = jnp.where(block.column < block.row, block.logits < limit, block.logits <= limit)
        return _Ranking(match, self.leads & (behind | block.own).all(axis=1))

    def hits(self, ring: Ring) -> Float[Array, ""]:
        """Images of the global batch whose own text leads."""
        return ring.sum(self.leads.sum().astype(jnp.float32))


class _LogSum(NamedTuple):
    """log(sum(exp(x))) as top + log(total), top being the maximum, so that total is at least 1."""

    top: Float[Array, " n"]
    total: Float[Array, " n"]

    @classmethod
    def start(cls, embedding: Float[Array, "n dim"]) -> _LogSum:
        return cls(jnp.full_like(embedding[:, 0], -jnp.inf), jnp.zeros_like(embedding[:, 0]))

    def see(self, block: _Block, axis: int) -> _LogSum:
        """With the logits of a block added, summed along `axis`."""
        top = block.logits.max(axis=axis)
        total = jnp.exp(block.logits - jnp.expand_dims(top, axis)).sum(axis=axis)
        return self.plus(_LogSum(top, total))

    def plus(self, other: _LogSum) -> _LogSum:
        """Of the terms of both. Either may be without terms, but not both."""
        top = jnp.maximum(self.top, other.top)
        ours, theirs = self.total * jnp.exp(self.top - top), other.total * jnp.exp(other.top - top)
        return _LogSum(top, ours + theirs)

    def minus(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        """log(sum(exp)) - x, exact also where both are large and near each other."""
        return self.top - x + jnp.log(self.total)

    def shares(self, block: _Block, axis: int) -> Float[Array, "images texts"]:
        """exp(logits) / sum, the sum having been taken along `axis`."""
        top, total = jnp.expand_dims(self.top, axis), jnp.expand_dims(self.total, axis)
        return jnp.exp(block.logits - top) * (1 / total)  # fewer divisions than shares


class _Slopes(NamedTuple):
    """The slopes, d(batch * loss) / d(logit), of each image, summed over the texts."""

    times_text: Float[Array, "images dim"]  # sum of slope * text
    total: Float[Array, " images"]

    @classmethod
    def start(cls, image: Float[Array, "images dim"]) -> _Slopes:
        return cls(jnp.zeros_like(image), jnp.zeros_like(image[:, 0]))

    def see(self, slope: Float[Array, "images texts"], text: Float[Array, "texts dim"]) -> _Slopes:
        """With the slopes of a block added."""
        times_text = jnp.einsum("it,td->id", slope, text, precision="highest")
        return _Slopes(self.times_text + times_text, self.total + slope.sum(axis=1))

    def gradients(
        self, ring: Ring, times_image: Float[Array, "texts dim"], image: Array, scale: Array
    ) -> Gradients:
        """Of the loss, `times_image` being the sum of slope * image over all images."""
        batch = image.shape[0] * ring.devices
        # A logit's gradient with regard to the scale is <image, text>; sum(slope * <image, text>)
        # needs no second look at the logits.
        to_scale = ring.sum((self.times_text * image).sum()) / batch
        to_bias = ring.sum(self.total.sum()) / batch
        return scale / batch * self.times_text, scale / batch * times_image, to_scale, to_bias


def _times_image(
    slope: Float[Array, "images texts"], image: Float[Array, "images dim"]
) -> Float[Array, "texts dim"]:
    return jnp.einsum("it,id->td", slope, image, precision="highest")


def _positions(owner: Int[Array, ""], count: int) -> Int[Array, " count"]:
    """In the global batch, of the part that device `owner` of the ring holds."""
    return owner * count + jnp.arange(count)


def _chain(unit: Gradients, cotangents: tuple[Array, Array]) -> Gradients:
    """Gradients for the cotangent of the loss. The hits have none."""
    return jax.tree.map(lambda x: cotangents[0] * x, unit)


# CLIP's softmax: one round for the sums of exponentials, another for the gradients.


def _softmax_sums(
    size: int, ring: Ring, image: Array, text: Array, scale: Array, bias: Array
) -> tuple[Array, Array, _LogSum, _LogSum]:
    """Loss, hits, and the sums of the rows of the images here and of the columns of the texts."""
    count = image.shape[0]

    def visit(owner: Array, text: Array, host: Any) -> tuple[_LogSum, Any]:
        column = _positions(owner, count)[None]

        def step(columns: _LogSum, rows: Any) -> tuple[_LogSum, Any]:
            image, row, (ranking, sums) = rows
            block = _Block(pair_logits(image, text, scale, bias), row[:, None], column)
            return columns.see(block, axis=0), (ranking.see(block), sums.see(block, axis=1))

        rows = image, _positions(ring.here(), count), host
        return _by_rows(size, step, _LogSum.start(text), rows)

    host = _Ranking.start(image), _LogSum.start(image)
    columns, (ranking, rows) = ring.around(visit, _LogSum.plus, text, _LogSum.start(text), host)
    # Text i is home again, with image i; their logit is the match of a row and of a column.
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
    count = image.shape[0]

    def visit(owner: Array, guest: Any, host: _Slopes) -> tuple[Array, _Slopes]:
        text, columns = guest
        column = _positions(owner, count)[None]

        def step(times_image: Array, rows: Any) -> tuple[Array, _Slopes]:
            image, row, sums, slopes = rows
            block = _Block(pair_logits(image, text, scale, bias), row[:, None], column)
            shares = sums.shares(block, axis=1) + columns.shares(block, axis=0)
            slope = 0.5 * shares - block.own
            return times_image + _times_image(slope, image), slopes.see(slope, text)

        by_row = image, _positions(ring.here(), count), rows, host
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


# SigLIP's sigmoid: the logits do not depend on each other, so that one round gives the loss and its
# gradients; these are multiplied by the cotangent when it is known.


def _sigmoid_sums(
    size: int,
    with_gradients: bool,
    ring: Ring,
    image: Array,
    text: Array,
    scale: Array,
    bias: Array,
) -> tuple[Array, Array, Any]:
    """Loss, hits, and the gradients, or () without them."""
    count = image.shape[0]

    def visit(owner: Array, text: Array, host: Any) -> tuple[Any, Any]:
        column = _positions(owner, count)[None]

        def step(times_image: Any, rows: Any) -> tuple[Any, Any]:
            image, row, (ranking, losses, slopes) = rows
            block = _Block(pair_logits(image, text, scale, bias), row[:, None], column)
            against = jnp.where(block.own, -block.logits, block.logits)
            losses = losses + jax.nn.softplus(against).sum(axis=1)
            if with_gradients:
                away = jax.nn.sigmoid(against)
                slope = jnp.where(block.own, -away, away)
                times_image = times_image + _times_image(slope, image)
                slopes = slopes.see(slope, text)
            return times_image, (ranking.see(block), losses, slopes)

        return _by_rows(size, step, start, (image, _positions(ring.here(), count), host))

    start, slopes = (jnp.zeros_like(text), _Slopes.start(image)) if with_gradients else ((), ())
    pack = jnp.add if with_gradients else lambda luggage, gift: ()
    host = _Ranking.start(image), jnp.zeros_like(image[:, 0]), slopes
    times_image, (ranking, losses, slopes) = ring.around(visit, pack, text, start, host)
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
