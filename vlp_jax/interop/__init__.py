"""Reads and writes the weights of other projects: a table for each format, for both directions.

    imported = interop.read("hf_clip:path/to/folder")
    tree = interop.to_tree(imported.module, imported.params)
    embedding = imported.module.apply({"params": tree}, images, method="embed_image")
    interop.write("open_clip", module, params, "path/to/new/folder")

Parameters are a flat dict, path -> float32 array, with the layers of an encoder stacked (see
`vlp_jax.interop.trees`). `from_tree` converts a module's nested tree to it, and `to_tree` back.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.interop import big_vision, hf, native, open_clip, timm
from vlp_jax.interop.base import Extras, Format, Imported, differences
from vlp_jax.interop.precision import rounded
from vlp_jax.interop.trees import Module, Params, check_params
from vlp_jax.interop.trees import from_tree as from_tree
from vlp_jax.interop.trees import to_tree as to_tree

FORMATS: dict[str, Format] = {
    "big_vision": big_vision.FORMAT,
    "hf": hf.FORMAT,
    **{f"hf_{model_type}": format for model_type, format in hf.BY_MODEL_TYPE.items()},
    "open_clip": open_clip.FORMAT,
    "safetensors": native.FORMAT,
    "timm": timm.FORMAT,
}


def read(spec: str, like: Module | None = None) -> Imported:
    """Reads a model.

    Args:
      spec: "FORMAT:PATH", a name in `FORMATS` and a file or a directory.
      like: a model that supplies settings the files lack, such as the number of heads.

    Raises:
      UserError: the format is unknown; the files are missing, damaged, pickled or of another kind;
        the model cannot be expressed here, or its settings are unknown.
    """
    name, colon, path = spec.partition(":")
    if not colon or not path:
        raise UserError(f"weights are named FORMAT:PATH, such as hf_clip:models/clip, not {spec!r}")
    # A shell leaves a ~ after the colon as it is.
    return format_named(name).read(Path(path).expanduser(), like)


def read_weights(spec: str, like: Module) -> Imported:
    """Reads a model to start `like` from, which may have other sizes; see `read`.

    The notes also have a line for each difference that changes outputs.
    """
    imported = read(spec, like)
    notes = imported.notes + differences(imported.module, like)
    return dataclasses.replace(imported, notes=notes)


def write(
    format: str, module: Module, params: Params, directory: str | Path, **extras: Any
) -> list[Path]:
    """Writes a model with its config, so that the format's library can load it.

    Args:
      format: a name in `FORMATS`.
      module, params: a model and all its parameters, which are rounded to `weights`.
      directory: the output folder, created if needed.
      extras: fields of `Extras`, for settings of the config that the module does not hold.

    Returns:
      The files that were written.

    Raises:
      UserError: unknown format or extra, parameters that do not fit the module, or a module that
        the format cannot express. Then one line lists all reasons, and nothing is written.
    """
    known = {field.name for field in dataclasses.fields(Extras)}
    for key in extras:
        if key not in known:
            raise UserError(unknown_key_message(key, known, "the export's settings"))
    given, chosen = Extras(**extras), format_named(format)
    if isinstance(module, chosen.kinds):
        problems = chosen.check(module, given)
    else:
        held = " or ".join(kind.IS for kind in chosen.kinds)
        problems = [f"it holds {held}, not a {type(module).__name__}"]
    if given.weights not in chosen.holds:
        able = [name for name, known in FORMATS.items() if given.weights in known.holds]
        problems.append(
            f"{format} has no place for weights in {given.weights} (it takes "
            f"{' or '.join(chosen.holds)}; {', '.join(able)} and stablehlo take {given.weights})"
        )
    if problems:
        raise UserError(f"this model cannot be written as {format}: {'; '.join(problems)}")
    check_params(module, params)
    return chosen.write(module, rounded(params, given.weights), Path(directory), given)


def format_named(name: str) -> Format:
    """Returns the format called `name`; raises UserError if there is none."""
    if name not in FORMATS:
        raise UserError(unknown_key_message(name, FORMATS, "the formats of weights"))
    return FORMATS[name]
