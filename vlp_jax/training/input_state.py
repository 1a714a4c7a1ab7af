"""What a checkpoint keeps of the input, and what is told of examples that could not be used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from vlp_jax.data.faults import REASONS
from vlp_jax.data.multi_pipeline import MultiPipeline
from vlp_jax.errors import UserError
from vlp_jax.files import write_whole
from vlp_jax.parallel import agreement


class InputState:
    """The record of the input in a checkpoint: position, fingerprint, counts of bad examples.

    Its size does not depend on the data or on the processes.

    Args:
      pipeline: of this process.
      batch_size: examples of a step, over all processes.
      accept_other_data: whether to go on with data that is not that of the checkpoint.
    """

    def __init__(self, pipeline: MultiPipeline, batch_size: int, accept_other_data: bool):
        self._pipeline = pipeline
        self._batch_size = batch_size
        self._accept_other_data = accept_other_data
        self._kinds = [
            (name, source, reason)
            for name, pipe in pipeline.pipelines().items()
            for source in pipe.source_names
            for reason in REASONS
        ]
        self._begin = np.zeros(len(self._kinds) + 1, np.int64)  # read, and bad of each kind

    def save(self, step: int) -> dict[str, Any]:
        """The record just before batch `step`. With several processes, all of them call it."""
        counts = self._begin + np.array(agreement.gather(self._counts(step)), np.int64).sum(axis=0)
        read, *bad = counts.tolist()
        return {
            "position": step * self._batch_size,
            "data": self._pipeline.fingerprint(),
            "read": read,
            "bad": [[*kind, count] for kind, count in zip(self._kinds, bad, strict=True) if count],
        }

    def resume(self, saved: Mapping[str, Any], step: int) -> None:
        """Goes on from what `save` gave at `step`.

        Raises:
          UserError: the batches were of another size, or the data has changed.
        """
        position = saved["position"]
        if position != step * self._batch_size:
            raise UserError(
                f"the checkpoint of step {step} was made after {position:,} examples, which does "
                f"not fit config.batch_size {self._batch_size}; resume with the batch size "
                f"{position // step}"
            )
        before, now = saved.get("data"), self._pipeline.fingerprint()
        if before not in (None, now) and not self._accept_other_data:
            raise UserError(
                "the training data is not that of the checkpoint, or not in its order (other files "
                "or numbers of examples in them, another seed, lanes, window or weights); put it "
                "back, or set config.checkpoint.accept_other_data to go on in the new order"
            )
        counts = {tuple(kind): count for *kind, count in saved.get("bad", ())}
        read = saved.get("read", 0)
        self._begin = np.array([read, *(counts.get(kind, 0) for kind in self._kinds)], np.int64)
        for name, pipe in self._pipeline.pipelines().items():
            own = {(s, r): count for (n, s, r), count in counts.items() if n == name}
            pipe.faults.begin_with(read, own)

    def metrics(self, step: int) -> dict[str, float]:
        """Bad examples before batch `step`, by source and reason, and their share.

        With several processes, all of them call it, and process 0 alone is told.
        """
        rows = agreement.to_first(self._counts(step))
        if rows is None:
            return {}
        read, *bad = (self._begin + np.array(rows, np.int64).sum(axis=0)).tolist()
        named = {
            "/".join(["data/bad", *filter(None, (name, source)), reason.replace(" ", "_")]): count
            for (name, source, reason), count in zip(self._kinds, bad, strict=True)
            if count
        }
        return {
            **{k: float(v) for k, v in named.items()},
            "data/bad_fraction": sum(bad) / max(read, 1),
        }

    def write_examples(self, directory: epath.Path, steps: Sequence[int]) -> epath.Path:
        """Writes which examples the batches of `steps` hold, a line of JSON for each; the file.

        Process 0 writes it, for the batches of the whole job.
        """
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
        """Examples read, and bad ones of each kind, of this process since it began."""
        totals = {
            name: pipe.faults.totals(before=step)
            for name, pipe in self._pipeline.pipelines().items()
        }
        own = [sum(total["read"] for total in totals.values())]
        return own + [
            totals[n]["bad"].get(source, {}).get(reason, 0) for n, source, reason in self._kinds
        ]
