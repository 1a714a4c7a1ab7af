"""Loads a trained model from a run or from foreign files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from vlp_jax import interop
from vlp_jax.encoders.encoder import Encoder
from vlp_jax.encoders.foreign_texts import tokenizer_of_files
from vlp_jax.encoders.images import ImageProcessor
from vlp_jax.encoders.texts import TextProcessor, tokenizer_from
from vlp_jax.errors import UserError
from vlp_jax.interop.trees import Module, image_of, with_dtype
from vlp_jax.models.coca import CoCa
from vlp_jax.models.decoder import Captioner
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.objectives import objective_of
from vlp_jax.objectives.base import Function
from vlp_jax.objectives.compute import DTYPES
from vlp_jax.training.run import Run, bounded, resizing

# Models that can be loaded from a run. Of several in a composite, the first in this order becomes
# `Encoder.module`.
LOADED = (DualEncoder, CoCa, MaskedAutoencoder, Captioner)
RESIZING = ("resize", "interpolation", "scale", "crop_rounding")  # fields of `interop.Extras`


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
    extras, texts, notes = imported.extras, None, list(imported.notes)
    if "text" in module.towers():
        if tokenizer is not None:
            texts = TextProcessor(tokenizer_from(str(Path(tokenizer).expanduser()), module.text))
        else:
            made = tokenizer_of_files(
                extras.get("tokenizer"), module.text, extras.get("pad_id"), source, notes
            )
            texts = TextProcessor(made)
    elif tokenizer is not None:
        raise UserError(f"{source} is an image model: it takes no tokenizer")
    how = {name: extras[name] for name in RESIZING if name in extras}
    functions = functions_of(module, extras)
    return Encoder(
        source=source,
        module=module,
        weights=imported.params,
        functions=functions,
        images=ImageProcessor(image_of(module).image_size, **how),
        texts=texts,
        notes=tuple(notes),
    )


def functions_of(module: Module, given: Mapping[str, Any] | None = None) -> dict[str, Function]:
    """Returns the functions that a model's objective offers, by name.

    Args:
      given: fields of `vlp_jax.interop.Extras`.
    """
    known = {field.name for field in dataclasses.fields(interop.Extras)}
    extras = interop.Extras(**{key: x for key, x in (given or {}).items() if key in known})
    return objective_of(
        module,
        pixels=extras.pixels,
        mask_ratio=extras.mask_ratio,
        normalize_targets=extras.norm_pix_loss,
    ).functions()
