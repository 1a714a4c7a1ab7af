"""Random masking of patches, an own one for each image (He et al. 2022, "MAE"; Li et al. 2023,
"FLIP")."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


class PatchMask(NamedTuple):
    """Which patches of each image are visible.

    Attributes:
      keep: indices of the visible patches, in the order in which the encoder gets them.
      restore: for each patch its place in the sequence of visible, then hidden patches.
      hidden: 1 for each patch that is hidden, else 0.
    """

    keep: Int[Array, "batch kept"]
    restore: Int[Array, "batch patches"]
    hidden: Float[Array, "batch patches"]


def kept_patches(patches: int, mask_ratio: float) -> int:
    """How many patches stay visible: a whole number, rounded down as in the published code.

    Raises:
      ValueError: the ratio is not in [0, 1), or would hide every patch.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be in [0, 1), not {mask_ratio}")
    kept = int(patches * (1 - mask_ratio))
    if kept < 1:
        raise ValueError(f"mask_ratio {mask_ratio} leaves none of the {patches} patches visible")
    return kept


def mask_from_noise(noise: Float[Array, "batch patches"], kept: int) -> PatchMask:
    """The `kept` patches with the least noise stay visible."""
    order = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(order, axis=1)
    return PatchMask(order[:, :kept], restore, (restore >= kept).astype(jnp.float32))


def random_mask(rng: PRNGKeyArray, batch: int, patches: int, kept: int) -> PatchMask:
    """`kept` random patches of each of `batch` images stay visible."""
    return mask_from_noise(jax.random.uniform(rng, (batch, patches)), kept)


def take_tokens(
    x: Float[Array, "batch tokens *rest"], indices: Int[Array, "batch kept"]
) -> Float[Array, "batch kept *rest"]:
    """Of each sequence the tokens at its own `indices`."""
    return jnp.take_along_axis(x, indices.reshape(*indices.shape, *(1,) * (x.ndim - 2)), axis=1)
