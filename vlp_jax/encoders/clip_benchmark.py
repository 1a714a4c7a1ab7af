"""Adapts a model to CLIP_benchmark's interface (clip_benchmark/models/__init__.py, 1.6).

    from clip_benchmark import models
    models.TYPE2FUNC["vlp_jax"] = load_for_clip_benchmark
    models.MODEL_TYPES.append("vlp_jax")

`python -m tools.clip_benchmark` does so and then runs CLIP_benchmark's command.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from vlp_jax.encoders.encoder import Encoder, load
from vlp_jax.encoders.images import ImageProcessor
from vlp_jax.encoders.texts import TextProcessor
from vlp_jax.errors import UserError

MODEL_TYPE = "vlp_jax"


def register() -> None:
    """Adds `--model_type vlp_jax` to CLIP_benchmark; raises UserError if it is not installed."""
    try:
        from clip_benchmark import models
    except ImportError as error:
        raise UserError(
            f"CLIP_benchmark cannot be imported ({error}): pip install clip-benchmark"
        ) from None
    models.TYPE2FUNC[MODEL_TYPE] = load_for_clip_benchmark
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)


def mend_accuracy() -> bool:
    """Replaces CLIP_benchmark's `accuracy` where it fails with NumPy 2.4 (TypeError in 1.6.2).

    It converts an array with one element to a float, which NumPy no longer does. The replacement
    counts the same hits. Returns whether it was needed.
    """
    from clip_benchmark.metrics import linear_probe, zeroshot_classification

    try:
        zeroshot_classification.accuracy(torch.eye(2), torch.arange(2))
        return False
    except TypeError:
        for module in (zeroshot_classification, linear_probe):
            module.accuracy = _accuracy
        return True


def _accuracy(
    output: torch.Tensor, target: torch.Tensor, topk: Sequence[int] = (1,)
) -> list[float]:
    ranked = output.topk(max(topk), dim=1).indices
    hits = ranked == target[:, None]
    return [hits[:, :k].any(dim=1).double().mean().item() for k in topk]


def load_for_clip_benchmark(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: Any = "cpu"
) -> tuple[BenchmarkModel, Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """Returns (model, transform, tokenizer) like `clip_benchmark.models.load_clip`.

    Args:
      model_name: a source for `vlp_jax.load`, such as a workdir or hf:DIR.
      pretrained: the step of a workdir's checkpoint; "" for the newest.
      cache_dir: ignored, because nothing is downloaded.
      device: PyTorch's device for the results. The model itself runs on JAX's device.

    Raises:
      UserError: see `vlp_jax.load`; or the model takes no texts.
    """
    del cache_dir
    if pretrained and not pretrained.isdigit():
        raise UserError(f"--pretrained {pretrained!r}: give a step of {model_name}, or ''")
    encoder = load(model_name, step=int(pretrained) if pretrained else None)
    if encoder.texts is None:
        raise UserError(f"{model_name} is an image model, and CLIP_benchmark needs texts")
    # A `DataLoader` sends the transform to its worker processes, so it must not hold JAX objects.
    of_image = functools.partial(transform, encoder.images)
    return BenchmarkModel(encoder, device), of_image, functools.partial(tokenize, encoder.texts)


class BenchmarkModel(torch.nn.Module):
    """Implements `encode_image` and `encode_text` for PyTorch tensors, without gradients."""

    def __init__(self, encoder: Encoder, device: Any):
        super().__init__()
        self._encoder, self._device = encoder, device

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds uint8 images [n, 3, height, width] as unit vectors [n, dim]."""
        pixels = np.ascontiguousarray(images.cpu().numpy().transpose(0, 2, 3, 1))
        return self._as_tensor(self._encoder.apply("embed_image", pixels))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeds token ids [n, context] as unit vectors [n, dim]."""
        return self._as_tensor(self._encoder.apply("embed_text", tokens.cpu().numpy()))

    def _as_tensor(self, vectors: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(vectors)).to(self._device)


def transform(images: ImageProcessor, image: Any) -> torch.Tensor:
    """Converts a Pillow image to uint8 [3, height, width]; the model normalizes the pixels."""
    return torch.from_numpy(images(image).transpose(2, 0, 1).copy())


def tokenize(processor: TextProcessor, texts: str | Sequence[str]) -> torch.Tensor:
    """Converts texts to token ids [n, context]."""
    listed = [texts] if isinstance(texts, str) else list(texts)
    return torch.from_numpy(processor(listed).astype(np.int64))
