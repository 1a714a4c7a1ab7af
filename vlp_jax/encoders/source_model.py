"""The model of `config.init_from.source` as sections of a config, for `config.init_from.model`.

What a config says itself stays: a resolution, a pooling, another objective. The rest is as the
weights had it: form and sizes of the model, pixels, tokenizer, and how images and texts come to it.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax import image_size, interop
from vlp_jax.data.tokenizers import build_tokenizer
from vlp_jax.data.wording import Wording
from vlp_jax.encoders.encoder import is_foreign
from vlp_jax.encoders.foreign_texts import tokenizer_of_files
from vlp_jax.errors import UserError
from vlp_jax.interop.trees import Module, image_of
from vlp_jax.models.coca import CoCa, make_coca_decoder, make_coca_text
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder, make_masked_decoder
from vlp_jax.models.text import TextTransformer, make_text
from vlp_jax.models.values import tower_fields
from vlp_jax.models.vit import make_vit
from vlp_jax.objectives import OBJECTIVES
from vlp_jax.training.run import Run, resizing
from vlp_jax.training.workdir import CONFIG, TOKENIZER

# Texts whose ids tell tokenizers apart: capitals, signs, white space, and more than any context.
PROBES = ("a photo of a Cat.", "Two  dogs; a caf\u00e9 & 3 birds!", "one more word " * 200)
# Operations that a tokenizer of others may do itself and ours leave to `preprocess`. The cleaning
# is open_clip's before a tokenizer of transformers.
WORDINGS: tuple[dict[str, dict[str, Any]], ...] = tuple(
    cleaned | canonical | lower
    for cleaned in ({}, {"clean_text": {"strip_control": False}})
    for canonical in ({}, {"canonicalize_text": {}})
    for lower in ({}, {"lowercase": {}})
)
# The fields of a text tower that its tokenizer gives.
OF_TOKENIZER = ("vocab_size", "context_length", "bos_id", "eos_id", "pad_id")
# Our names of the kernels that Pillow and transformers call otherwise.
METHODS = {"bicubic": "bicubic", "bilinear": "bilinear", "lanczos": "lanczos3"}


class SourceModel(NamedTuple):
    """A model as sections of a config.

    Attributes:
      objective: `config.objective`; without a name if a model has no objective of its own.
      tokenizer: `config.tokenizer`; {} if the model takes no texts.
      operations: what makes the texts and pixels of the model, for `preprocess`.
      notes: what is not taken over, a line each.
    """

    objective: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    operations: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]


def completed(
    config: ConfigDict, workdir: epath.Path | None = None
) -> tuple[ConfigDict, tuple[str, ...]]:
    """`config` with the model of its source if `config.init_from.model` is set, and notes.

    A run that has begun in `workdir` has the model in its own config: its source may be gone.

    Raises:
      UserError: there is no source, or it does not say all of a model.
    """
    if not config.init_from.model:
        return config, ()
    source = config.init_from.source
    if source is None:
        raise UserError(
            "config.init_from.model takes the model of config.init_from.source, which is not set: "
            "give a workdir, hf:DIR, open_clip:FILE, big_vision:FILE.npz or timm:FILE"
        )
    if workdir is not None and (workdir / CONFIG).exists():
        found = _of_run(workdir, begun=True)
    else:
        has_own = bool(config.tokenizer.get("name"))
        found = _of_files(source, has_own) if is_foreign(source) else _of_run(source)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.objective = _objective(found, config)
        if not config.tokenizer.get("name"):
            config.tokenizer = ConfigDict(_merged(found.tokenizer, config.tokenizer))
        sections = [config.data, *config.extra_data.values()]
        for evaluator in config.evaluators.values():
            sections += [evaluator[key] for key in ("data", "train_data") if key in evaluator]
        for section in sections:
            # A list of operations runs as it is written.
            if isinstance(section.get("preprocess"), ConfigDict):
                _add_operations(section, found.operations)
    config_lib.complete(config)
    return config.lock(), found.notes


def _objective(found: SourceModel, config: ConfigDict) -> ConfigDict:
    given, taken = config.objective, dict(found.objective)
    name = given.get("name") or taken.get("name")
    if name is None:
        raise UserError(
            f"{config.init_from.source} is an image tower, which has no objective of its own: set "
            "config.objective.name, such as classification with config.objective.classes"
        )
    if name != taken.get("name") and name in OBJECTIVES:
        known = inspect.signature(OBJECTIVES[name]).parameters
        taken = {key: value for key, value in taken.items() if key in known}
    if config.image_size is not None and "image" in taken:
        taken["image"] = {k: v for k, v in taken["image"].items() if k != "image_size"}
    return ConfigDict(_merged(taken, {**given, "name": name}))


def _merged(taken: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`taken`, with what `given` has in its place."""
    made = dict(taken.items())
    for key, value in given.items():
        if hasattr(value, "items") and hasattr(made.get(key), "items"):
            made[key] = _merged(made[key], value)
        elif not (hasattr(value, "items") and not value):  # an empty section gives nothing
            made[key] = value
    return made


def _add_operations(data: ConfigDict, operations: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds those operations that `data` does not do in its own way."""
    own = set(data.preprocess)
    for name, arguments in operations.items():
        if name in image_size.SIZED:
            needed = "decode_image" in own and not own & set(image_size.SIZED)
        else:
            needed = "choose_text" in own and name not in own
        if needed:
            data.preprocess[name] = dict(arguments)


def _of_run(workdir: str | epath.Path, begun: bool = False) -> SourceModel:
    """The model of a run. One that has begun keeps the tokenizer of its config."""
    run = Run.open(workdir)
    config, notes = run.config, []
    tokenizer = config.tokenizer.to_dict()
    if tokenizer and not begun and tokenizer.get("name") != "bytes":
        tokenizer["file"] = str(run.workdir / TOKENIZER)
    wording, more = run.wording if tokenizer else (Wording(), ())
    operations = dict(wording.operations) | _resized(resizing(config, notes), notes)
    return SourceModel(config.objective.to_dict(), tokenizer, operations, (*more, *notes))


def _of_files(source: str, has_tokenizer: bool) -> SourceModel:
    """The model in files of others; their tokenizer is not looked at if the config has one."""
    imported = interop.read(source)
    module, extras, notes = imported.module, interop.Extras(**imported.extras), []
    tokenizer, texts = {}, {}
    if "text" in module.towers() and not has_tokenizer:
        theirs = tokenizer_of_files(extras.tokenizer, module.text, extras.pad_id, source, notes)
        folder = Path(source.partition(":")[2]).expanduser()
        folder = folder if folder.is_dir() else folder.parent
        tokenizer, texts = _tokenizer(theirs, module.text, folder, source)
    operations = texts | _resized(imported.extras, notes)
    return SourceModel(_section(module, extras), tokenizer, operations, tuple(notes))


def _resized(how: Mapping[str, Any], notes: list[str]) -> dict[str, dict[str, Any]]:
    """The operation that brings pixels to the model's size as `interop.Extras` says."""
    name = "resize_shortest_and_center_crop" if how.get("resize") == "crop" else "resize"
    method = METHODS.get(how.get("interpolation", "bicubic"))
    if method is None:
        notes.append(f"its images are resized by {how['interpolation']!r}, here by 'bicubic'")
    if how.get("scale") is not None:
        notes.append(f"its images are scaled to {how['scale']} and then cut, here to their size")
    return {name: {"method": method or "bicubic"}}


def _tokenizer(
    theirs: Any, text: TextTransformer, folder: Path, source: str
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """`config.tokenizer` with the ids of a foreign tokenizer, and the operations that it needs.

    Raises UserError if none of ours gives the same ids.
    """
    wanted = theirs(PROBES)
    files = (
        *(("subword", "tokenizer.json"), ("sentencepiece", "spiece.model")),
        *(("clip", "merges.txt"), ("clip", None)),
    )
    there = [(name, file) for name, file in files if file is None or (folder / file).is_file()]
    for (name, file), pad in itertools.product(there, (None, "eos")):
        path = None if file is None else str(folder / file)
        section = {"name": name, "file": path, "pad": pad, "vocab_size": None}
        section["context_length"] = text.context_length
        try:
            ours = build_tokenizer(section, lambda: (), None)
        except UserError:  # a file of another kind; the error below names the folder
            continue
        ends_elsewhere = text.pooling == "eos" and text.eos_id != ours.eos_id
        if ours.vocab_size != text.vocab_size or ends_elsewhere:
            continue
        for operations in WORDINGS:
            worded = Wording(tuple(operations.items()))(PROBES)
            if np.array_equal(ours(worded), wanted):
                return section, operations
    raise UserError(
        f"{source}: none of the tokenizers here gives the ids of its {text.vocab_size:,} tokens: "
        "set config.tokenizer (name, file, context_length)"
    )


def _section(module: Module, extras: interop.Extras) -> dict[str, Any]:
    """`config.objective` of a module; without a name for an image tower alone."""
    pixels = extras.pixels_of(module)
    section = {
        "image": _tower(make_vit, image_of(module)),
        "image_mean": tuple(pixels.mean),
        "image_std": tuple(pixels.std),
    }
    if isinstance(module, MaskedAutoencoder):
        return section | {
            "name": "masked_autoencoding",
            "decoder": _tower(make_masked_decoder, module.decoder),
            "mask_ratio": extras.mask_ratio,
            "normalize_targets": extras.norm_pix_loss,
        }
    if not isinstance(module, DualEncoder | CoCa):
        return section
    section |= {
        "embed_dim": module.embed_dim,
        "logit_scale_init": math.exp(module.logit_scale_init),
    }
    if isinstance(module, CoCa):
        return section | {
            "name": "coca",
            "text": _tower(make_coca_text, module.text),
            "decoder": _tower(make_coca_decoder, module.decoder),
            "queries": module.queries,
            "pooler_heads": module.pooler_heads,
        }
    return section | {
        "name": "contrastive",
        "loss": "softmax" if module.logit_bias_init is None else "sigmoid",
        "logit_bias_init": module.logit_bias_init,
        "text": _tower(make_text, module.text),
        "image_head": module.image_head,
        "text_head": module.text_head,
    }


def _tower(maker: Callable[..., Any], tower: nn.Module) -> dict[str, Any]:
    """The section from which `maker` makes a tower."""
    fields = tower_fields(tower)
    if "image_size" in fields and len(set(fields["image_size"])) == 1:
        fields["image_size"] = fields["image_size"][0]
    known = inspect.signature(maker).parameters.keys() - {*OF_TOKENIZER}
    return {name: x for name, x in fields.items() if name in known and x is not None}
