"""Converts images of any kind to the pixels that a model takes, with Pillow alone."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from vlp_jax.data.image_ops.upright import MAX_PIXELS, format_of, upright_rgb
from vlp_jax.errors import UserError
from vlp_jax.interop.base import RESAMPLINGS, RESIZE_CHOICES, check_choices

_RESAMPLING = {name: PIL.Image.Resampling[name.upper()] for name in RESAMPLINGS}
_RADIUS = 3  # reach of the largest kernel, Lanczos, in pixels of the result
_MAX_BETWEEN = 2**23  # largest intermediate image of a resize, in pixels: 32 MiB
# `reducing_gap`: the averaged image is at least this factor larger than the result. Pillow calls 3
# a fair quality.
_GAP = 4

Image = Any  # PIL.Image.Image | np.ndarray | bytes | str | os.PathLike


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Converts images to uint8 [height, width, 3], as in training and evaluation.

    Attributes:
      size: height and width in pixels.
      resize: "squash" changes the aspect ratio; "crop" scales the image until it covers the size,
        and crops the center, with torchvision's rounding.
      interpolation: one of `RESAMPLINGS`.
      scale, crop_rounding: see `vlp_jax.interop.Extras`.
      max_pixels: a larger image is refused before it is decoded.
    """

    size: tuple[int, int]
    resize: str = "squash"
    interpolation: str = "bicubic"
    scale: int | tuple[int, int] | None = None
    crop_rounding: str = "even"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        check_choices(self, RESIZE_CHOICES)

    def __call__(
        self, image: Image, name: str = "the image"
    ) -> UInt8[np.ndarray, "height width 3"]:
        """Converts an image to pixels.

        Args:
          image: the path of a file, a file's bytes, a Pillow image, or a uint8 array [h, w, 3],
            [h, w, 4] or [h, w].
          name: the name of the image in errors.

        Raises:
          UserError: the image is invalid, damaged, or has more than `max_pixels`.
        """
        return np.asarray(self._fit(self.upright(*self.open(image, name))), np.uint8)

    def upright(self, opened: PIL.Image.Image, name: str) -> PIL.Image.Image:
        """Decodes an image that `open` returned, see `upright_rgb`; raises UserError for damage."""
        try:
            return upright_rgb(opened)
        except Exception as error:  # Pillow raises errors of a dozen kinds on damaged files
            raise UserError(f"{name} is damaged: {error}") from None

    def open(self, image: Image, name: str = "the image") -> tuple[PIL.Image.Image, str]:
        """Opens an image without decoding it; returns the Pillow image and its name.

        Raises:
          UserError: the image is invalid, or has more than `max_pixels`.
        """
        opened, name = _opened(image, name)
        width, height = opened.size
        if width * height > self.max_pixels:
            raise UserError(
                f"{name} has {width:,} x {height:,} pixels, more than the {self.max_pixels:,} that "
                "are read: make it smaller first"
            )
        return opened, name

    def _fit(self, image: PIL.Image.Image) -> PIL.Image.Image:
        (height, width), method = self.size, _RESAMPLING[self.interpolation]
        sides = self._scaled(*image.size)
        left, top = (self._offset(have, want) for have, want in zip(sides, (width, height)))
        box = (left, top, left + width, top + height)
        if math.prod(sides) > _MAX_BETWEEN:
            return _part_of_resized(image, sides, box, method)
        # Pillow resizes in two passes. The image between them, and the table of weights, grow with
        # the sides of the image. So a long, thin image is first reduced by averaging pixels.
        long = max(sides[0] * image.height, sides[1] * image.width) > _MAX_BETWEEN
        return image.resize(sides, method, reducing_gap=_GAP if long else None).crop(box)

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """Returns the width and height to which an image is scaled before the crop."""
        scale = self.scale
        if self.resize == "squash":
            return (self.size if scale is None else scale)[::-1]
        if scale is None:
            scale = self.size[0] if self.size[0] == self.size[1] else self.size
        if isinstance(scale, tuple):  # timm's and open_clip's `ResizeKeepRatio`
            ratio = min(height / scale[0], width / scale[1])
            return round(width / ratio), round(height / ratio)
        short = min(width, height)  # torchvision's Resize
        return max(width * scale // short, 1), max(height * scale // short, 1)

    def _offset(self, have: int, want: int) -> int:
        """Returns where a crop of `want` pixels begins; below 0 where black pixels are added."""
        if have < want:
            return -((want - have) // 2)
        return (have - want) // 2 if self.crop_rounding == "down" else round((have - want) / 2)


def _part_of_resized(
    image: PIL.Image.Image,
    sides: tuple[int, int],
    box: tuple[int, ...],
    method: PIL.Image.Resampling,
) -> PIL.Image.Image:
    """Computes `image.resize(sides, method).crop(box)`, without the whole resized image."""
    kept = [max(box[0], 0), max(box[1], 0), min(box[2], sides[0]), min(box[3], sides[1])]
    # Doubled for left, top, right and bottom.
    scales = [have / resized for have, resized in zip(image.size, sides)] * 2
    window = [at * scale for at, scale in zip(kept, scales)]
    # Pillow converts the corners of a window to float32, which can be off by a pixel in a long
    # image. So the image is first cropped at whole pixels around the window.
    reach = [_RADIUS * max(scale, 1) + 1 for scale in scales]
    left, top = (max(math.floor(window[i] - reach[i]), 0) for i in (0, 1))
    right, bottom = (min(math.ceil(window[i] + reach[i]), image.size[i - 2]) for i in (2, 3))
    part = image.crop((left, top, right, bottom))
    limits = (right - left, bottom - top) * 2  # rounding must not push a corner out of the image
    window = [min(at - at0, end) for at, at0, end in zip(window, (left, top) * 2, limits)]
    resized = part.resize((kept[2] - kept[0], kept[3] - kept[1]), method, tuple(window))
    return resized.crop((box[0] - kept[0], box[1] - kept[1], box[2] - kept[0], box[3] - kept[1]))


def each_image(images: Image | Iterable[Image]) -> Iterator[tuple[str, Image]]:
    """Yields (name, image) for one image, or for each of several images."""
    single = str | os.PathLike | bytes | PIL.Image.Image
    # An array of four dimensions is iterated over like a list of images.
    if isinstance(images, single) or (isinstance(images, np.ndarray) and images.ndim < 4):
        images = [images]
    for number, image in enumerate(images):
        named = isinstance(image, str | os.PathLike)
        yield (str(image) if named else f"image {number}"), image


def _opened(image: Image, name: str) -> tuple[PIL.Image.Image, str]:
    if isinstance(image, PIL.Image.Image):
        return image, name
    if isinstance(image, np.ndarray):
        fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
        if image.dtype != np.uint8 or not fits or not image.size:
            raise UserError(
                f"{name} is an array {image.dtype}{list(image.shape)}: give uint8 pixels, [height, "
                "width, 3], [height, width, 4] or [height, width]"
            )
        return PIL.Image.fromarray(image), name
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        if not path.is_file():
            raise UserError(f"{path} is no file")
        name, source = str(path), path
    elif isinstance(image, bytes):
        source = io.BytesIO(image)
    else:
        raise UserError(
            f"{name} is of {type(image).__name__}: give a path, the bytes of a file, a Pillow "
            "image or an array"
        )
    try:
        return PIL.Image.open(source), name
    except PIL.UnidentifiedImageError:
        raise UserError(f"{name} is not an image that can be read{_told_format(source)}") from None
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large: {error}") from None
    except Exception as error:  # Pillow raises errors of a dozen kinds on damaged files
        raise UserError(f"{name} cannot be read: {error}") from None


def _told_format(source: Path | io.BytesIO) -> str:
    if isinstance(source, io.BytesIO):
        head = source.getvalue()[:64]
    else:
        with source.open("rb") as file:
            head = file.read(64)
    if not head:
        return ": it is empty"
    name = format_of(head)
    return f": its format is {name}" if name else f": it begins with {head[:8]!r}"
