"""The input's record in a checkpoint, and metrics of examples that could not be used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from vlp_jax.data.faults import REASONS
from vlp_jax.data.pipeline import MultiPipeline
from vlp_jax.errors import UserError
from vlp_jax.files import write_whole
from vlp_jax.parallel import agreement


class InputState:
    """Makes and checks the input's record, of one size for all data and numbers of processes."""

    def __init__(self, pipeline: MultiPipeline, batch_size: int, accept_other_data: bool):
        self._pipeline, self._batch_size = pipeline, batch_size
        self._accept_other_data = accept_other_data
        self._kinds = [
            (name, source, reason)
            for name, pipe in pipeline.pipelines().items()
            for source in pipe.source_names
            for reason in REASONS
        ]
        # Counts from before this process began: examples read, then bad ones of each kind.
        self._begin = np.zeros(len(self._kinds) + 1, np.int64)

    def save(self, step: int) -> dict[str, Any]:
        """Returns the record just before batch `step`. All processes must call it."""
        counts = self._begin + np.array(agreement.gather(self._counts(step)), np.int64).sum(axis=0)
        read, *bad = counts.tolist()
        return {
            "position": step * self._batch_size,
            "data": self._pipeline.fingerprint(),
            "read": read,
            "bad": [[*kind, count] for kind, count in zip(self._kinds, bad, strict=True) if count],
        }

    def resume(self, saved: Mapping[str, Any], step: int) -> None:
        """Continues from the record of `step`; UserError if batch size or data has changed."""
        position = saved["position"]
        if position != step * self._batch_size:
            raise UserError(
                f"the checkpoint of step {step} was made after {position:,} examples, which does "
                f"not fit config.batch_size {self._batch_size}; resume with the batch size "
                f"{position // step}"
            )
        # The order of examples follows from the fingerprinted data: with other data the position
        # would name other examples, some of them trained on already and some never.
        before, now = saved.get("data"), self._pipeline.fingerprint()
        if before not in (None, now) and not self._accept_other_data:
            raise UserError(
                "the training data or its order has changed since the checkpoint (other files "
                "or numbers of examples in them, another seed, lanes, window or weights); put it "
                "back, or set config.checkpoint.accept_other_data to go on in the new order"
            )
        counts = {tuple(kind): count for *kind, count in saved.get("bad", ())}
        read = saved.get("read", 0)
        self._begin = np.array([read, *(counts.get(kind, 0) for kind in self._kinds)], np.int64)
        for name, pipe in self._pipeline.pipelines().items():
            bad = {(s, r): count for (n, s, r), count in counts.items() if n == name}
            pipe.faults.begin_with(read, bad)

    def metrics(self, step: int) -> dict[str, float]:
        """Counts bad examples before batch `step` for process 0; all processes must call it."""
        rows = agreement.to_first(self._counts(step))
        if rows is None:
            return {}
        read, *bad = (self._begin + np.array(rows, np.int64).sum(axis=0)).tolist()
        named = {
            "/".join(["data/bad", *filter(None, (name, source)), reason.replace(" ", "_")]): count
            for (name, source, reason), count in zip(self._kinds, bad, strict=True)
            if count
        }
        return {**named, "data/bad_fraction": sum(bad) / max(read, 1)}

    def write_examples(self, directory: epath.Path, steps: Sequence[int]) -> epath.Path:
        """Writes the examples in the batches of `steps`, a line of JSON each; returns the file."""
        file = directory / f"skipped-steps-{steps[0]}-{steps[-1]}.jsonl"
        if jax.process_index() == 0:
            records = [
                {
                    "step": step,
                    "examples": {
                        name or "data": pipe.examples_of(step)
                        for name, pipe in self._pipeline.pipelines().items()
                    },
                }
                for step in steps
            ]
            write_whole(file, "".join(json.dumps(record) + "\n" for record in records))
        return file

    def _counts(self, step: int) -> list[int]:
        """Counts this process's examples before `step`: those read, then the bad ones by kind."""
        totals = {
            name: pipe.faults.totals(before=step)
            for name, pipe in self._pipeline.pipelines().items()
        }
        read = sum(total["read"] for total in totals.values())
        bad = [totals[n]["bad"].get(source, {}).get(reason, 0) for n, source, reason in self._kinds]
        return [read, *bad]
