"""Weights to start from, and the rules that decide on shapes alone what comes from them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.training import checkpoint, param_groups
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
WHERE = "config.init_from"
RULES = f"{WHERE}.rules"
ACTIONS = ("load", "fresh", "skip")
MAX_LISTED = 4  # parameters that an error names
Rules = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Fate:
    """The origin of one parameter in the new state.

    Attributes:
      kind: "loaded", "resampled" (positions, for another grid of patches), "fresh", or "skipped":
        a parameter of the source that the model has not.
      shape: shape in the model, or in the source for a skipped parameter.
      grids: old and new grid of a resampled parameter.
    """

    path: str
    shape: Shape
    kind: str
    grids: tuple[Grid, Grid] | None = None

    def __str__(self) -> str:
        if not self.grids:
            return self.kind
        old, new = (f"{rows}x{columns}" for rows, columns in self.grids)
        return f"{self.kind} {old} -> {new}"


def check_rules(rules: Rules, where: str = RULES) -> None:
    """Raises UserError for a rule that is not a pair of a regular expression and an action."""
    for rule in rules:
        if isinstance(rule, str) or len(rule) != 2:
            raise UserError(f"{where}: {rule!r} is no pair such as ('image/.*', 'load')")
        if rule[1] not in ACTIONS:
            raise UserError(unknown_key_message(str(rule[1]), ACTIONS, f"{where}, {rule!r}"))
    param_groups.check_patterns([pattern for pattern, _ in rules], where)


def adapting_rules(model: Mapping[str, Shape], source: Mapping[str, Shape]) -> Rules:
    """Rules by which a parameter that the model or the source alone has is no problem."""
    fresh = [(re.escape(path), "fresh") for path in sorted(model.keys() - source.keys())]
    return (*fresh, *((re.escape(path), "skip") for path in sorted(source.keys() - model.keys())))


def match(
    model: Mapping[str, Shape],
    source: Source,
    rules: Rules,
    grid: Grid | None = None,
    where: str = WHERE,
) -> tuple[Fate, ...]:
    """Decides the origin of every parameter of the model, and the use of each of the source.

    The first rule whose regular expression is the whole path decides: "load" takes the parameter
    from the source, "fresh" and "skip" leave it as the seed makes it, and leave out one that the
    source alone has. Tables of positions of images are resampled where the grid of patches is
    another; all else must have the model's shape.

    Args:
      model: path -> shape.
      grid: of the model's patches; None if it has no images.
      where: the key of the source, for errors.

    Raises:
      UserError: parameters that cannot be loaded or would be lost, each with both shapes; a rule
        that is of no parameter; a parameter without a rule.
    """
    paths = sorted({*model, *source.shapes})
    _check_rules_fit(rules, paths, f"{where}.rules")
    results = []
    for path in paths:
        rule = next((rule for rule in rules if re.fullmatch(rule[0], path)), None)
        results.append(_decide(path, rule, model.get(path), source, grid))
    problems = [result for result in results if isinstance(result, Problem)]
    fates = [result for result in results if isinstance(result, Fate)]
    if problems:
        raise UserError(_complaint(problems, source, paths, where))
    if not any(is_taken(fate) for fate in fates):
        raise UserError(
            f"{where}.rules load nothing from {source.title}; set {where}.source to None, or add a "
            "rule with 'load'"
        )
    return tuple(fates)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A parameter for which the rules cannot hold: its shape on either side, a key of `ADVICE`."""

    path: str
    model: Shape | None
    source: Shape | None
    kind: str

    def __str__(self) -> str:
        there, here = ("absent" if x is None else x for x in (self.source, self.model))
        return f"{self.path} is {there} in the source and {here} in the model"


# What mends a problem, by its kind.
ADVICE = {
    "no rule": "end {rules} with ('.*', 'load')",
    "absent": "to initialize it, begin {rules} with ({path!r}, 'fresh')",
    "shape": "to initialize it, begin {rules} with ({path!r}, 'fresh')",
    "text": "positions of texts are not resampled: set config.tokenizer.context_length to "
    "{source[0]}, or begin {rules} with ({path!r}, 'fresh')",
    "grid": "positions are resampled where both sides have the same tokens besides the patches (a "
    "class token): make them so, or begin {rules} with ({path!r}, 'fresh')",
    "extra": "to do without it, begin {rules} with ({path!r}, 'skip')",
}


def _decide(
    path: str, rule: tuple[str, str] | None, shape: Shape | None, source: Source, grid: Grid | None
) -> Fate | Problem:
    other = source.shapes.get(path)
    if rule is None:
        return Problem(path, shape, other, "no rule")
    if rule[1] != "load":
        return Fate(path, other, "skipped") if shape is None else Fate(path, shape, "fresh")
    if other is None or shape is None:
        return Problem(path, shape, other, "absent" if other is None else "extra")
    if path == POSITIONS and grid and shape[1:] == other[1:]:
        return _decide_positions(shape, other, source.grids.get(path), grid)
    if shape == other:
        return Fate(path, shape, "loaded")
    # Such a table differs in the number of tokens alone; the advice names that key of the config.
    text = path.startswith("text/") and path.endswith("/position_embedding")
    return Problem(path, shape, other, "text" if text and shape[1:] == other[1:] else "shape")


def _decide_positions(shape: Shape, other: Shape, old: Grid | None, new: Grid) -> Fate | Problem:
    """The fate of the image positions. An old grid that is not known is the same, or a square."""
    # Rows for tokens that are no patches, such as a class token.
    prefix = shape[0] - math.prod(new)
    old = old or (new if shape == other else square_grid(other[0] - prefix))
    if old is None or other[0] - math.prod(old) != prefix:
        return Problem(POSITIONS, shape, other, "grid")
    if tuple(old) == tuple(new):
        return Fate(POSITIONS, shape, "loaded")
    return Fate(POSITIONS, shape, "resampled", (old, new))


def _complaint(
    problems: Sequence[Problem], source: Source, paths: Sequence[str], where: str
) -> str:
    """One line: the parameters that do not fit, and for each kind what mends it."""
    rows = ", ".join(str(problem) for problem in problems[:MAX_LISTED])
    if len(problems) > MAX_LISTED:
        rows = f"{len(problems)} of {len(paths)} parameters, such as {problems[0]}"
    # Reversed, so that the first problem of each kind is the one that remains.
    first = {problem.kind: problem for problem in reversed(problems)}
    advice = [
        text.format(
            source=first[kind].source, path=_pattern(kind, problems, paths), rules=f"{where}.rules"
        )
        for kind, text in ADVICE.items()
        if kind in first
    ]
    return f"{where}: {source.title}: the weights do not fit the model: {rows}; " + "; ".join(
        advice
    )


def _pattern(kind: str, problems: Sequence[Problem], paths: Sequence[str]) -> str:
    """A regular expression of the problems of a kind and of no other path; of a few if many."""
    bad = [problem.path for problem in problems if problem.kind == kind]
    folder = os.path.commonprefix(bad).rpartition("/")[0]
    if len(bad) > 1 and {path for path in paths if path.startswith(f"{folder}/")} == {*bad}:
        return f"{folder}/.*"
    # An alternative of a few paths: a pattern for a whole folder would catch parameters that fit.
    return "|".join(bad[:MAX_LISTED])


def _check_rules_fit(rules: Rules, paths: Sequence[str], where: str) -> None:
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise UserError(
                f"{where}: {pattern!r} is the whole path of no parameter of the model or the "
                f"source, such as {max(paths, key=len)!r} (layers are stacked here); at the top "
                f"there are {', '.join(sorted({path.partition('/')[0] for path in paths}))}"
            )


def is_taken(fate: Fate) -> bool:
    """Whether a parameter comes from the source."""
    return fate.kind in ("loaded", "resampled")


# Weights, whatever wrote them: shapes first, numbers when asked for.


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that were looked at and not yet read.

    Attributes:
      title: what they are, for people.
      shapes: path -> shape.
      grids: path of a table of positions -> the grid of patches it is for, where that is known.
      notes: what else is worth knowing, a line each.
      tokenizer: file of the tokenizer that the weights go with; None where that is not known.
      take: path -> float32 array of them all, on the host; called once, as nothing is kept.
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
      where: the section's key, for errors.

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

    weights = read_weights(source, model)
    arrays = dict(weights.params)

    def take() -> Arrays:
        taken = {path: np.asarray(array, np.float32) for path, array in arrays.items()}
        # The source keeps nothing: memory is free once the caller drops its arrays.
        arrays.clear()
        return taken

    shapes = {path: tuple(array.shape) for path, array in arrays.items()}
    return Source(source, shapes, dict(weights.grids), tuple(weights.notes), take)


def from_workdir(source: str, step: int | None, where: str = "config.init_from") -> Source:
    """Looks up the average of a run's checkpoint, or its parameters; UserError if there is none."""
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
    """The weights of a source whose paths begin with `take`, which is `into` here; "" is all."""
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
