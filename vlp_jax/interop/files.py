"""Reads and writes files of weights: safetensors (whole or in shards) and .npz, never pickles.

A pickle is a program: loading it runs any code that its author put there. Pickles are recognized by
their content, not by their name, and refused before anything is loaded.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from vlp_jax.errors import UserError
from vlp_jax.files import read_text, write_whole
from vlp_jax.interop import precision

Tensors = dict[str, np.ndarray]

_ZIP_MAGIC = b"PK\x03\x04"
# What the libraries raise for a damaged file.
_DAMAGE = (
    *(safetensors.SafetensorError, OSError),
    *(zipfile.BadZipFile, zlib.error, EOFError, ValueError),
)
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def find_weights(path: Path, names: Sequence[str]) -> Path:
    """Finds the file of weights at `path`: a file, or in a folder the first of `names` that exists.

    Without any of them it is the only file with such a suffix. Raises UserError if there is none,
    if there are several, or only pickles.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    for name in names:
        if (path / name).is_file():
            return path / name
    # An index of shards ends in .json, and so do configs, which hold no weights.
    suffixes = {Path(name).suffix for name in names} - {".json"}
    candidates = sorted(file for file in path.iterdir() if file.suffix in suffixes)
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        files = ", ".join(file.name for file in candidates)
        raise UserError(f"{path} holds several files of weights ({files}): name one of them")
    for file in sorted(path.iterdir()):
        if file.suffix in _PICKLE_SUFFIXES:
            raise _pickle_error(file)
    raise UserError(f"{path} holds no weights (looked for {', '.join(names)})")


def load_tensors(path: Path) -> Tensors:
    """Loads all arrays of a file. Floating-point arrays become float32; integers stay as they are.

    Args:
      path: a .safetensors, a .safetensors.index.json that names its shards, or an .npz.

    Raises:
      UserError: the file does not exist, is a pickle, truncated, corrupt or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.name.endswith(".index.json"):
        return _load_shards(path)
    with path.open("rb") as file:
        head = file.read(16)
    load = None
    if head[8:9] == b"{":  # eight bytes of length, then a header in JSON
        load = _load_safetensors
    elif head.startswith(_ZIP_MAGIC):
        load = _load_npz
    if load is not None:
        try:
            return {key: _as_float32(x) for key, x in load(path).items()}
        except _DAMAGE as error:
            raise UserError(
                f"{path} is truncated or corrupt ({error}); fetch or write it again"
            ) from None
    if head[:1] == b"\x80" or path.suffix in _PICKLE_SUFFIXES:  # 0x80 is pickle's PROTO opcode
        raise _pickle_error(path)
    raise UserError(
        f"{path} is neither a safetensors file nor an .npz, or it is damaged: "
        f"its {path.stat().st_size} bytes begin with {head!r}"
    )


def save_safetensors(tensors: Tensors, path: Path, narrow: bool = False) -> Path:
    """Writes arrays atomically, `narrow` by `precision.narrowed`, for PyTorch; returns `path`."""
    tensors = precision.narrowed(tensors) if narrow else tensors
    # The library writes an array's memory without its strides, so a transposed view would be wrong.
    whole = {key: np.array(x, order="C", copy=None) for key, x in tensors.items()}
    return save_bytes(safetensors.numpy.save(whole, metadata={"format": "pt"}), path)


def save_npz(tensors: Tensors, path: Path) -> Path:
    """Writes arrays atomically to an .npz; returns `path`."""
    content = io.BytesIO()
    np.savez(content, **tensors)
    return save_bytes(content.getvalue(), path)


def load_json(path: Path) -> dict[str, Any]:
    """Loads the object in a JSON file; raises UserError if it is missing or holds another kind."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def load_json_if_there(path: Path) -> dict[str, Any]:
    """Loads the object in a JSON file; {} if the file does not exist."""
    return load_json(path) if path.is_file() else {}


def save_bytes(content: bytes, path: Path) -> Path:
    """Writes a file atomically; returns `path`."""
    write_whole(path, content)
    return path


def save_json(content: dict[str, Any], path: Path) -> Path:
    """Writes a JSON file atomically; returns `path`."""
    return save_bytes((json.dumps(content, indent=2) + "\n").encode(), path)


def _load_safetensors(path: Path) -> Tensors:
    with safetensors.safe_open(path, "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _load_shards(index: Path) -> Tensors:
    names = load_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} has no weight_map from keys to files")
    shards = {name: load_tensors(index.parent / name) for name in sorted(set(names.values()))}
    for key, name in names.items():
        if key not in shards[name]:
            raise UserError(f"{index} says that {key} is in {name}, but it is not")
    return {key: shards[name][key] for key, name in names.items()}


def _load_npz(path: Path) -> Tensors:
    # torch.save writes a zip archive too, with a pickle among its members.
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith(".pkl") for name in archive.namelist()):
            raise _pickle_error(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except ValueError as error:
        # NumPy raises ValueError for damage and for object arrays; only the text tells them apart.
        if "allow_pickle" not in str(error):
            raise
        raise UserError(
            f"{path} holds Python objects, which are pickled and could run any code: write it "
            f"again with np.savez of plain arrays"
        ) from None


def _as_float32(x: np.ndarray) -> np.ndarray:
    if x.dtype.kind == "V" and x.dtype.itemsize == 2:
        x = x.view(jnp.bfloat16)  # NumPy reads bfloat16 as a raw type of two bytes
    return x.astype(np.float32, copy=False) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _pickle_error(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which could run any code when it is loaded: convert it once, where "
        f"PyTorch is installed, with safetensors.torch.save_file(torch.load({path.name!r}, "
        f"weights_only=True), 'model.safetensors'), and read that"
    )
