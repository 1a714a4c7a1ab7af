"""The files of a run, read without a model or a device, and the baseline of a report."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.files import read_text
from vlp_jax.observe.goodput import GOODPUT_FILE, RunTime
from vlp_jax.observe.jsonl import read_metrics
from vlp_jax.observe.summary import SUMMARY_FILE
from vlp_jax.report.scores import PREFIX, by_evaluator
from vlp_jax.training import workdir as workdir_lib
from vlp_jax.training.run import Run


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The files of a workdir.

    Attributes:
      records: lines of metrics.jsonl, then of evaluations.jsonl; empty if there are none.
      run_time: time by cause; None if it is not known.
      summary: summary.json of the newest process; empty if there is none.
    """

    path: str
    config: ConfigDict
    records: Sequence[Mapping[str, Any]]
    run_time: RunTime | None
    summary: Mapping[str, Any]
    steps_saved: Sequence[int]

    @classmethod
    def read(cls, workdir: str | os.PathLike[str]) -> RunRecord:
        """Reads a workdir; UserError if it holds no run, or a file is damaged."""
        run = Run.open(workdir)
        folder = run.workdir
        files = [folder / name for name in (workdir_lib.METRICS, workdir_lib.EVALUATIONS)]
        return cls(
            path=os.fspath(workdir),
            config=run.config,
            records=[r for file in files if file.exists() for r in read_metrics(file)],
            run_time=_read(folder / GOODPUT_FILE, RunTime.from_json),
            summary=_read(folder / SUMMARY_FILE, _summary) or {},
            steps_saved=run.steps(),
        )

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Returns (steps, values) of a metric in order; a later record of a step counts."""
        # A restart repeats steps, and evaluations.jsonl may judge a step again.
        found = {r["step"]: r[name] for r in self.records if name in r}
        return sorted(found), [found[step] for step in sorted(found)]

    def names(self, prefix: str) -> list[str]:
        """Returns the metrics whose names begin with `prefix`, in the order of the file."""
        return list(dict.fromkeys(k for r in self.records for k in r if k.startswith(prefix)))

    def last_scores(self) -> tuple[dict[str, float], Sequence[int]]:
        """Returns the newest value of every score, and the steps of these values in order."""
        scores, steps = {}, set()
        for name in self.names(PREFIX):
            at, values = self.curve(name)
            scores[name] = values[-1]
            steps.add(at[-1])
        return scores, sorted(steps)

    @property
    def last_step(self) -> int:
        """The newest step of which there is a record or a checkpoint; 0 for none."""
        return max([*(r["step"] for r in self.records), *self.steps_saved], default=0)


def short_names(paths: Sequence[str]) -> list[str]:
    """Returns the shortest ends of paths that differ: "a/run", "b/run"."""
    parts = [str(epath.Path(path).expanduser().resolve()).split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _read(file: epath.Path, parse: Callable[[str], Any]) -> Any:
    """Parses a file; returns None if there is none."""
    if not file.exists():
        return None
    try:
        return parse(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): mend or remove it") from None


def _summary(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Scores to compare with, EVALUATOR/NAME -> value, and their run; None for given numbers."""

    title: str
    scores: Mapping[str, float]
    run: RunRecord | None = None

    def unknown(self, scores: Iterable[str]) -> list[str]:
        """Names given numbers that were not evaluated, a line each, with the nearest score."""
        if self.run is not None:
            return []
        known, lines = sorted(scores), []
        for key in self.scores:
            if key not in known:
                # Half of the letters alike: names of scores share long beginnings.
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"; did you mean {nearest[0].removeprefix(PREFIX)!r}?" if nearest else ""
                lines.append(
                    f"the baseline has {key.removeprefix(PREFIX)!r}, which was not evaluated{hint}"
                )
        return lines


def read_baseline(path: str | os.PathLike[str], evaluators: Sequence[str]) -> Baseline:
    """Reads the workdir of another run, or a JSON file {"zero_shot/top1": 0.9, ...}.

    Raises:
      UserError: the path is neither, the run has no scores, or the file names another evaluator
        than `evaluators` or holds a value that is no number.
    """
    place = epath.Path(path)
    if not place.exists():
        raise UserError(f"--baseline {path} does not exist: give a workdir or a JSON file")
    if place.is_dir():
        run = RunRecord.read(path)
        scores, steps = run.last_scores()
        if not scores:
            raise UserError(
                f"--baseline {path}: this run has no scores yet; evaluate it with "
                f"python -m vlp_jax.evaluate --workdir {path} --all"
            )
        span = f"{steps[-1]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        return Baseline(f"{run.path}, step {span}", scores, run)
    return Baseline(os.fspath(path), _numbers(place, evaluators))


def _numbers(file: epath.Path, evaluators: Sequence[str]) -> dict[str, float]:
    try:
        given = json.loads(read_text(file, "--baseline"))
    except ValueError as error:
        raise UserError(f"--baseline {file} is no JSON: {error}") from None
    if not isinstance(given, dict) or not given:
        raise UserError(f'--baseline {file} must be an object like {{"zero_shot/top1": 0.9}}')
    scores = {}
    for key, value in given.items():
        if key == "step":
            continue  # as `vlp_jax.evaluate --output` writes
        # In Python True is an int.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise UserError(f"--baseline {file}: {key} is {value!r}, not a number")
        scores[PREFIX + key.removeprefix(PREFIX)] = float(value)
    for key in scores:
        if key.count("/") < 2:
            raise UserError(f"--baseline {file}: {key!r} must be EVALUATOR/SCORE")
    for name in by_evaluator(scores):
        if name not in evaluators:
            raise UserError(unknown_key_message(name, evaluators, f"--baseline {file}"))
    return scores
