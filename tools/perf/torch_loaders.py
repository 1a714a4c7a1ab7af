"""The loaders that `tools.perf.data` compares with: PyTorch's and WebDataset's, with Pillow.

Imports PyTorch, which only the tests require. Worker processes import this module and no more of
ours that is heavy.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch.utils.data import DataLoader, Dataset

START = "spawn"  # TensorFlow has threads, and a process that has must not fork
RATIOS = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Transform:
    """Turns an encoded image into uint8 [size, size, 3]: decodes, cuts at random, resizes.

    Attributes:
      resize: "pillow": with antialiasing as torchvision resizes Pillow's images, without it by
        Pillow's `transform`, its only way, which takes longer; "torch": by
        `torch.nn.functional.interpolate` on the bytes, four times as fast as `transform`.
    """

    size: int
    min_scale: float
    antialias: bool
    resize: str

    def __call__(self, encoded: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        box = random_box(*image.size, self.min_scale)
        if self.resize == "pillow":
            kernel = Image.Resampling.BILINEAR
            if self.antialias:
                image = image.resize((self.size, self.size), kernel, box=box)
            else:
                extent = Image.Transform.EXTENT
                image = image.transform((self.size, self.size), extent, box, kernel)
            return torch.from_numpy(np.array(image))
        pixels = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)[None]
        size = (self.size, self.size)
        resized = F.interpolate(pixels, size, mode="bilinear", antialias=self.antialias)
        return resized[0].permute(1, 2, 0).contiguous()


def random_box(width: int, height: int, min_scale: float) -> tuple[int, int, int, int]:
    """Draws left, top, right and bottom of a crop, as TensorFlow draws ours.

    The height is uniform, not the area: crops are smaller, and so quicker to resize, than with
    torchvision's RandomResizedCrop of the same least area.

    Source: tensorflow/core/kernels/image/sample_distorted_bounding_box_op.cc, GenerateRandomCrop.
    """
    for _ in range(100):
        ratio = random.uniform(*RATIOS)
        least, most = (
            round(math.sqrt(scale * width * height / ratio)) for scale in (min_scale, 1.0)
        )
        most = min(most, int((width + 0.5) / ratio), height)
        h = random.randint(min(least, most), most)
        w = min(round(h * ratio), width)
        if min_scale * width * height <= w * h:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


class Files(Dataset):
    """Image files."""

    def __init__(self, files: list[str], transform: Transform) -> None:
        self._files, self._transform = files, transform

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._transform(Path(self._files[index]).read_bytes())


class RandomBatches:
    """Numbers of files in random order, epoch after epoch: `batches` batches of them."""

    def __init__(self, count: int, batch_size: int, batches: int) -> None:
        self._count, self._batch_size, self._batches = count, batch_size, batches

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        order: list[int] = []
        for _ in range(self._batches):
            while len(order) < self._batch_size:
                order += np.random.permutation(self._count).tolist()
            yield order[: self._batch_size]
            order = order[self._batch_size :]


class TorchLoader:
    """A DataLoader whose workers stay between turns; idle, because a turn reads to the end.

    Args:
      batches: of a turn.
      more: arguments of DataLoader.
    """

    def __init__(self, dataset: Any, workers: int, batches: int, **more: Any) -> None:
        self._batches = batches
        # A start of workers takes seconds, and belongs to no turn.
        more |= {"persistent_workers": True, "multiprocessing_context": START}
        self._loader = DataLoader(dataset, num_workers=workers, **more)

    def open(self, batches: int) -> Iterator[np.ndarray]:
        """Reads all batches of a turn."""
        if batches != self._batches:
            raise ValueError(f"made for turns of {self._batches} batches, not {batches}")
        return (batch.numpy() for batch in self._loader)


def files_loader(
    files: list[str], transform: Transform, *, batch_size: int, workers: int, batches: int
) -> TorchLoader:
    """Opens PyTorch's DataLoader on image files, in random order, with turns of `batches`."""
    sampler = RandomBatches(len(files), batch_size, batches)
    return TorchLoader(Files(files, transform), workers, batches, batch_sampler=sampler)


def webdataset_loader(
    shards: list[str], transform: Transform, *, batch_size: int, workers: int, batches: int
) -> TorchLoader:
    """Opens WebDataset's loader on tar shards, shuffled, with turns of `batches`.

    Raises:
      ImportError: webdataset is not installed.
    """
    import webdataset as wds

    if batches % workers:
        raise ValueError(f"{batches} batches cannot be divided among {workers} workers")
    # Workers draw shards with replacement: each gets the same number of batches.
    dataset = wds.WebDataset(shards, resampled=True, shardshuffle=False)
    dataset = dataset.shuffle(1000, initial=100).map(partial(_image, transform=transform))
    dataset = dataset.batched(batch_size, collation_fn=torch.stack, partial=False)
    dataset = dataset.with_epoch(batches // workers)  # of each worker
    return TorchLoader(dataset, workers, batches, batch_size=None)


def _image(sample: dict[str, Any], transform: Transform) -> torch.Tensor:
    return transform(sample["jpg"])
