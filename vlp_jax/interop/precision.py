"""Weights in fewer bits: bfloat16, and int8 with a scale for each output of a matrix.

int8 is symmetric and of the weights alone: the largest magnitude of what makes one output becomes
127 (absmax; Dettmers et al. 2022, "LLM.int8()", section 2). Computation stays in floating point. A
matrix is a kernel or the table of token ids; all else (biases, norms, positions, tokens, the scale
of the logits) stays float32.

Of an array in int8 a file has two: `PATH`, int8, and `PATH.scale`, float32, with as many axes, by
which it is multiplied.
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
    """The axes of a matrix over which it sums, counted from its last; None if it is no matrix.

    A table of token ids has a scale for each token, which is one row.

    Args:
      path: of a parameter, its layers stacked or not.
    """
    if path.endswith("token_embedding/embedding"):
        return (-1,)
    if not path.endswith("/kernel"):
        return None
    layer = path.split("/")[-3:-1]
    if layer[0] == "attention":
        return (-3, -2) if layer[1] == "out" else (-3,)
    return (-4, -3, -2) if layer[0] == "patch_embedding" else (-2,)


def quantize(x: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """int8 and float32 scales (axes kept) of which the product is nearest to a matrix.

    Args:
      x: float32 `[..., inputs, outputs]` in any order of axes.
      axes: over which one scale holds.
    """
    scale = np.max(np.abs(x), axis=axes, keepdims=True).astype(np.float32) / LARGEST
    scale = np.where(scale > 0, scale, np.float32(1))  # a row of zeros
    return np.rint(x / scale).astype(np.int8), scale


def stored(params: Mapping[str, Any], weights: str) -> dict[str, np.ndarray]:
    """The arrays of a file in which parameters have one of `WEIGHTS`.

    In bfloat16 all is so but single numbers, such as the scale of the logits.
    """
    arrays: dict[str, np.ndarray] = {}
    for path, value in params.items():
        x = np.asarray(value, np.float32)
        axes = inputs_of(path) if weights == "int8" else None
        if axes is not None:
            arrays[path], arrays[path + SCALE] = quantize(x, axes)
        else:
            arrays[path] = x.astype(jnp.bfloat16) if weights == "bfloat16" and x.ndim else x
    return arrays


def restored(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stored`: float32 parameters, of NumPy's arrays or traced ones."""
    params = {}
    for path, x in arrays.items():
        if path.endswith(SCALE):
            continue
        x = x.astype(jnp.float32)
        scale = arrays.get(path + SCALE)
        params[path] = x if scale is None else x * scale
    return params


def rounded(params: Mapping[str, Any], weights: str) -> dict[str, np.ndarray]:
    """The float32 parameters that are left of others when they were stored with `weights`."""
    if weights == "float32":
        return dict(params)
    return restored(stored(params, weights))


def narrowed(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors as bfloat16 where that holds each of their numbers exactly, as they are elsewhere.

    So parameters that were rounded before take half the room, and what a format adds to them, such
    as a table of sines, keeps its digits.
    """
    narrow = {}
    for key, x in tensors.items():
        half = x.astype(jnp.bfloat16) if x.ndim and x.dtype == np.float32 else x
        narrow[key] = half if np.array_equal(half.astype(x.dtype), x) else x
    return narrow
