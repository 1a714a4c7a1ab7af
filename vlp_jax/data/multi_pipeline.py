"""Training on several datasets side by side: each step has a batch of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlp_jax.data.pipeline import Batch, BatchSpec, TrainPipeline, own_seed, within
from vlp_jax.data.tokenizers import Tokenizer


class MultiPipeline:
    """A `TrainPipeline`, and further ones whose fields are named "NAME/field".

    Each dataset has an order of its own, so that no two of them stay in step. The state of the
    input is still the number of the next batch.

    Args:
      extra: name -> data config. The seeds of these datasets depend on their names too.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        extra: Mapping[str, Mapping[str, Any]],
        tokenizer: Tokenizer | None,
        *,
        seed: int,
        **share: int,
    ) -> None:
        self._first = TrainPipeline(config, tokenizer, seed=seed, **share)
        self._extra = {}
        for name, data in extra.items():
            with within(f"config.extra_data.{name}: "):
                own = own_seed(seed, name)
                self._extra[name] = TrainPipeline(data, tokenizer, seed=own, **share)

    def __len__(self) -> int:
        """The number of examples of the first dataset, whose epochs are counted."""
        return len(self._first)

    def pipelines(self) -> dict[str, TrainPipeline]:
        """The first one under "", and the further ones under their names."""
        return {"": self._first, **self._extra}

    def fingerprint(self) -> str:
        """A hash that changes if examples get other numbers, so that the order cannot go on."""
        return ";".join(pipeline.fingerprint() for pipeline in self.pipelines().values())

    def batch_spec(self) -> BatchSpec:
        """Shape and dtype of every array of a global batch; reads no examples."""
        spec = self._first.batch_spec()
        for name, pipeline in self._extra.items():
            spec |= {f"{name}/{key}": value for key, value in pipeline.batch_spec().items()}
        return spec

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yields this process's part of the global batches from number `start_step` on."""
        # Batches of step n of all datasets go together, so one number is the state of them all.
        streams = [pipeline.batches(start_step) for pipeline in self._extra.values()]
        for first, *others in zip(self._first.batches(start_step), *streams, strict=True):
            joined = dict(first)
            for name, batch in zip(self._extra, others, strict=True):
                joined |= {f"{name}/{key}": value for key, value in batch.items()}
            yield joined
