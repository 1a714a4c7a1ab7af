"""Rules that decide on shapes alone which parameters come from a source, which from the seed."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.training import param_groups
from vlp_jax.training.restore import Shape
from vlp_jax.training.weights import POSITIONS, Grid, Source, square_grid

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
      where: what the source is called in an error.

    Raises:
      UserError: parameters that are to be loaded and cannot be, or that would be lost, each with
        both shapes; a rule that is of no parameter; a parameter without a rule.
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
