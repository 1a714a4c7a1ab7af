"""The files of a run, read without a model or a device."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vlp_jax.errors import UserError
from vlp_jax.observe.goodput import GOODPUT_FILE, RunTime
from vlp_jax.observe.jsonl import read_metrics
from vlp_jax.observe.summary import SUMMARY_FILE
from vlp_jax.report.scores import PREFIX
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
