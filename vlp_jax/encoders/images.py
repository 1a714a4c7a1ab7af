"""Images of any kind to the pixels that a model takes, by Pillow alone."""

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

from vlp_jax.data.image_ops.headers import format_of
from vlp_jax.data.image_ops.upright import MAX_PIXELS, upright_rgb
from vlp_jax.errors import UserError
from vlp_jax.interop.base import INTERPOLATIONS, RESIZES

_RESAMPLING = {
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "bilinear": PIL.Image.Resampling.BILINEAR,
}
_RADIUS = 2  # pixels that a kernel reaches to each side: 2 if bicubic, 1 if bilinear
_MAX_BETWEEN = 2**23  # pixels of an image that a resize makes on its way, 32 MiB
_GAP = 4  # by how much such an average is larger than the result: more than Pillow's "fair" 3

Image = Any  # PIL.Image.Image | np.ndarray | bytes | str | os.PathLike


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Images to uint8 [height, width, 3] as the model was trained and evaluated on them.

    Attributes:
      size: height and width in pixels.
      resize: "squash" changes the aspect ratio; "crop" scales the image until it covers the size
        and cuts the middle out, with torchvision's rounding.
      interpolation: "bicubic" or "bilinear", antialiased.
      max_pixels: a larger image is refused before it is decoded.
    """

    size: tuple[int, int]
    resize: str = "squash"
    interpolation: str = "bicubic"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for field, known in (("resize", RESIZES), ("interpolation", INTERPOLATIONS)):
            if getattr(self, field) not in known:
                raise UserError(f"{field}={getattr(self, field)!r} must be {' or '.join(known)}")

    def __call__(
        self, image: Image, name: str = "the image"
    ) -> UInt8[np.ndarray, "height width 3"]:
        """The pixels of a file's path, a file's bytes, a Pillow image, or an array.

        Args:
          image: an array is uint8, [h, w, 3], [h, w, 4] or [h, w].
          name: what it is called in an error.

        Raises:
          UserError: it is no image, damaged, or has more than `max_pixels`.
        """
        return np.asarray(self._fit(self.upright(*self.open(image, name))), np.uint8)

    def upright(self, opened: PIL.Image.Image, name: str) -> PIL.Image.Image:
        """The pixels of what `open` returned, as `upright_rgb` makes them.

        Raises:
          UserError: the image is damaged.
        """
        try:
            return upright_rgb(opened)
        except Exception as error:  # Pillow raises errors of a dozen kinds on damaged files
            raise UserError(f"{name} is damaged: {error}") from None

    def open(self, image: Image, name: str = "the image") -> tuple[PIL.Image.Image, str]:
        """The Pillow image, whose pixels may not be decoded yet, and its name.

        Raises:
          UserError: it is no image, or has more than `max_pixels`.
        """
        if isinstance(image, np.ndarray):
            opened = _from_array(image, name)
        elif isinstance(image, PIL.Image.Image):
            opened = image
        else:
            opened, name = _from_file(image, name)
        width, height = opened.size
        if width * height > self.max_pixels:
            raise UserError(
                f"{name} has {width:,} x {height:,} pixels, more than the {self.max_pixels:,} that "
                "are read: make it smaller first"
            )
        return opened, name

    def _fit(self, image: PIL.Image.Image) -> PIL.Image.Image:
        method = _RESAMPLING[self.interpolation]
        if self.resize == "squash":
            return _squash(image, self.size, method)
        return _crop(image, self.size, method)


def _squash(
    image: PIL.Image.Image, size: tuple[int, int], method: PIL.Image.Resampling
) -> PIL.Image.Image:
    height, width = size
    # What lies between Pillow's two passes and its table of weights grow with the sides of an
    # image, so of a long and thin one groups of pixels are averaged first.
    long = max(width * image.height, height * image.width) > _MAX_BETWEEN
    return image.resize((width, height), method, reducing_gap=_GAP if long else None)


def _crop(
    image: PIL.Image.Image, size: tuple[int, int], method: PIL.Image.Resampling
) -> PIL.Image.Image:
    """Resizes the shorter side to the shorter of `size`, and cuts the middle out.

    Black stands beside a resized image that is smaller than `size`.
    """
    height, width = size
    sides = tuple(side * min(size) // min(image.size) for side in image.size)
    # Half to even, as in torchvision.
    begin = tuple(round((have - want) / 2) for have, want in zip(sides, (width, height)))
    box = (*begin, begin[0] + width, begin[1] + height)
    if math.prod(sides) <= _MAX_BETWEEN:
        return image.resize(sides, method).crop(box)
    return _thin_crop(image, sides, box, method)


def _thin_crop(
    image: PIL.Image.Image,
    sides: tuple[int, int],
    box: tuple[int, ...],
    method: PIL.Image.Resampling,
) -> PIL.Image.Image:
    """`image.resize(sides, method).crop(box)` but for rounding, without the whole resized image."""
    kept = [max(box[0], 0), max(box[1], 0), min(box[2], sides[0]), min(box[3], sides[1])]
    scales = [have / resized for have, resized in zip(image.size, sides)] * 2
    window = [at * scale for at, scale in zip(kept, scales)]
    # Pillow takes the corners of a window as float32, which in a long image are off by a pixel. So
    # what is resampled is first cut out at whole pixels.
    reach = [_RADIUS * max(scale, 1) + 1 for scale in scales]
    left, top = (max(math.floor(window[i] - reach[i]), 0) for i in (0, 1))
    right, bottom = (min(math.ceil(window[i] + reach[i]), image.size[i - 2]) for i in (2, 3))
    part = image.crop((left, top, right, bottom))
    limits = (right - left, bottom - top) * 2  # of what floating point rounds up
    window = [min(at - at0, end) for at, at0, end in zip(window, (left, top) * 2, limits)]
    found = part.resize((kept[2] - kept[0], kept[3] - kept[1]), method, tuple(window))
    return found.crop((box[0] - kept[0], box[1] - kept[1], box[2] - kept[0], box[3] - kept[1]))


def each_image(images: Image | Iterable[Image]) -> Iterator[tuple[str, Image]]:
    """(name, image) of one image, or of each of several."""
    single = str | os.PathLike | bytes | PIL.Image.Image
    if isinstance(images, single) or (isinstance(images, np.ndarray) and images.ndim < 4):
        images = [images]
    for number, image in enumerate(images):
        named = isinstance(image, str | os.PathLike)
        yield (str(image) if named else f"image {number}"), image


def _from_array(image: np.ndarray, name: str) -> PIL.Image.Image:
    fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
    if image.dtype != np.uint8 or not fits or not image.size:
        raise UserError(
            f"{name} is an array {image.dtype}{list(image.shape)}: give uint8 pixels, [height, "
            "width, 3], [height, width, 4] or [height, width]"
        )
    return PIL.Image.fromarray(image)


def _from_file(image: Image, name: str) -> tuple[PIL.Image.Image, str]:
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
    if isinstance(source, Path):
        with source.open("rb") as file:
            head = file.read(64)
    else:
        head = source.getvalue()[:64]
    if not head:
        return ": it is empty"
    found = format_of(head)
    return f": its format is {found}" if found else f": it begins with {head[:8]!r}"
