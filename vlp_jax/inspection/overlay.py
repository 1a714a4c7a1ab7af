"""A heat map laid over its image."""

from __future__ import annotations

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8

COLORS = "viridis"  # ordered by lightness, so that it reads in grey and with any color vision
STRENGTH = 0.55  # of the colors of the map; the rest is the image, half of it in grey
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def overlay(
    image: UInt8[np.ndarray, "height width 3"], heat: Float[np.ndarray, "rows columns"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Lays the colors of a map over a paler image: from dark (0) through green to yellow (1).

    Args:
      heat: clipped to [0, 1]. With fewer rows and columns than the image, its cells become
        rectangles.

    Raises:
      ValueError: its rows and columns do not divide the image's height and width.
    """
    height, width = image.shape[:2]
    rows, columns = heat.shape
    if height % rows or width % columns:
        raise ValueError(f"a map of {rows} x {columns} does not lie on {height} x {width} pixels")
    heat = np.repeat(np.repeat(heat, height // rows, axis=0), width // columns, axis=1)
    paler = (0.5 * image + 0.5 * (image @ _LUMA)[..., None]) / 255
    colors = matplotlib.colormaps[COLORS](np.clip(heat, 0, 1))[..., :3]
    return np.round(255 * ((1 - STRENGTH) * paler + STRENGTH * colors)).astype(np.uint8)
