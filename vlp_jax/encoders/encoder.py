"""A trained model as a library hands it out: images and texts in, embeddings out."""

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
      source: what it was loaded from, as the user named it.
      module: `DualEncoder`, `CoCa`, `MaskedAutoencoder`, `Captioner` or `VisionTransformer`.
      weights: path -> float32 array, layers stacked (`vlp_jax.interop.trees`).
      functions: name -> `f(params, array)`, those of the objective that it is of.
      images: makes pixels of an image.
      texts: makes token ids of a text; None if the model takes none.
      step: of the checkpoint; None for files of others.
      notes: what a user should know of how it was read, a line each.
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
        """The tree of parameters that `module.apply` takes, on the default device."""
        return jax.device_put(to_tree(self.module, self.weights))

    @property
    def tokenizer(self) -> Any:
        """Texts to token ids; see `vlp_jax.data.tokenizers`.

        Raises:
          UserError: the model takes no texts.
        """
        return self._texts.tokenizer

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pixels that the model takes."""
        return self.images.size

    @property
    def logit_scale(self) -> float:
        """The factor on a cosine similarity that makes a logit of it.

        Raises:
          UserError: the model takes no texts.
        """
        return self._logit_parameters[0]

    @property
    def logit_bias(self) -> float:
        """What is added to a logit; 0 for models of the softmax loss. Raises as `logit_scale`."""
        return self._logit_parameters[1]

    def embed_image(
        self, images: Image | Iterable[Image], batch_size: int = BATCH_SIZE
    ) -> Float[np.ndarray, "n dim"]:
        """Unit vectors of images, float32.

        Args:
          images: one or several (any iterable, read as it is needed) of: the path of a file, its
            bytes, a Pillow image, a uint8 array [height, width, 3]. An array [n, height, width, 3]
            is n images.
          batch_size: how many are computed at a time.

        Raises:
          UserError: one of them is no image, is damaged or too large; it is named.
        """
        pixels = (self.images(image, name) for name, image in each_image(images))
        return self._embed("embed_image", pixels, batch_size)

    def embed_text(
        self, texts: str | Sequence[str], batch_size: int = BATCH_SIZE
    ) -> Float[np.ndarray, "n dim"]:
        """Unit vectors of texts, float32. A text longer than the context is cut, with a warning.

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
        """Texts about images, each of them by itself; `images` as for `embed_image`.

        Args:
          prompt: what each text begins with; it is not in the result.
          batch_size: how many are computed at a time.
          settings: `length`, `beams`, `length_penalty`, `temperature`, `top_k`, `top_p` and `seed`,
            see `vlp_jax.objectives.captioning.Captioning.caption`.

        Raises:
          UserError: the model says no captions, a prompt leaves no room, or a setting is none.
        """
        ids = self.tokenizer.encode(self._texts.preprocess([prompt]))[0] if prompt else []
        pixels = (self.images(image, name) for name, image in each_image(images))
        made = self._outputs("caption", pixels, batch_size, prompt=tuple(ids), **settings)
        return [text for part in made for text in self.tokenizer.decode(part.tokens)]

    def apply(
        self, name: str, rows: Iterable[np.ndarray], batch_size: int = BATCH_SIZE
    ) -> np.ndarray:
        """What a function of the model makes of rows that are prepared already.

        Args:
          name: in `functions`.
          rows: pixels or token ids of one example each.

        Raises:
          UserError: the model has no such function.
        """
        return self._embed(name, iter(rows), batch_size)

    def logits(
        self, images: Image | Iterable[Image], texts: str | Sequence[str]
    ) -> Float[np.ndarray, "images texts"]:
        """`logit_scale` * cosine similarity + `logit_bias` of every image with every text."""
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
        bias = self.weights.get("logit_bias", np.float32(0))
        return float(np.exp(self.weights["logit_scale"])), float(bias)

    @functools.cached_property
    def _jitted(self) -> dict[Any, Callable[..., Any]]:
        return {}

    def _program(self, name: str, **settings: Any) -> Callable[..., Any]:
        """A function with these settings, to be compiled once for each shape."""
        if name not in self.functions:
            raise UserError(f"{self.source} has no {name}")
        key = (name, *sorted(settings.items()))
        if key not in self._jitted:
            self._jitted[key] = jax.jit(functools.partial(self.functions[name], **settings))
        return self._jitted[key]

    def _embed(self, name: str, rows: Iterator[np.ndarray], batch_size: int) -> np.ndarray:
        """What a function makes of rows."""
        found = list(self._outputs(name, rows, batch_size))
        return np.concatenate(found) if found else self._nothing(name)

    def _outputs(
        self, name: str, rows: Iterator[np.ndarray], batch_size: int, **settings: Any
    ) -> Iterator[Any]:
        """What a function makes of rows, in batches of few sizes, each compiled once.

        Raises:
          UserError: there is no such function, or a setting is none of it.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is at least 1, not {batch_size}")
        function = self._program(name, **settings)
        while batch := list(itertools.islice(rows, batch_size)):
            # The last batch is filled up to a power of two.
            size = min(1 << (len(batch) - 1).bit_length(), batch_size)
            padded = np.stack(batch + batch[-1:] * (size - len(batch)))
            try:
                made = function(self.params, padded)
            except (TypeError, ValueError) as error:
                if not settings:
                    raise
                raise UserError(f"{name}: {error}") from error
            yield jax.tree.map(lambda x: np.asarray(x)[: len(batch)], made)

    def _nothing(self, name: str) -> np.ndarray:
        text = name == "embed_text"
        shape = (1, self.tokenizer.context_length) if text else (1, *self.image_size, 3)
        one = jax.ShapeDtypeStruct(shape, np.int32 if text else np.uint8)
        out = jax.eval_shape(self.functions[name], self.params, one)
        return np.zeros((0, *out.shape[1:]), out.dtype)
