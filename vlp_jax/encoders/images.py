"""Images of any kind to the pixels that a model takes, by Pillow alone."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import UInt8

from vlp_jax.errors import UserError
from vlp_jax.interop.base import CROP_ROUNDINGS, RESAMPLINGS, RESIZES

# Twice Pillow's own mark of what is suspicious: there it stops, and so does a run's input.
MAX_PIXELS = 178_956_970
_RESAMPLING = {name: PIL.Image.Resampling[name.upper()] for name in RESAMPLINGS}

Image = Any  # PIL.Image.Image | np.ndarray | bytes | str | os.PathLike


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Images to uint8 [height, width, 3] as the model was trained and evaluated on them.

    Attributes:
      size: height and width in pixels.
      resize: "squash" changes the aspect ratio; "crop" scales the image until it covers the size
        and cuts the middle out, with torchvision's rounding.
      interpolation: one of `RESAMPLINGS`.
      scale, crop_rounding: as in `vlp_jax.interop.Extras`: what is scaled to before the cut.
      max_pixels: a larger image is refused before it is decoded.
    """

    size: tuple[int, int]
    resize: str = "squash"
    interpolation: str = "bicubic"
    scale: int | tuple[int, int] | None = None
    crop_rounding: str = "even"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        choices = {"resize": RESIZES, "interpolation": RESAMPLINGS, "crop_rounding": CROP_ROUNDINGS}
        for field, known in choices.items():
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
        opened, name = self.open(image, name)
        try:
            return np.asarray(self._fit(upright_rgb(opened)), np.uint8)
        except (OSError, ValueError, SyntaxError) as error:
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
        height, width = self.size
        sides = self._scaled(*image.size)
        image = image.resize(sides, _RESAMPLING[self.interpolation])
        left, top = (self._offset(have, want) for have, want in zip(sides, (width, height)))
        return image.crop((left, top, left + width, top + height))

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that an image is scaled to."""
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
        """Where a cut of `want` pixels begins; below 0 where black ones are added."""
        if have < want:
            return -((want - have) // 2)
        return (have - want) // 2 if self.crop_rounding == "down" else round((have - want) / 2)


def upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """A Pillow image in RGB, as its Exif orientation turns it.

    As in a run's input: what is transparent is composited on white, of 16 bits the upper 8 are
    kept, of an animation the first frame.
    """
    image.seek(0) if getattr(image, "is_animated", False) else image.load()
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, in whatever order of bytes
        pixels = np.asarray(image, np.int64)
        image = PIL.Image.fromarray((np.clip(pixels, 0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image)
    return image.convert("RGB")


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
        raise UserError(f"{name} is not an image that can be read") from None
    except PIL.Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large: {error}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{name} cannot be read: {error}") from None
