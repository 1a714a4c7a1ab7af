"""Fields of an operation on images: the image, the result, and the boxes of both.

The boxes of `image` are the field `boxes`; the boxes of another image `view` are `view_boxes`. They
are float32 [n, 4] with ymin, xmin, ymax, xmax of each, as fractions of the height and the width of
the upright image. Fields with a row for each box are named alike: `labels`, `view_labels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlp_jax.data.lazy_tensorflow import Example, tf
from vlp_jax.errors import UserError


def check_count(op: str, value: int, name: str, unit: str = "pixels") -> None:
    """Raises UserError unless `value` is a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{op}: {name} must be a whole number of {unit} above 0, got {value!r}")


def check_number(op: str, value: float, name: str, low: float, high: float = math.inf) -> None:
    """Raises UserError unless `value` is a number in [low, high]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        bound = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise UserError(f"{op}: {name} must be a number {bound}, got {value!r}")


def check_range(op: str, low: float, high: float, name: str, bound: float = math.inf) -> None:
    """Raises UserError unless 0 < low <= high <= bound, for the settings min_ and max_`name`."""
    if not 0 < low <= high <= bound:
        last = "" if bound == math.inf else f" <= {bound:g}"
        raise UserError(f"{op}: needs 0 < min_{name} <= max_{name}{last}: {low}, {high}")


def check_fill(op: str, fill: int | tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns a colour as three numbers from 0 to 255; a single number is a grey."""
    color = (fill,) * 3 if isinstance(fill, int) else tuple(fill)
    if len(color) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in color):
        raise UserError(f"{op}: fill must be one or three whole numbers 0 to 255, got {fill!r}")
    return color


IMAGE = "image"
MIN_BOX_SHARE = 0.25


@dataclass(frozen=True)
class ImageField:
    """The image `field` that an operation `op` reads, and the field that gets the result.

    With `into` None the result replaces the image. Boxes go along.
    """

    op: str
    field: str = IMAGE
    into: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.field, str) or not isinstance(self.target, str):
            names = f"{self.field!r}, {self.into!r}"
            raise UserError(f"{self.op}: field and into are names of fields, got {names}")

    @property
    def target(self) -> str:
        return self.field if self.into is None else self.into

    @property
    def boxes(self) -> str:
        return _beside(self.field, "boxes")

    def encoded(self, example: Example) -> tf.Tensor:
        """Returns the file, a string; raises UserError if the image is decoded already."""
        if example[self.field].dtype != tf.string:
            raise UserError(
                f"{self.op}: {self.field!r} is decoded already; leave the operation out"
            )
        return example[self.field]

    def decoded(self, example: Example) -> tf.Tensor:
        """Returns the pixels, uint8 [h, w, 3]; raises UserError for anything else."""
        image = example[self.field]
        if image.dtype == tf.string:
            raise UserError(
                f"{self.op}: {self.field!r} is still encoded; put decode_image before it"
            )
        if image.dtype != tf.uint8 or image.shape.rank != 3:
            found = f"{image.dtype.name} {tuple(image.shape)}"
            raise UserError(
                f"{self.op}: {self.field!r} must be uint8 [height, width, 3], got {found}"
            )
        return image

    def has_boxes(self, example: Example) -> bool:
        """Whether the image has boxes; raises UserError if their field holds something else."""
        if self.boxes not in example:
            return False
        boxes = example[self.boxes]
        right = boxes.shape.rank == 2 and boxes.shape[1] in (4, None)
        if boxes.dtype != tf.float32 or not right:
            raise UserError(
                f"{self.op}: {self.boxes!r} must be float32 [n, 4], the boxes of {self.field!r}, "
                f"got {boxes.dtype.name} {tuple(boxes.shape)}"
            )
        return True

    def refuse_boxes(self, example: Example) -> None:
        """Raises UserError if the image has boxes, which the operation cannot move."""
        if self.boxes in example:
            raise UserError(
                f"{self.op}: it cannot move {self.boxes!r} with the pixels; leave the operation "
                f"out, or drop {self.boxes!r} by keep before it"
            )

    def write(self, example: Example, image: tf.Tensor) -> Example:
        """Adds the result to the example; boxes keep their places."""
        return self.write_moved(example, image, lambda boxes: boxes)

    def write_moved(
        self, example: Example, image: tf.Tensor, move: Callable[[tf.Tensor], tf.Tensor]
    ) -> Example:
        """Adds the result to the example; `move` changes the boxes, [n, 4] to [n, 4]."""
        result = {**example, self.target: image}
        if self.boxes in example and self.has_boxes(example):
            result[_beside(self.target, "boxes")] = move(example[self.boxes])
        return result

    def beside(self, example: Example, name: str) -> str:
        """The field `name` of the image that is read, such as "view_labels".

        It is plain `name` as long as no operation has written one for this image alone.
        """
        own = _beside(self.field, name)
        return own if own in example else name


@dataclass(frozen=True)
class BoxRule:
    """The rule by which boxes stay when a part of an image is cut out.

    Attributes:
      min_share: a box stays if at least this share of its area is in the part. It is clipped.
      fields: the names, beside `image`, of fields with a row for each box, which lose the same
        rows; None if not said.
    """

    op: str
    min_share: float | None
    fields: Sequence[str] | None

    def __post_init__(self) -> None:
        if self.min_share is not None:
            check_number(self.op, self.min_share, "min_box_share", 0, 1)
        names = () if self.fields is None else self.fields
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{self.op}: box_fields is a list of fields, got {self.fields!r}")

    def write(
        self, images: ImageField, example: Example, image: tf.Tensor, window: tf.Tensor
    ) -> Example:
        """Adds a part of an image, and the boxes in it, to the example.

        `window` is begin and extent of the part, fractions of the image's sides, float32 [2, 2].
        """
        if not images.has_boxes(example):
            if self.fields is not None or self.min_share is not None:
                raise UserError(
                    f"{self.op}: box_fields or min_box_share is set, and {images.field!r} has no "
                    f"{images.boxes!r}: leave them out, or name the boxes by data.fields"
                )
            return {**example, images.target: image}
        if self.fields is None:
            raise UserError(
                f"{self.op}: {images.field!r} has {images.boxes!r}; set box_fields to the list of "
                "fields with a row for each box, [] for none"
            )
        share = MIN_BOX_SHARE if self.min_share is None else self.min_share
        boxes, kept = boxes_within(example[images.boxes], window, share)
        result = {**example, images.target: image, _beside(images.target, "boxes"): boxes}
        for name in self.fields:
            rows = example[images.beside(example, name)]
            if not rows.shape.rank:
                raise UserError(f"{self.op}: {name!r} has no row for each box; see box_fields")
            result[_beside(images.target, name)] = tf.boolean_mask(rows, kept)
        return result


def _beside(field: str, name: str) -> str:
    """The field `name` of the image `field`."""
    return name if field == IMAGE else f"{field}_{name}"


def boxes_within(
    boxes: tf.Tensor, window: tf.Tensor, min_share: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """The boxes in a part of an image, float32 [k, 4], and which of n these are, bool [n].

    A box stays if the part holds some of its area, and at least `min_share` of it. So a box without
    an area goes. `boxes`, float32 [n, 4], and `window`, begin and extent, [2, 2], are fractions.
    """
    # In fractions of the part, where its corners are 0 and 1.
    moved = (tf.ensure_shape(boxes, [None, 4]) - tf.tile(window[0], [2])) / tf.tile(window[1], [2])
    clipped = tf.clip_by_value(moved, 0.0, 1.0)
    left, whole = _areas(clipped), _areas(moved)
    kept = (left > 0) & (left >= min_share * whole)
    return tf.boolean_mask(clipped, kept), kept


def _areas(boxes: tf.Tensor) -> Any:
    sides = tf.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    return sides[:, 0] * sides[:, 1]
