"""Stores weights in fewer bits: bfloat16, or int8 with a scale for each output of a matrix.

int8 is symmetric: the largest magnitude among the weights of one output becomes 127 (absmax;
Dettmers et al. 2022, "LLM.int8()", section 2). Only weights are rounded; computation stays in
floating point. Matrices are the kernels and the table of token ids. Everything else (biases, norms,
positions, learned tokens, the logit scale) stays float32.

A file has two arrays for a matrix in int8: `PATH` (int8), and `PATH.scale` (float32, the same
number of axes), by which it is multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

WEIGHTS = ("float32", "bfloat16", "int8")
SCALE = ".scale"  # no path of a parameter has a dot
LARGEST = 127


def inputs_of(path: str) -> tuple[int, ...] | None:
    """Returns the axes (negative) over which a matrix product sums; None for no matrix.

    The table of token ids has one scale for each token (row).
    """
    if path.endswith("token_embedding/embedding"):
        return (-1,)
    if not path.endswith("/kernel"):
        return None
    # Module and layer: ["attention", "query"] of ".../attention/query/kernel".
    layer = path.split("/")[-3:-1]
    if layer[0] == "attention":
        return (-3, -2) if layer[1] == "out" else (-3,)
    return (-4, -3, -2) if layer[0] == "patch_embedding" else (-2,)


def quantize(x: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a float32 matrix to int8; returns it with its scales, one for all of `axes`."""
    scale = np.max(np.abs(x), axis=axes, keepdims=True).astype(np.float32) / LARGEST
    scale = np.where(scale > 0, scale, np.float32(1))  # else a row of zeros divides by 0
    return np.rint(x / scale).astype(np.int8), scale


def stored(params: Mapping[str, Any], weights: str) -> dict[str, np.ndarray]:
    """Converts parameters to the arrays of a file with the precision `weights`.

    With bfloat16, only single numbers such as the logit scale stay float32.
    """
    arrays: dict[str, np.ndarray] = {}
    for path, value in params.items():
        x = np.asarray(value, np.float32)
        axes = inputs_of(path) if weights == "int8" else None
        if axes is not None:
            arrays[path], arrays[path + SCALE] = quantize(x, axes)
        else:
            # An exponential follows the logit scale, so single numbers stay exact.
            arrays[path] = x.astype(jnp.bfloat16) if weights == "bfloat16" and x.ndim else x
    return arrays


def restored(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the arrays of `stored` back to float32 parameters; works on traced arrays too."""
    params = {}
    for path, x in arrays.items():
        if not path.endswith(SCALE):
            params[path] = x.astype(jnp.float32) * arrays.get(path + SCALE, np.float32(1))
    return params


def rounded(params: Mapping[str, Any], weights: str) -> dict[str, np.ndarray]:
    """Rounds float32 parameters as storing them with `weights` would."""
    if weights == "float32":
        return dict(params)
    return restored(stored(params, weights))


def narrowed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Casts each tensor to bfloat16 if that loses nothing.

    Parameters that were rounded before take half the space. Tensors that a format adds, such as a
    table of sines, keep their precision.
    """
    narrow = {}
    for key, x in tensors.items():
        half = x.astype(jnp.bfloat16) if x.ndim and x.dtype == np.float32 else x
        # A NaN is not equal to itself, so a tensor with a NaN is not narrowed.
        narrow[key] = half if np.array_equal(half.astype(x.dtype), x) else x
    return narrow
