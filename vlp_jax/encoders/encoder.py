"""Loads a trained model, from a run or from foreign files; embeds images and texts with it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float

from vlp_jax import interop
from vlp_jax.encoders.foreign_texts import tokenizer_of_files
from vlp_jax.encoders.images import Image, ImageProcessor, each_image
from vlp_jax.encoders.texts import TextProcessor, tokenizer_from
from vlp_jax.errors import UserError
from vlp_jax.interop.trees import Module, Params, image_of, to_tree, with_dtype
from vlp_jax.models.coca import CoCa
from vlp_jax.models.decoder import Captioner
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.objectives import objective_of
from vlp_jax.objectives.base import Function
from vlp_jax.objectives.compute import DTYPES
from vlp_jax.training.run import Run, bounded, resizing

BATCH_SIZE = 64
# Models that can be loaded from a run. Of several in a composite, the first in this order becomes
# `Encoder.module`.
LOADED = (DualEncoder, CoCa, MaskedAutoencoder, Captioner)
RESIZING = ("resize", "interpolation", "scale", "crop_rounding")  # fields of `interop.Extras`


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
        """The tokenizer, see `vlp_jax.data.tokenizers`; a UserError if the model takes no texts."""
        return self._texts.tokenizer

    @property
    def image_size(self) -> tuple[int, int]:
        """The height and width of images that the model takes."""
        return self.images.size

    @property
    def logit_scale(self) -> float:
        """The factor on the cosine similarity in a logit; a UserError if there are no logits."""
        if "logit_scale" not in self.weights:
            raise UserError(f"{self.source} is an image model: it has no logits of pairs")
        return float(np.exp(self.weights["logit_scale"]))

    @property
    def logit_bias(self) -> float:
        """The bias of a logit. It is 0 for models of the softmax loss, which it cannot change."""
        return float(self.weights.get("logit_bias", 0.0))

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
        return self.apply("embed_image", self._pixels(images), batch_size)

    def embed_text(
        self, texts: str | Sequence[str], batch_size: int = BATCH_SIZE
    ) -> Float[np.ndarray, "n dim"]:
        """Embeds texts as unit vectors, float32. A too long text is truncated, with a warning.

        Raises:
          UserError: the model takes no texts, or a text is empty.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self.apply("embed_text", self._texts(texts), batch_size)

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
        settings["prompt"] = tuple(ids)
        batches = self._outputs("caption", self._pixels(images), batch_size, settings)
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
        batches = list(self._outputs(name, rows, batch_size, {}))
        if batches:
            return np.concatenate(batches)
        # No rows: the result has the shape and dtype that it would have. This computes nothing.
        text = name == "embed_text"
        shape = (1, self.tokenizer.context_length) if text else (1, *self.image_size, 3)
        one = jax.ShapeDtypeStruct(shape, np.int32 if text else np.uint8)
        out = jax.eval_shape(self.functions[name], self.params, one)
        return np.zeros((0, *out.shape[1:]), out.dtype)

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

    def _pixels(self, images: Image | Iterable[Image]) -> Iterator[np.ndarray]:
        return (self.images(image, name) for name, image in each_image(images))

    @functools.cached_property
    def _jitted(self) -> dict[Any, Callable[..., Any]]:
        return {}

    def _outputs(
        self, name: str, rows: Iterable[np.ndarray], batch_size: int, settings: dict[str, Any]
    ) -> Iterator[Any]:
        """Yields the results for batches of rows; raises UserError for an unknown setting."""
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        if name not in self.functions:
            raise UserError(f"{self.source} has no {name}")
        # Two calls of `jax.jit` on new partials would compile the same program twice.
        key, rows = (name, *sorted(settings.items())), iter(rows)
        if key not in self._jitted:
            self._jitted[key] = jax.jit(functools.partial(self.functions[name], **settings))
        while batch := list(itertools.islice(rows, batch_size)):
            # The last batch is padded to a power of two. So there are few sizes to compile for.
            size = min(1 << (len(batch) - 1).bit_length(), batch_size)
            padded = np.stack(batch + batch[-1:] * (size - len(batch)))
            try:
                result = self._jitted[key](self.params, padded)
            except (TypeError, ValueError) as error:
                # The user's settings are the usual cause. Without any, this is a bug of ours.
                if not settings:
                    raise
                raise UserError(f"{name}: {error}") from error
            yield jax.tree.map(lambda x: np.asarray(x)[: len(batch)], result)


def load(
    source: str | os.PathLike,
    *,
    step: int | None = None,
    params: str = "auto",
    dtype: str = "float32",
    tokenizer: str | None = None,
) -> Encoder:
    """Loads a model with its preprocessing, ready to embed images and texts.

        model = load("runs/clip")            # or "hf:DIR", "open_clip:DIR", "big_vision:FILE.npz"
        model.embed_image(["a.jpg", "b.png"]) @ model.embed_text(["a red ring"]).T

    Args:
      source: the workdir of a run, or FORMAT:PATH with one of `vlp_jax.interop.FORMATS`.
      step: the step of a run's checkpoint; None for the newest.
      params: the parameters ("params") of a run's checkpoint, their average ("ema"), or the average
        if there is one ("auto").
      dtype: dtype of the computation, "float32" or "bfloat16".
      tokenizer: a tokenizer.json or a SentencePiece .model, for files without a tokenizer.

    Raises:
      UserError: there is no run or checkpoint, or the files cannot be read.
    """
    source = os.fspath(source)
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} must be {' or '.join(DTYPES)}")
    if not is_foreign(source):
        if tokenizer is not None:
            raise UserError(f"{source} is a run, which has its own tokenizer")
        return _of_run(source, Run.open(source), step, params, dtype)
    if step is not None or params != "auto":
        raise UserError(f"{source} is no run: it has no steps, and one kind of parameters")
    interop.format_named(source.partition(":")[0])
    return _of_files(source, dtype, tokenizer)


def is_foreign(source: str) -> bool:
    """Whether a source is FORMAT:PATH, and not the workdir of a run, which may be gs://..."""
    _, colon, rest = source.partition(":")
    return bool(colon) and not rest.startswith("//") and not epath.Path(source).exists()


def _of_run(source: str, run: Run, step: int | None, params: str, dtype: str) -> Encoder:
    saved = run.saved(step, params)
    leaves = [part.objective for part in run.objective.parts().values()]
    usable = sorted(
        (leaf for leaf in leaves if isinstance(leaf.model, LOADED)),
        key=lambda leaf: LOADED.index(type(leaf.model)),
    )
    if not usable:
        kinds = ", ".join(type(leaf.model).__name__ for leaf in leaves)
        raise UserError(f"{source} is a run of {kinds}, which has no embeddings of its own")
    functions: dict[str, Function] = {}
    for leaf in usable:  # of two functions with the same name the first counts
        cast = dataclasses.replace(leaf, model=with_dtype(leaf.model, DTYPES[dtype]))
        functions = cast.functions() | functions
    # The checkpoint of a composite also has the parameters of the parts that are not usable.
    expected = {path for leaf in usable for path in interop.trees.expected_shapes(leaf.model)}
    weights = {k: v for k, v in bounded(usable[0], saved.read()).items() if k in expected}
    module, notes, texts = with_dtype(usable[0].model, DTYPES[dtype]), [], None
    if functions.keys() & {"embed_text", "caption"}:
        wording, more = run.wording
        texts = TextProcessor(run.tokenizer, wording)
        notes += more
    return Encoder(
        source=source,
        module=module,
        weights=weights,
        functions=functions,
        images=ImageProcessor(image_of(module).image_size, **resizing(run.config, notes)),
        texts=texts,
        step=saved.step,
        notes=tuple(notes),
    )


def _of_files(source: str, dtype: str, tokenizer: str | None) -> Encoder:
    imported = interop.read(source)
    module = with_dtype(imported.module, DTYPES[dtype])
    extras, texts, notes = interop.Extras(**imported.extras), None, list(imported.notes)
    if "text" in module.towers():
        if tokenizer is not None:
            made = tokenizer_from(str(Path(tokenizer).expanduser()), module.text)
        else:
            made = tokenizer_of_files(extras.tokenizer, module.text, extras.pad_id, source, notes)
        texts = TextProcessor(made)
    elif tokenizer is not None:
        raise UserError(f"{source} is an image model: it takes no tokenizer")
    objective = objective_of(
        module,
        pixels=extras.pixels,
        mask_ratio=extras.mask_ratio,
        normalize_targets=extras.norm_pix_loss,
    )
    how = {name: getattr(extras, name) for name in RESIZING}
    return Encoder(
        source=source,
        module=module,
        weights=imported.params,
        functions=objective.functions(),
        images=ImageProcessor(image_of(module).image_size, **how),
        texts=texts,
        notes=tuple(notes),
    )
