"""Random masks of patches, drawn for each image (He et al. 2022, "MAE"; Li et al. 2023, "FLIP")."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray


class PatchMask(NamedTuple):
    """The visible patches of each image.

    For 4 patches of which 3 and 0 are visible, and the hidden ones come in the order 2, 1:
    keep = [3, 0], restore = [1, 3, 2, 0], hidden = [0, 1, 1, 0]. `keep` has the order in which the
    encoder gets the patches, `restore` each patch's place among visible, then hidden patches.
    """

    keep: Int[Array, "batch kept"]
    restore: Int[Array, "batch patches"]
    hidden: Float[Array, "batch patches"]


def kept_patches(patches: int, mask_ratio: float) -> int:
    """Returns the number of visible patches, rounded down as in the published code.

    Raises ValueError for a ratio that is not in [0, 1), or would hide every patch.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be in [0, 1), not {mask_ratio}")
    kept = int(patches * (1 - mask_ratio))
    if kept < 1:
        raise ValueError(f"mask_ratio {mask_ratio} leaves none of the {patches} patches visible")
    return kept


def mask_from_noise(noise: Float[Array, "batch patches"], kept: int) -> PatchMask:
    """Makes the mask in which the `kept` patches with the least noise are visible."""
    order = jnp.argsort(noise, axis=1)
    # The argsort of a permutation is its inverse.
    restore = jnp.argsort(order, axis=1)
    return PatchMask(order[:, :kept], restore, (restore >= kept).astype(jnp.float32))


def random_mask(rng: PRNGKeyArray, batch: int, patches: int, kept: int) -> PatchMask:
    """Draws `kept` visible patches for each of `batch` images."""
    return mask_from_noise(jax.random.uniform(rng, (batch, patches)), kept)


def take_tokens(
    x: Num[Array, "batch tokens *rest"], indices: Int[Array, "batch kept"]
) -> Num[Array, "batch kept *rest"]:
    """Selects the tokens at `indices` from each sequence."""
    return jnp.take_along_axis(x, indices.reshape(*indices.shape, *(1,) * (x.ndim - 2)), axis=1)
