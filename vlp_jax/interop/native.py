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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.interop import files, hf_tokenizer, precision
from vlp_jax.interop.base import Extras, Imported, described
from vlp_jax.interop.hf_tokenizer import TokenizerFiles
from vlp_jax.interop.tables import mismatch_report
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

KINDS = (DualEncoder, CoCa, MaskedAutoencoder, VisionTransformer)
LOADED_BY = 'vlp_jax.interop.read("safetensors:{}")'
HOLDS = precision.WEIGHTS
FORMAT, VERSION = "vlp_jax", 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER_GIVES = ("input_ids",)

_CLASSES = {
    kind.__name__: kind
    for kind in (
        *(DualEncoder, MaskedAutoencoder, MaskedDecoder, TextTransformer, VisionTransformer),
        *(CoCa, CoCaDecoder, CoCaText),
    )
}
# Fields of `Extras` that are stored elsewhere: in the tokenizer's files, in config.json's head.
_NOT_IN_EXTRAS = {"tokenizer", "weights"}


def read(path: Path, like: Module | None = None) -> Imported:
    """Reads a folder.

    Raises:
      UserError: the files are missing, damaged, of another format or version, or do not fit each
        other.
    """
    del like
    directory = path if path.is_dir() else path.parent
    where = directory / CONFIG
    config = files.load_json(where)
    if config.get("format") != FORMAT:
        raise UserError(f"{where} is not of this format: it has format {config.get('format')!r}")
    if config.get("version") != VERSION:
        raise UserError(
            f"{where} has version {config.get('version')!r} of the format, and this vlp_jax reads "
            f"{VERSION}: write it again, or take the vlp_jax that wrote it"
        )
    module = _module(config.get("model"), where)
    weights = path if path.is_file() else directory / WEIGHTS
    params = precision.restored(files.load_tensors(weights))
    report = mismatch_report(
        expected_shapes(module), {key: tuple(x.shape) for key, x in params.items()}
    )
    if report:
        raise UserError(f"{weights} does not fit its {CONFIG}: {report}")
    extras = _extras(config.get("extras"), where)
    tokenizer = TokenizerFiles.from_folder(directory)
    return Imported(
        module, params, [], extras if tokenizer is None else extras | {"tokenizer": tokenizer}
    )


def check(module: Module, extras: Extras) -> list[str]:
    """Returns []: the format can express every model."""
    del module, extras
    return []


def write(module: Module, params: Params, directory: Path, extras: Extras) -> list[Path]:
    """Writes a folder."""
    config = {
        "format": FORMAT,
        "version": VERSION,
        "weights": extras.weights,
        "model": _fields(module),
        "extras": {
            field.name: getattr(extras, field.name)
            for field in dataclasses.fields(extras)
            if field.name not in _NOT_IN_EXTRAS and getattr(extras, field.name) is not None
        },
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
    """Makes the module that `_fields` has described.

    Raises:
      UserError: an unknown class or field, or a missing field.
    """
    if not isinstance(fields, dict) or fields.get("class") not in _CLASSES:
        raise UserError(f"{where} describes no model of ours (known: {', '.join(_CLASSES)})")
    constructor = _constructor(_CLASSES[fields["class"]])
    known = inspect.signature(constructor).parameters
    values = {}
    for name, value in fields.items():
        if name == "class":
            continue
        if name not in known:
            raise UserError(unknown_key_message(name, known, f"{where}, {fields['class']}"))
        if isinstance(value, dict):
            value = _module(value, where)
        # JSON turns tuples into lists, but the fields of modules are compared and hashed as tuples.
        values[name] = tuple(value) if isinstance(value, list) else value
    missing = [
        name
        for name, parameter in known.items()
        if parameter.default is inspect.Parameter.empty and name not in values
    ]
    if missing:
        raise UserError(f"{where}: {fields['class']} needs {', '.join(missing)}")
    try:
        return constructor(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _extras(section: Any, where: Path) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(Extras)} - _NOT_IN_EXTRAS
    extras = {}
    for name, value in (section or {}).items() if isinstance(section, Mapping | None) else ():
        if name not in known:
            raise UserError(unknown_key_message(name, known, f"{where}, extras"))
        extras[name] = tuple(value) if isinstance(value, list) else value
    return extras
