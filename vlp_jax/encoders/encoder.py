"""A trained model with its preprocessing: embeds images and texts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from vlp_jax.encoders.images import Image, ImageProcessor, each_image
from vlp_jax.encoders.texts import TextProcessor
from vlp_jax.errors import UserError
from vlp_jax.interop.trees import Module, Params, to_tree

BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """A model with its parameters and its preprocessing.

    Attributes:
      source: the workdir or files it was loaded from, as the user named them.
      module: `DualEncoder`, `CoCa`, `MaskedAutoencoder`, `Captioner` or `VisionTransformer`.
      weights: path -> float32 array, with stacked layers (`vlp_jax.interop.trees`).
      functions: name -> `f(params, array)`, the functions of the model's objective.
      images: converts images to pixels.
      texts: converts texts to token ids; None if the model takes no texts.
      step: step of the checkpoint; None for foreign files.
      notes: lines for the user about how the model was read.
    """

    source: str
    module: Module
    weights: Params
    functions: dict[str, Callable[..., Any]]
    images: ImageProcessor
    texts: TextProcessor | None
    step: int | None = None
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """The tree of parameters for `module.apply`, on the default device."""
        return jax.device_put(to_tree(self.module, self.weights))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; see `vlp_jax.data.tokenizers`.

        Raises:
          UserError: the model takes no texts.
        """
        return self._texts.tokenizer

    @property
    def image_size(self) -> tuple[int, int]:
        """The height and width of images that the model takes."""
        return self.images.size

    @property
    def logit_scale(self) -> float:
        """The factor on the cosine similarity in a logit.

        Raises:
          UserError: the model takes no texts.
        """
        return self._logit_parameters[0]

    @property
    def logit_bias(self) -> float:
        """The bias of a logit; 0 for models of the softmax loss. Raises like `logit_scale`."""
        return self._logit_parameters[1]

    def embed_image(
        self, images: Image | Iterable[Image], batch_size: int = BATCH_SIZE
    ) -> Float[np.ndarray, "n dim"]:
        """Embeds images as unit vectors, float32.

        Args:
          images: an image or an iterable of images, which is read lazily. An image is the path of a
            file, its bytes, a Pillow image, or a uint8 array [height, width, 3]. An array [n,
            height, width, 3] is n images.
          batch_size: number of images that are computed at a time.

        Raises:
          UserError: an image is invalid, damaged or too large; the error names it.
        """
        pixels = (self.images(image, name) for name, image in each_image(images))
        return self._embed("embed_image", pixels, batch_size)

    def embed_text(
        self, texts: str | Sequence[str], batch_size: int = BATCH_SIZE
    ) -> Float[np.ndarray, "n dim"]:
        """Embeds texts as unit vectors, float32. A too long text is truncated, with a warning.

        Raises:
          UserError: the model takes no texts, or a text is empty.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self._embed("embed_text", iter(self._texts(texts)), batch_size)

    def caption(
        self,
        images: Image | Iterable[Image],
        *,
        prompt: str = "",
        batch_size: int = BATCH_SIZE,
        **settings: Any,
    ) -> list[str]:
        """Generates a caption for each image; for `images` see `embed_image`.

        Args:
          prompt: the beginning of each caption; it is not part of the result.
          batch_size: number of images that are computed at a time.
          settings: `length`, `beams`, `length_penalty`, `temperature`, `top_k`, `top_p` and `seed`,
            see `vlp_jax.objectives.captioning.Captioning.caption`.

        Raises:
          UserError: the model cannot caption, the prompt fills the context, or a setting is
            invalid.
        """
        ids = self.tokenizer.encode(self._texts.preprocess([prompt]))[0] if prompt else []
        pixels = (self.images(image, name) for name, image in each_image(images))
        batches = self._outputs("caption", pixels, batch_size, prompt=tuple(ids), **settings)
        return [text for batch in batches for text in self.tokenizer.decode(batch.tokens)]

    def apply(
        self, name: str, rows: Iterable[np.ndarray], batch_size: int = BATCH_SIZE
    ) -> np.ndarray:
        """Applies a function of the model to preprocessed rows.

        Args:
          name: a key of `functions`.
          rows: the pixels or token ids of one example each.

        Raises:
          UserError: the model has no such function.
        """
        return self._embed(name, iter(rows), batch_size)

    def logits(
        self, images: Image | Iterable[Image], texts: str | Sequence[str]
    ) -> Float[np.ndarray, "images texts"]:
        """Computes `logit_scale` * cosine + `logit_bias` of every image with every text."""
        cosine = self.embed_image(images) @ self.embed_text(texts).T
        return cosine * np.float32(self.logit_scale) + np.float32(self.logit_bias)

    @property
    def _texts(self) -> TextProcessor:
        if self.texts is None:
            raise UserError(f"{self.source} is an image model: it takes no texts")
        return self.texts

    @functools.cached_property
    def _logit_parameters(self) -> tuple[float, float]:
        if "logit_scale" not in self.weights:
            raise UserError(f"{self.source} is an image model: it has no logits of pairs")
        # The softmax of a row does not change with a bias on all its logits. So models of the
        # softmax loss have no bias.
        bias = self.weights.get("logit_bias", np.float32(0))
        return float(np.exp(self.weights["logit_scale"])), float(bias)

    @functools.cached_property
    def _jitted(self) -> dict[Any, Callable[..., Any]]:
        return {}

    def _program(self, name: str, **settings: Any) -> Callable[..., Any]:
        """Returns a function with these settings, jitted once for each shape."""
        if name not in self.functions:
            raise UserError(f"{self.source} has no {name}")
        # Two calls of `jax.jit` on new partials would compile the same program twice.
        key = (name, *sorted(settings.items()))
        if key not in self._jitted:
            self._jitted[key] = jax.jit(functools.partial(self.functions[name], **settings))
        return self._jitted[key]

    def _embed(self, name: str, rows: Iterator[np.ndarray], batch_size: int) -> np.ndarray:
        """Applies a function to rows, and joins the results."""
        batches = list(self._outputs(name, rows, batch_size))
        return np.concatenate(batches) if batches else self._nothing(name)

    def _outputs(
        self, name: str, rows: Iterator[np.ndarray], batch_size: int, **settings: Any
    ) -> Iterator[Any]:
        """Yields a function's results for batches of rows.

        Raises:
          UserError: there is no such function, or it does not take a setting.
        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        function = self._program(name, **settings)
        while batch := list(itertools.islice(rows, batch_size)):
            # The last batch is padded to a power of two. So there are few sizes to compile for.
            size = min(1 << (len(batch) - 1).bit_length(), batch_size)
            padded = np.stack(batch + batch[-1:] * (size - len(batch)))
            try:
                result = function(self.params, padded)
            except (TypeError, ValueError) as error:
                # The user's settings are the usual cause. Without any, this is a bug of ours.
                if not settings:
                    raise
                raise UserError(f"{name}: {error}") from error
            yield jax.tree.map(lambda x: np.asarray(x)[: len(batch)], result)

    def _nothing(self, name: str) -> np.ndarray:
        """Returns the result of a function for no rows, with the right shape and dtype."""
        text = name == "embed_text"
        shape = (1, self.tokenizer.context_length) if text else (1, *self.image_size, 3)
        one = jax.ShapeDtypeStruct(shape, np.int32 if text else np.uint8)
        # Traces the function, and computes nothing.
        out = jax.eval_shape(self.functions[name], self.params, one)
        return np.zeros((0, *out.shape[1:]), out.dtype)
