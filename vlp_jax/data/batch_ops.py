"""Operations that mix examples of a finished batch with each other, in NumPy.

An operation is called with a batch, arrays [b, ...], and a seed for each example,
int32 [b, 2], and returns the new batch; `output_spec` says its shapes and types without running it.
Example i is mixed with example i ^ 1 alone, so that the result does not depend on how many
processes share a batch, as long as each has an even number of its examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlp_jax.data.sources.base import as_plain
from vlp_jax.errors import UserError, check_arguments, unknown_key_message

Spec = dict[str, tuple[tuple[int, ...], np.dtype]]


@dataclass(frozen=True)
class MixUp:
    """Mixes each image and label with its neighbour's in the batch.

    MixUp (Zhang et al. 2018, eq. 1) and CutMix (Yun et al. 2019, eq. 1 and 2). A pair draws one
    share from Beta(alpha, alpha), and each of the two keeps that much of itself (rounded to 1/128).
    With both alphas above 0 a pair is mixed by either, each half of the time.

    Attributes:
      alpha: of MixUp; Zhang et al. 2018 take 0.1 to 0.4 on ImageNet. 0 turns it off.
      num_classes: length of the soft labels that replace the labels.
      label_field: the field with the class, a whole number.
      cutmix_alpha: of CutMix; Yun et al. 2019 take 1. 0 turns it off.
    """

    alpha: float
    num_classes: int
    label_field: str = "label"
    cutmix_alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha", "cutmix_alpha"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise UserError(f"mixup: {name} must be a number of at least 0, got {value!r}")
        if self.alpha == 0 and self.cutmix_alpha == 0:
            raise UserError("mixup: alpha and cutmix_alpha are both 0; leave the operation out")
        classes = self.num_classes
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
            raise UserError(f"mixup: num_classes must be a whole number above 1, got {classes!r}")

    def output_spec(self, spec: Spec) -> Spec:
        """The shapes (without the batch) and types of the result for an input `spec`.

        Raises UserError without a uint8 image of three dimensions or a single whole number as
        label.
        """
        image, label = spec.get("image"), spec.get(self.label_field)
        if image is None or image[1] != np.uint8 or len(image[0]) != 3:
            raise UserError(f"mixup: needs 'image', uint8 [height, width, 3], got {image}")
        if label is None or label[0] != () or not np.issubdtype(label[1], np.integer):
            name = self.label_field
            raise UserError(f"mixup: needs {name!r}, a whole number; set label_field (got {label})")
        return {**spec, self.label_field: ((self.num_classes,), np.dtype(np.float32))}

    def __call__(self, batch: Mapping[str, np.ndarray], seeds: np.ndarray) -> dict[str, np.ndarray]:
        """Mixes each pair; other fields stay as they are.

        `batch` holds `image`, uint8 [b, h, w, 3], and the labels, whole numbers [b]; the new labels
        are float32 [b, num_classes] and sum to 1. Of the seeds, int32 [b, 2], a pair takes the
        first one's. Raises UserError if b is odd, a label is out of range, or a field is not as it
        should be.
        """
        self.output_spec({k: (v.shape[1:], v.dtype) for k, v in batch.items()})
        images, labels = batch["image"], batch[self.label_field]
        if len(images) % 2:
            raise UserError(
                f"mixup: a process has {len(images)} examples of a batch, and pairs need an even "
                "number; choose another batch_size"
            )
        if labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
            top = self.num_classes - 1
            raise UserError(
                f"mixup: labels must be 0 to {top}, got {labels.min()} to {labels.max()}"
            )
        mixed = np.empty_like(images)
        weights = np.empty(len(images), np.float32)
        # Pair by pair, because a float copy of the whole batch would not fit into the cache.
        for first in range(0, len(images), 2):
            pair = slice(first, first + 2)
            weights[pair] = self._mix_pair(images[pair], seeds[first], mixed[pair])
        rows = np.arange(len(labels))
        soft = np.zeros((len(labels), self.num_classes), np.float32)
        soft[rows, labels] = weights
        soft[rows, labels[rows ^ 1]] += 1 - weights
        return {**batch, "image": mixed, self.label_field: soft}

    def _mix_pair(self, pair: np.ndarray, seed: np.ndarray, mixed: np.ndarray) -> float:
        """Writes both mixtures of two images; returns the share that each keeps of itself."""
        # By way of uint32, because a negative int32 would fill the upper half with ones.
        key = np.asarray(seed, np.int32).astype(np.uint32).astype(np.uint64)
        random = np.random.Generator(np.random.Philox(key=key))
        both = self.alpha > 0 and self.cutmix_alpha > 0
        cut = random.random() < 0.5 if both else self.cutmix_alpha > 0
        alpha = self.cutmix_alpha if cut else self.alpha
        share = float(random.beta(alpha, alpha))
        if cut:
            return _exchange_rectangle(pair, share, random, mixed)
        return _blend(pair, share, mixed)


def _blend(pair: np.ndarray, share: float, mixed: np.ndarray) -> float:
    """Blends both of a pair: share * own + (1 - share) * other, rounded. Returns the share.

    The share is rounded to 1/128, so that 16-bit whole numbers hold every product.
    """
    parts = round(128 * share)
    first, second = pair[0].astype(np.int16), pair[1].astype(np.int16)
    step = first - second
    step *= np.int16(parts)
    step += np.int16(64)  # half of 128, so that the shift below rounds
    step >>= 7
    np.add(second, step, out=mixed[0], casting="unsafe")
    np.subtract(first, step, out=mixed[1], casting="unsafe")
    return parts / 128


def _exchange_rectangle(
    pair: np.ndarray, share: float, random: np.random.Generator, mixed: np.ndarray
) -> float:
    """Exchanges a rectangle of 1 - share of the area, about a point taken anywhere.

    Source: Yun et al. 2019, eq. 2 and their `rand_bbox`, which cuts off what lies outside.
    """
    height, width = pair.shape[1:3]
    side = np.sqrt(1 - share)
    center = random.random(2) * (height, width)
    half = side * np.array([height, width]) / 2
    top, left = np.clip(np.rint(center - half).astype(int), 0, (height, width))
    bottom, right = np.clip(np.rint(center + half).astype(int), 0, (height, width))
    mixed[:] = pair
    mixed[:, top:bottom, left:right] = pair[::-1, top:bottom, left:right]
    # The part of the rectangle inside of the image, not `share`: labels follow the pixels.
    return 1 - (bottom - top) * (right - left) / (height * width)


# In the order in which they run.
BATCH_OPS: dict[str, Callable[..., MixUp]] = {"mixup": MixUp}


def build_batch_ops(config: Mapping[str, Any] | None, local_size: int) -> list[MixUp]:
    """Builds the operations of a config's `batch_ops`, for `local_size` examples in a process.

    Raises UserError for an unknown operation or argument, or an odd number of examples.
    """
    chosen = as_plain(config or {})
    for name, arguments in chosen.items():
        if name not in BATCH_OPS:
            raise UserError(unknown_key_message(str(name), BATCH_OPS, "data.batch_ops"))
        check_arguments(BATCH_OPS[name], arguments, f"data.batch_ops.{name}")
    if chosen and local_size % 2:
        raise UserError(
            f"data.batch_ops mixes pairs, and a process has {local_size} examples of a batch: "
            "choose a batch_size that gives every process an even number"
        )
    return [BATCH_OPS[name](**chosen[name]) for name in BATCH_OPS if name in chosen]
