"""The format "safetensors" of vlp_jax: config.json and model.safetensors, for every model.

model.safetensors has an array for each path (`vlp_jax.interop.trees`), in float32, bfloat16 or int8
(`vlp_jax.interop.precision`). config.json has the module's class and fields, nested like the
modules, and the preprocessing of images and texts:

    {"format": "vlp_jax", "version": 1, "weights": "float32",
     "model": {"class": "DualEncoder", "image": {"class": "VisionTransformer", ...}, ...},
     "extras": {"resize": "squash", "interpolation": "bicubic", "eos_id": 1, ...}}

Fields that only change how a model is run are not written.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.interop import files, hf_tokenizer, precision
from vlp_jax.interop.base import Extras, Format, Imported, described
from vlp_jax.interop.hf_tokenizer import TokenizerFiles
from vlp_jax.interop.tables import mismatch_report, shapes_of
from vlp_jax.interop.trees import Module, Params, expected_shapes
from vlp_jax.models.coca import CoCa, CoCaDecoder, CoCaText
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder, MaskedDecoder
from vlp_jax.models.text import TextTransformer
from vlp_jax.models.values import (
    PLAIN_LAYERS,
    ComputeConfig,
    Pixels,
    TransformerConfig,
    keywords_of,
    make_tower,
)
from vlp_jax.models.vit import VisionTransformer

MODELS = (DualEncoder, CoCa, MaskedAutoencoder, VisionTransformer)
NAME, VERSION = "vlp_jax", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER_GIVES = ("input_ids",)

_CLASSES = {
    kind.__name__: kind for kind in (*MODELS, MaskedDecoder, TextTransformer, CoCaDecoder, CoCaText)
}
# Fields of `Extras` in config.json; the others are in the tokenizer's files and in its head.
_EXTRAS = {field.name for field in dataclasses.fields(Extras)} - {"tokenizer", "weights"}


def _read(path: Path, like: Module | None = None) -> Imported:
    del like
    directory = path if path.is_dir() else path.parent
    where = directory / CONFIG
    config = files.load_json(where)
    if config.get("format") != NAME:
        raise UserError(f"{where} is not of this format: it has format {config.get('format')!r}")
    if config.get("version") != VERSION:
        raise UserError(
            f"{where} has version {config.get('version')!r} of the format, and this vlp_jax reads "
            f"{VERSION}: write it again, or take the vlp_jax that wrote it"
        )
    module = _module(config.get("model"), where)
    weights = path if path.is_file() else directory / WEIGHTS
    params = precision.restored(files.load_tensors(weights))
    report = mismatch_report(expected_shapes(module), shapes_of(params))
    if report:
        raise UserError(f"{weights} does not fit its {CONFIG}: {report}")
    extras = config.get("extras") or {}
    for name in extras:
        if name not in _EXTRAS:
            raise UserError(unknown_key_message(name, _EXTRAS, f"{where}, extras"))
    extras = {name: _hashable(value) for name, value in extras.items()}
    tokenizer = TokenizerFiles.from_folder(directory)
    return Imported(module, params, [], extras | ({"tokenizer": tokenizer} if tokenizer else {}))


def _write(module: Module, params: Params, directory: Path, extras: Extras) -> list[Path]:
    settings = {name: x for name, x in vars(extras).items() if name in _EXTRAS and x is not None}
    config = {
        "format": NAME,
        "version": VERSION,
        "weights": extras.weights,
        "model": _fields(module),
        "extras": settings,
    }
    arrays = precision.stored(params, extras.weights)
    return [
        files.save_json(config, directory / CONFIG),
        files.save_safetensors(arrays, directory / WEIGHTS),
        *hf_tokenizer.write(extras.tokenizer, directory, TOKENIZER_GIVES),
    ]


def _fields(module: Any) -> dict[str, Any]:
    """Returns the class of a module and its fields; modules among them are nested."""
    fields = {"class": type(module).__name__}
    for name, value in described(module).items():
        # Older versions of vlp_jax refuse these keys; without them they assume the plain value.
        if name not in PLAIN_LAYERS or value != PLAIN_LAYERS[name]:
            fields[name] = _fields(value) if type(value).__name__ in _CLASSES else value
    return fields


def _constructor(kind: type) -> Callable[..., Any]:
    """Returns a function that makes a `kind` from the names of `described`, in its signature."""
    # A tower's layers are a value of its own, whose fields `described` lists among the tower's.
    if "transformer" in kind.__dataclass_fields__:

        @keywords_of(kind, TransformerConfig)
        def tower(*, quantization: str = "none", **fields: Any) -> Any:
            return make_tower(kind, ComputeConfig(quantization=quantization), **fields)

        return tower

    @keywords_of(kind, without=("pixels",))
    def whole(*, image_mean: tuple[float, ...], image_std: tuple[float, ...], **fields: Any) -> Any:
        return kind(pixels=Pixels(image_mean, image_std), **fields)

    return whole


def _module(fields: Any, where: Path) -> Any:
    """Makes the module that `_fields` has described; raises UserError if it cannot."""
    if not isinstance(fields, dict) or fields.get("class") not in _CLASSES:
        raise UserError(f"{where} describes no model of ours (known: {', '.join(_CLASSES)})")
    name = fields["class"]
    constructor = _constructor(_CLASSES[name])
    known = inspect.signature(constructor).parameters
    values = {}
    for key, value in fields.items():
        if key != "class":
            if key not in known:
                raise UserError(unknown_key_message(key, known, f"{where}, {name}"))
            values[key] = _module(value, where) if isinstance(value, dict) else _hashable(value)
    needed = [key for key, parameter in known.items() if parameter.default is parameter.empty]
    missing = [key for key in needed if key not in values]
    if missing:
        raise UserError(f"{where}: {name} needs {', '.join(missing)}")
    try:
        return constructor(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _hashable(value: Any) -> Any:
    """Undoes JSON, which turns tuples into lists: fields are compared and hashed as tuples."""
    return tuple(value) if isinstance(value, list) else value


FORMAT = Format(
    MODELS,
    'vlp_jax.interop.read("safetensors:{}")',
    precision.WEIGHTS,
    _read,
    lambda module, extras: [],
    _write,
)
