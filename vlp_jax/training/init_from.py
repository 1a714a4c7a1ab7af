"""The start of a run from other weights: which parameter comes from where, and the first state."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from vlp_jax.data.tokenizers import Tokenizer
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.files import write_whole
from vlp_jax.training import checkpoint, param_groups
from vlp_jax.training.layer_layout import Shape, stack_layers, stacked_name
from vlp_jax.training.setup import Setup
from vlp_jax.training.state import TrainState
from vlp_jax.training.weights import (
    PATCH_KERNEL,
    POSITIONS,
    Arrays,
    Grid,
    Source,
    open_source,
    patch_grid,
    square_grid,
)

REPORT = "init_from.txt"
RULES = "config.init_from.rules"
ACTIONS = ("load", "fresh", "skip")
MAX_LISTED = 8  # parameters that an error names
Rules = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Fate:
    """What becomes of one parameter, its layers stacked.

    Attributes:
      kind: "loaded", "resampled" (positions, for another grid of patches), "fresh", or "skipped":
        a parameter of the source that the model has not.
      shape: in the model; that of the source if it is skipped.
      grids: old and new grid, of one that is resampled.
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


class Start(Protocol):
    """Where the state before step 0 comes from."""

    def state(self, setup: Setup) -> TrainState:
        """That state, laid out as the setup says."""

    def announce(self, workdir: epath.Path, tell: Callable[[str], None]) -> None:
        """Tells what was loaded, and writes it to the workdir."""


@dataclasses.dataclass(frozen=True)
class FromSeed:
    """A state that comes from the seed alone."""

    def state(self, setup: Setup) -> TrainState:
        """A fresh state."""
        return setup.fresh_state()

    def announce(self, workdir: epath.Path, tell: Callable[[str], None]) -> None:
        """There is nothing to tell."""


@dataclasses.dataclass(frozen=True)
class FromWeights:
    """A fresh state in which some parameters, and their average, are those of the source."""

    source: Source
    fates: Sequence[Fate]

    def state(self, setup: Setup) -> TrainState:
        """The state at step 0. The source is read now; two states are never alive."""
        arrays = self.source.take()
        chosen = {fate.path: _values(fate, arrays) for fate in self.fates if _is_taken(fate)}
        del arrays
        state = FromSeed().state(setup)
        params, ema = (param_groups.flatten(tree) for tree in (state.params, state.ema))
        state = state.replace(params={}, ema={})  # so that what is replaced is let go
        for flat in (params, ema):
            _replace(flat, param_groups.flatten(setup.abstract.params), chosen)
        return state.replace(params=param_groups.unflatten(params), ema=param_groups.unflatten(ema))

    def announce(self, workdir: epath.Path, tell: Callable[[str], None]) -> None:
        """The table of all parameters, to `tell` and (on process 0) to workdir/init_from.txt."""
        text = self.report()
        tell(text)
        if jax.process_index() == 0:
            write_whole(workdir / REPORT, text + "\n")

    def report(self) -> str:
        """Path, shape and fate of every parameter, and how many numbers met each fate."""
        rows = [(fate.path, str(fate.shape), str(fate)) for fate in self.fates]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        totals = {
            kind: sum(math.prod(fate.shape) for fate in self.fates if fate.kind == kind)
            for kind in ("loaded", "resampled", "fresh", "skipped")
        }
        return "\n".join(
            [
                f"start from {self.source.title}",
                *(f"note: {note}" for note in self.source.notes),
                *(f"  {p:<{widths[0]}}  {shape:<{widths[1]}}  {fate}" for p, shape, fate in rows),
                "parameters: " + ", ".join(f"{n:,} {kind}" for kind, n in totals.items() if n),
            ]
        )


def make_start(setup: Setup, workdir: epath.Path, tokenizer: Tokenizer) -> Start:
    """How the run in `workdir` starts, as `config.init_from` says.

    A run that has a checkpoint goes on from it and looks at no other weights.

    Raises:
      UserError: the weights are not there, or do not fit the model as the rules want it.
    """
    section = setup.config.init_from
    if checkpoint.saved_steps(checkpoint.absolute(workdir)):
        return FromSeed()
    if section.source is None:
        if section.step is not None:
            raise UserError("config.init_from.step is set and config.init_from.source is not")
        return FromSeed()
    check_rules(section.rules)
    model = {
        path: tuple(leaf.shape)
        for path, leaf in param_groups.flatten(setup.abstract.params).items()
    }
    model = stack_layers(model, lambda layers: (len(layers), *layers[0]))
    source = open_source(section.source, section.step, setup.objective.model)
    fates = match(model, source, section.rules, _model_grid(setup, model))
    _check_tokenizer(fates, source, tokenizer)
    return FromWeights(source, fates)


def check_rules(rules: Rules) -> None:
    """Raises UserError for a rule that is not a pair of a regular expression and an action."""
    for rule in rules:
        if isinstance(rule, str) or len(rule) != 2:
            raise UserError(f"{RULES}: {rule!r} is no pair such as ('image/.*', 'load')")
        if rule[1] not in ACTIONS:
            raise UserError(unknown_key_message(str(rule[1]), ACTIONS, f"{RULES}, {rule!r}"))
    param_groups.check_patterns([pattern for pattern, _ in rules], RULES)


def match(
    model: Mapping[str, Shape], source: Source, rules: Rules, grid: Grid | None = None
) -> tuple[Fate, ...]:
    """What becomes of every parameter of the model and of the source.

    The first rule whose regular expression is the whole path decides: "load" takes the parameter
    from the source, "fresh" and "skip" leave it as the seed makes it, and leave out one that the
    source alone has. Tables of positions of images are resampled where the grid of patches is
    another; all else must have the model's shape.

    Args:
      model: path -> shape, layers stacked.
      grid: of the model's patches; None if it has no images.

    Raises:
      UserError: parameters that are to be loaded and cannot be, or that would be lost, each with
        both shapes; a rule that is of no parameter; a parameter without a rule.
    """
    paths = sorted({*model, *source.shapes})
    _check_rules_fit(rules, paths)
    results = []
    for path in paths:
        rule = next((rule for rule in rules if re.fullmatch(rule[0], path)), None)
        results.append(_decide(path, rule, model.get(path), source, grid))
    problems = [result for result in results if isinstance(result, Problem)]
    fates = [result for result in results if isinstance(result, Fate)]
    if problems:
        raise UserError(_complaint(problems, source, paths))
    if not any(_is_taken(fate) for fate in fates):
        raise UserError(
            f"config.init_from.rules load nothing from {source.title}; set "
            "config.init_from.source to None, or add a rule with 'load'"
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
    "no rule": f"end {RULES} with ('.*', 'load')",
    "absent": f"to initialize it, begin {RULES} with ({{path!r}}, 'fresh')",
    "shape": f"to initialize it, begin {RULES} with ({{path!r}}, 'fresh')",
    "text": "positions of texts are not resampled: set config.tokenizer.context_length to "
    f"{{source[0]}}, or begin {RULES} with ({{path!r}}, 'fresh')",
    "grid": "positions are resampled where both sides have the same tokens besides the patches (a "
    f"class token): make them so, or begin {RULES} with ({{path!r}}, 'fresh')",
    "extra": f"to do without it, begin {RULES} with ({{path!r}}, 'skip')",
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
    text = path.startswith("text/") and path.endswith("/position_embedding")
    return Problem(path, shape, other, "text" if text and shape[1:] == other[1:] else "shape")


def _decide_positions(shape: Shape, other: Shape, old: Grid | None, new: Grid) -> Fate | Problem:
    """The fate of the image positions. An old grid that is not known is the same, or a square."""
    prefix = shape[0] - math.prod(new)
    old = old or (new if shape == other else square_grid(other[0] - prefix))
    if old is None or other[0] - math.prod(old) != prefix:
        return Problem(POSITIONS, shape, other, "grid")
    if tuple(old) == tuple(new):
        return Fate(POSITIONS, shape, "loaded")
    return Fate(POSITIONS, shape, "resampled", (old, new))


def _complaint(problems: Sequence[Problem], source: Source, paths: Sequence[str]) -> str:
    """One line: the parameters that do not fit, and for each kind what mends it."""
    rows = [str(problem) for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        rows.append(f"and {len(problems) - MAX_LISTED} more")
    first = {problem.kind: problem for problem in reversed(problems)}
    advice = [
        text.format(source=first[kind].source, path=_pattern(kind, problems, paths))
        for kind, text in ADVICE.items()
        if kind in first
    ]
    return (
        f"config.init_from: {source.title}: the weights do not fit the model: {', '.join(rows)}; "
        + "; ".join(advice)
    )


def _pattern(kind: str, problems: Sequence[Problem], paths: Sequence[str]) -> str:
    """A regular expression of the problems of a kind and of no other path; of a few if many."""
    bad = [problem.path for problem in problems if problem.kind == kind]
    folder = os.path.commonprefix(bad).rpartition("/")[0]
    if len(bad) > 1 and {path for path in paths if path.startswith(f"{folder}/")} == {*bad}:
        return f"{folder}/.*"
    return "|".join(bad[:MAX_LISTED])


def _check_rules_fit(rules: Rules, paths: Sequence[str]) -> None:
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise UserError(
                f"{RULES}: {pattern!r} is the whole path of no parameter of the model or the "
                f"source, such as {max(paths, key=len)!r} (layers are stacked here); at the top "
                f"there are {', '.join(sorted({path.partition('/')[0] for path in paths}))}"
            )


def _check_tokenizer(fates: Sequence[Fate], source: Source, tokenizer: Tokenizer) -> None:
    """Raises UserError if embeddings of tokens are loaded that stand for other tokens here."""
    loaded = [fate.path for fate in fates if _is_taken(fate) and "token_embedding/" in fate.path]
    if not loaded or source.tokenizer is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/ours")
        same = epath.Path(f"{folder}/ours").read_text() == source.tokenizer.read_text()
    if not same:
        raise UserError(
            f"config.init_from: {loaded[0]} of {source.title} is of another tokenizer; set "
            f"config.tokenizer.file to {source.tokenizer}, or begin {RULES} with "
            f"({loaded[0]!r}, 'fresh')"
        )


def _is_taken(fate: Fate) -> bool:
    return fate.kind in ("loaded", "resampled")


def _values(fate: Fate, arrays: Arrays) -> np.ndarray:
    """The numbers of one parameter, as the model is to have them."""
    array = arrays[fate.path]
    if fate.grids:
        from vlp_jax.models.positions import resample

        old, new = fate.grids
        array = resample(array, old, new, prefix_tokens=fate.shape[0] - math.prod(new))
    return array


def _model_grid(setup: Setup, model: Mapping[str, Shape]) -> Grid | None:
    """The grid of patches that the model makes of an image of the batch."""
    if "image" not in setup.batch_spec or PATCH_KERNEL not in model:
        return None
    return patch_grid(setup.batch_spec["image"].shape[1:3], model[PATCH_KERNEL])


def _replace(flat: dict[str, Any], abstract: Mapping[str, Any], chosen: Arrays) -> None:
    """Puts the arrays `chosen` in the place of the leaves of `flat`, laid out as these."""
    for path in flat:
        name, layer = stacked_name(path)
        if name in chosen:
            array = chosen[name] if layer is None else chosen[name][layer]
            flat[path] = _put(np.asarray(array), abstract[path])


def _put(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    array = array.astype(like.dtype)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])
