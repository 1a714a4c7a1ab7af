"""Weights that a run can start from, whatever wrote them: shapes first, numbers when asked for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.training import checkpoint
from vlp_jax.training.restore import SavedParameters, Shape
from vlp_jax.training.workdir import CONFIG, TOKENIZER

Grid = tuple[int, int]  # rows and columns of patches
Arrays = dict[str, np.ndarray]

# Prefixes of `config.init_from.source` that `vlp_jax.interop.read_weights` takes.
FORMATS = {
    "hf": "hf:DIR",
    "open_clip": "open_clip:FILE",
    "big_vision": "big_vision:FILE.npz",
    "timm": "timm:FILE",
}
PATCH_KERNEL, POSITIONS = "image/patch_embedding/projection/kernel", "image/position_embedding"


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that were looked at and not yet read.

    Attributes:
      title: what they are, for people.
      shapes: path -> shape.
      grids: path of a table of positions -> the grid of patches it is for, where that is known.
      notes: what else is worth knowing, a line each.
      tokenizer: file of the tokenizer that the weights go with; None where that is not known.
      take: path -> float32 array of them all, on the host. It is called once at most, as the source
        keeps nothing afterwards.
    """

    title: str
    shapes: dict[str, Shape]
    grids: dict[str, Grid]
    notes: Sequence[str]
    take: Callable[[], Arrays]
    tokenizer: epath.Path | None = None


def open_source(
    source: str, step: int | None, model: Any, where: str = "config.init_from"
) -> Source:
    """The weights that `config.init_from.source` names.

    Args:
      source: a workdir of ours, which may be gs://..., or one of `FORMATS`.
      step: of the checkpoint of a workdir; None for the newest.
      model: the Flax module that is to have them, which tells apart variants of a foreign format.
      where: what the section with the source is called in an error.

    Raises:
      UserError: there are none, or they cannot be read.
    """
    prefix, colon, rest = source.partition(":")
    if (
        not colon
        # gs://... is the path of a workdir, and not a format.
        or rest.startswith("//")
        or (prefix not in FORMATS and epath.Path(source).exists())
    ):
        return from_workdir(source, step, where)
    if prefix not in FORMATS:
        known = ", ".join(FORMATS.values())
        message = unknown_key_message(prefix, FORMATS, f"{where}.source")
        raise UserError(f"{message}; a source is a workdir or one of {known}")
    if step is not None:
        raise UserError(f"{where}.step is of a workdir's checkpoints, not of {source}")
    from vlp_jax.interop import read_weights

    return from_weights(source, read_weights(source, model))


def from_weights(title: str, weights: Any) -> Source:
    """Weights that `vlp_jax.interop.read_weights` has read."""
    arrays = dict(weights.params)

    def take() -> Arrays:
        taken = {path: np.asarray(array, np.float32) for path, array in arrays.items()}
        # The source keeps nothing: memory is free once the caller drops its arrays.
        arrays.clear()
        return taken

    shapes = {path: tuple(array.shape) for path, array in arrays.items()}
    return Source(title, shapes, dict(weights.grids), tuple(weights.notes), take)


def from_workdir(source: str, step: int | None, where: str = "config.init_from") -> Source:
    """The averaged parameters of a run's checkpoint, or its parameters if it has no average.

    Only these are read, and onto the host, whatever mesh the run had.

    Raises:
      UserError: no such folder, or no such checkpoint in it.
    """
    workdir = checkpoint.absolute(source)
    if not workdir.exists():
        raise UserError(
            f"{where}.source: the folder {source} does not exist; give a workdir or one "
            f"of {', '.join(FORMATS.values())}"
        )
    step = checkpoint.choose_step(workdir, step, where)
    saved = SavedParameters.of(workdir, step)
    return Source(
        title=f"{source}, {saved.part} of step {step:,}",
        shapes=saved.shapes,
        grids=_grids(workdir, saved.shapes),
        notes=(),
        take=saved.read,
        tokenizer=workdir / TOKENIZER if (workdir / TOKENIZER).exists() else None,
    )


def relocated(source: Source, take: str, into: str) -> Source:
    """The weights of a source whose paths begin with `take`, which is `into` here; "" is all.

    Raises:
      UserError: it has none.
    """
    if not take and not into:
        return source

    def moved(tree: Mapping[str, Any]) -> dict[str, Any]:
        old, new = (f"{prefix}/" if prefix else "" for prefix in (take, into))
        return {
            new + path.removeprefix(old): value
            for path, value in tree.items()
            if path.startswith(old)
        }

    shapes = moved(source.shapes)
    if not shapes:
        there = ", ".join(sorted({path.partition("/")[0] for path in source.shapes}))
        raise UserError(f"{source.title} has no parameters under {take!r} (there are: {there})")
    return dataclasses.replace(
        source,
        title=f"{source.title}, {take or 'all'} into {into or 'all'}",
        shapes=shapes,
        grids=moved(source.grids),
        take=lambda: moved(source.take()),
    )


def _grids(workdir: epath.Path, shapes: Mapping[str, Shape]) -> dict[str, Grid]:
    """The grid of a run's images, if its config says how large they are."""
    file = workdir / CONFIG
    section = json.loads(file.read_bytes())["objective"] if file.exists() else {}
    size = section.get("image", {}).get("image_size")
    if size is None or PATCH_KERNEL not in shapes or POSITIONS not in shapes:
        return {}
    return {POSITIONS: patch_grid(size, shapes[PATCH_KERNEL])}


def patch_grid(image_size: int | Sequence[int], kernel: Shape) -> Grid:
    """Rows and columns of patches, whose projection has the shape `[patch, patch, ...]`."""
    height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
    return height // kernel[0], width // kernel[1]


def square_grid(patches: int) -> Grid | None:
    """The square grid of so many patches, None if the number is no square."""
    side = math.isqrt(max(patches, 0))
    return (side, side) if side and side * side == patches else None
