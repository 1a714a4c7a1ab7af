"""The constants of each corruption and severity, as the arrays that the functions take.

Numbers: hendrycks/robustness, ImageNet-C/create_c/make_tinyimagenet_c.py (SMALL) and
make_imagenet_c.py (LARGE). All severities of a corruption have arrays of one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

SMALL: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.04, 0.08, 0.12, 0.15, 0.18),
    "shot_noise": (250, 100, 50, 30, 15),
    "impulse_noise": (0.01, 0.02, 0.05, 0.08, 0.14),
    # radius of the disk, standard deviation of its edge
    "defocus_blur": ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
    # radius, standard deviation
    "motion_blur": ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
    # the end and the step of the factors
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    # amount, decay
    "fog": ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "pixelate": (0.9, 0.8, 0.7, 0.6, 0.5),
    "jpeg_compression": (65, 58, 50, 40, 25),
}
LARGE: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
}
# Sizes at the strongest severity. Weaker ones are padded, so that one compiled program serves all.
DISK_REACH, MOST_TAPS, MOST_ZOOMS = 10, 41, 26

# ITU-T T.81, tables K.1 and K.2, row by row.
LUMA_TABLE = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 "
    "62 18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 "
    "98 112 100 103 99"
)
CHROMA_TABLE = (
    "17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 "
    "99" + " 99" * 32
)


def of(name: str, severity: int, height: int, width: int, *, small: bool) -> tuple[np.ndarray, ...]:
    """Returns the arrays that the corruption `name` takes after the image, float32."""
    value = (SMALL if small else LARGE)[name][severity - 1]
    arrays = MAKERS[name](value, height, width) if name in MAKERS else value
    arrays = arrays if isinstance(arrays, tuple) else (arrays,)
    return tuple(np.asarray(array, np.float32) for array in arrays)


def disk(radius: float, blur: float) -> Float[np.ndarray, "side side"]:
    """Makes a disk with a blurred edge that sums to 1, padded with zeros to one size for all."""
    # As in the authors' `disk`: kernels of at least 17, and a blur of 3 taps, or of 5 for large
    # disks.
    reach = 8 if radius <= 8 else int(radius)
    place = np.arange(-reach, reach + 1)
    flat = (place**2 + place[:, None] ** 2 <= radius**2).astype(np.float64)
    flat /= flat.sum()
    taps = 1 if radius <= 8 else 2
    edge = np.exp(-(np.arange(-taps, taps + 1) ** 2) / (2 * blur**2))
    edge /= edge.sum()
    padded = np.pad(flat, taps, mode="reflect")
    rows = sum(w * padded[i : i + len(flat)] for i, w in enumerate(edge))
    both = sum(w * rows[:, i : i + len(flat)] for i, w in enumerate(edge))
    return np.pad(both, DISK_REACH - reach)


def motion_weights(radius: int, stddev: float) -> Float[np.ndarray, " taps"]:
    """Makes half of a Gaussian: the weights of a pixel and of the next ones, which sum to 1."""
    place = np.arange(2 * radius + 1)
    weights = np.exp(-(place**2) / (2 * stddev**2))
    return np.pad(weights / weights.sum(), (0, MOST_TAPS - len(weights)))


def zoom_matrix(size: int, factor: float) -> Float[np.ndarray, "size size"]:
    """Makes the matrix that enlarges the middle of `size` values by `factor`, and crops to `size`.

    It interpolates linearly like `scipy.ndimage.zoom` of order 1, which maps the ends to the ends.
    """
    kept = int(np.ceil(size / factor))
    top = (size - kept) // 2
    enlarged = max(round(kept * factor), size)
    source = np.linspace(0, kept - 1, enlarged) if enlarged > 1 else np.zeros(1)
    source = top + source[(enlarged - size) // 2 :][:size]
    low = np.clip(np.floor(source).astype(int), 0, size - 1)
    high = np.minimum(low + 1, size - 1)
    matrix, rows = np.zeros((size, size)), np.arange(size)
    np.add.at(matrix, (rows, low), 1 - (source - low))
    np.add.at(matrix, (rows, high), source - low)
    return matrix


def zooms(end: float, step: float, height: int, width: int) -> tuple[np.ndarray, ...]:
    """Makes the zoom matrices of rows and of columns, and the weights of the factors."""
    factors = np.arange(1, end, step)
    weights = np.full(len(factors), 1 / (len(factors) + 1))
    weights[0] *= 2  # the authors add the image itself to the sum once more
    missing = MOST_ZOOMS - len(factors)
    matrices = (
        np.pad(np.stack([zoom_matrix(size, f) for f in factors]), ((0, missing), (0, 0), (0, 0)))
        for size in (height, width)
    )
    return (*matrices, np.pad(weights, (0, missing)))


def box_matrix(size: int, new: int) -> Float[np.ndarray, "new size"]:
    """Makes the matrix that resizes `size` values to `new` by Pillow's box filter."""
    scale = size / new
    half = max(scale, 1) / 2
    matrix = np.zeros((new, size))
    for row in range(new):
        center = (row + 0.5) * scale
        first, last = max(int(center - half + 0.5), 0), min(int(center + half + 0.5), size)
        matrix[row, first:last] = 1 / (last - first)
    return matrix


def pixelated(share: float, height: int, width: int) -> tuple[np.ndarray, ...]:
    """Makes matrices for rows and columns that shrink an image and enlarge it to its old size."""

    def there_and_back(size: int) -> np.ndarray:
        small = max(int(size * share), 1)
        return box_matrix(small, size) @ box_matrix(size, small)

    return there_and_back(height), there_and_back(width)


def jpeg_tables(quality: int) -> Int[np.ndarray, "2 8 8"]:
    """Returns JPEG's quantization tables (libjpeg, jcparam.c, jpeg_quality_scaling)."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    base = np.array([LUMA_TABLE.split(), CHROMA_TABLE.split()], int).reshape(2, 8, 8)
    return np.clip((base * scale + 50) // 100, 1, 255)


MAKERS: dict[str, Callable[[Any, int, int], Any]] = {
    "defocus_blur": lambda value, height, width: disk(*value),
    "motion_blur": lambda value, height, width: motion_weights(*value),
    "zoom_blur": lambda value, height, width: zooms(*value, height, width),
    "fog": lambda value, height, width: value,
    "pixelate": pixelated,
    "jpeg_compression": lambda value, height, width: jpeg_tables(value),
}
