"""The start of a run from other weights: which parameter comes from where, and the first state."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax.data.tokenizers import Tokenizer
from vlp_jax.errors import UserError
from vlp_jax.files import write_whole
from vlp_jax.training import checkpoint, param_groups
from vlp_jax.training.matching import (
    PATCH_KERNEL,
    WHERE,
    Arrays,
    Fate,
    Rules,
    Source,
    adapting_rules,
    check_rules,
    is_taken,
    match,
    open_source,
    patch_grid,
    relocated,
)
from vlp_jax.training.restore import Shape
from vlp_jax.training.setup import Setup
from vlp_jax.training.state import TrainState

REPORT = "init_from.txt"


@dataclasses.dataclass(frozen=True)
class Taking:
    """A source, and what becomes of the parameters that it is asked for."""

    source: Source
    fates: Sequence[Fate]

    @property
    def taken(self) -> dict[str, Fate]:
        """The parameters that come from this source, by path."""
        return {fate.path: fate for fate in self.fates if is_taken(fate)}


@dataclasses.dataclass(frozen=True)
class Start:
    """The origin of the state before step 0: sources, each with its parameters, and the seed."""

    takings: Sequence[Taking] = ()
    fresh: Sequence[Fate] = ()

    @property
    def fates(self) -> list[Fate]:
        """The fate of every parameter."""
        return [*(fate for taking in self.takings for fate in taking.fates), *self.fresh]

    def state(self, setup: Setup) -> TrainState:
        """Makes the state; the sources are read now, and two states are never alive."""
        chosen: dict[str, np.ndarray] = {}
        for taking in self.takings:
            # Chosen parameters are kept and the rest is freed before the next source is read.
            arrays = taking.source.take()
            chosen |= {path: _values(fate, arrays) for path, fate in taking.taken.items()}
            del arrays
        state = setup.fresh_state()
        if not chosen:
            return state
        params, ema = (param_groups.flatten(tree) for tree in (state.params, state.ema))
        state = state.replace(params={}, ema={})  # so that what is replaced is let go
        abstract = param_groups.flatten(setup.abstract.params)
        for flat in (params, ema):
            flat.update({path: _put(chosen[path], abstract[path]) for path in flat.keys() & chosen})
        return state.replace(params=param_groups.unflatten(params), ema=param_groups.unflatten(ema))

    def announce(self, workdir: epath.Path, tell: Callable[[str], None]) -> None:
        """Tells what was loaded, and writes it to workdir/init_from.txt on process 0."""
        if not self.takings:
            return
        text = self.report()
        tell(text)
        if jax.process_index() == 0:
            write_whole(workdir / REPORT, text + "\n")

    def report(self) -> str:
        """Path, shape and fate of every parameter, and how many numbers met each fate."""
        every = self.fates
        rows = [(fate.path, str(fate.shape), str(fate)) for fate in every]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        totals = {
            kind: sum(math.prod(fate.shape) for fate in every if fate.kind == kind)
            for kind in ("loaded", "resampled", "fresh", "skipped")
        }
        lines, at = [], 0
        titles = [(t.source.title, t.source.notes, len(t.fates)) for t in self.takings]
        titles += [("the seed", (), len(self.fresh))] if self.fresh else []
        for title, notes, count in titles:
            lines += [f"start from {title}", *(f"note: {note}" for note in notes)]
            for path, shape, fate in rows[at : at + count]:
                lines.append(f"  {path:<{widths[0]}}  {shape:<{widths[1]}}  {fate}")
            at += count
        counted = ", ".join(f"{n:,} {kind}" for kind, n in totals.items() if n)
        return "\n".join([*lines, f"parameters: {counted}"])


def make_start(setup: Setup, workdir: epath.Path, tokenizer: Tokenizer) -> Start:
    """Returns the start of the run in `workdir`, as `config.init_from` says.

    A run that has a checkpoint goes on from it and looks at no other weights.

    Raises:
      UserError: the weights are not there, or do not fit the model as the rules want it, or a
        parameter would come from two sources.
    """
    section = setup.config.init_from
    if checkpoint.saved_steps(checkpoint.absolute(workdir)):
        return Start()
    if section.source is None and section.step is not None:
        raise UserError("config.init_from.step is set and config.init_from.source is not")
    model = {
        path: tuple(leaf.shape)
        for path, leaf in param_groups.flatten(setup.abstract.params).items()
    }
    grid = None  # of the patches that the model makes of an image of the batch
    if "image" in setup.batch_spec and PATCH_KERNEL in model:
        grid = patch_grid(setup.batch_spec["image"].shape[1:3], model[PATCH_KERNEL])
    takings: dict[str, Taking] = {}
    for where, wanted in _wanted(section).items():
        check_rules(wanted.rules, f"{where}.rules")
        prefix = f"{wanted.into}/" if wanted.into else ""
        asked = {path: shape for path, shape in model.items() if path.startswith(prefix)}
        if not asked:
            raise UserError(f"{where}.into: the model has no parameters under {wanted.into!r}")
        source = open_source(wanted.source, wanted.step, setup.objective.model, where)
        source = relocated(source, wanted.into if wanted.take is None else wanted.take, wanted.into)
        rules = wanted.rules
        if section.model:  # then a difference is an override, and on purpose
            rules = (*adapting_rules(asked, source.shapes), *rules)
        takings[where] = Taking(source, match(asked, source, rules, grid, where))
        _check_tokenizer(takings[where], tokenizer, where)
    if not takings:
        return Start()
    _check_one_source_each(takings)
    return Start(*_without_repeats(takings.values(), model))


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A section of `config.init_from.sources`, whose keys `vlp_jax.defaults` explains."""

    source: str
    step: int | None = None
    rules: Rules = ((".*", "load"),)
    into: str = ""
    take: str | None = None


def _wanted(section: ConfigDict) -> dict[str, Wanted]:
    """Returns the name of each source in the config -> its section."""
    wanted: dict[str, Wanted] = {}
    if section.source is not None:
        wanted[WHERE] = Wanted(section.source, section.step, section.rules)
    for name, given in section.sources.items():
        where = f"config.init_from.sources.{name}"
        if not isinstance(given, Mapping | ConfigDict):
            raise UserError(f"{where} must be a section with a source, not {given!r}")
        wanted[where] = config_lib.build(Wanted, given, where)
    return wanted


def _check_one_source_each(takings: Mapping[str, Taking]) -> None:
    """Raises UserError for a parameter that two sources give."""
    given: dict[str, str] = {}
    for where, taking in takings.items():
        for path in taking.taken:
            if path in given:
                raise UserError(
                    f"{given[path]} and {where} both give {path}: let one of them be for other "
                    f"parameters ({where}.into), or begin {where}.rules with ({path!r}, 'fresh')"
                )
            given[path] = where


def _without_repeats(
    takings: Collection[Taking], model: Mapping[str, Shape]
) -> tuple[list[Taking], list[Fate]]:
    """Each parameter of the model once: what one source gives is not fresh by another."""
    given = {path for taking in takings for path in taking.taken}
    seen: set[str] = set()
    kept = []
    for taking in takings:
        fates = [
            fate for fate in taking.fates if fate.kind != "fresh" or fate.path not in given | seen
        ]
        seen |= {fate.path for fate in fates if fate.kind != "skipped"}
        kept.append(Taking(taking.source, fates))
    return kept, [Fate(p, shape, "fresh") for p, shape in sorted(model.items()) if p not in seen]


def _check_tokenizer(taking: Taking, tokenizer: Tokenizer, where: str) -> None:
    """Raises UserError if embeddings of tokens are loaded that stand for other tokens here."""
    source = taking.source
    loaded = [path for path in taking.taken if "token_embedding/" in path]
    if not loaded or source.tokenizer is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        # Compared as saved files, from whatever class or path the tokenizers were built.
        tokenizer.save(f"{folder}/ours")
        same = epath.Path(f"{folder}/ours").read_text() == source.tokenizer.read_text()
    if not same:
        raise UserError(
            f"{where}: {loaded[0]} of {source.title} is of another tokenizer; set "
            f"config.tokenizer.file to {source.tokenizer}, or begin {where}.rules with "
            f"({loaded[0]!r}, 'fresh')"
        )


def _values(fate: Fate, arrays: Arrays) -> np.ndarray:
    """The numbers of one parameter, as the model is to have them."""
    array = arrays[fate.path]
    if fate.grids:
        from vlp_jax.models.positions import resample

        old, new = fate.grids
        array = resample(array, old, new, prefix_tokens=fate.shape[0] - math.prod(new))
    return array


def _put(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    array = array.astype(like.dtype)
    # Each device copies its own part; the whole array stays on the host.
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])
