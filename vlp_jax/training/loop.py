"""The one training loop. It knows steps, states and batches, and nothing of what is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vlp_jax.evaluators import Evaluator
from vlp_jax.objectives.base import Batch
from vlp_jax.observe.profiler import Profiler
from vlp_jax.observe.progress import Progress
from vlp_jax.observe.throughput import StepClock
from vlp_jax.observe.writers import Writer
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.measures import LoopMeasures
from vlp_jax.training.preemption import Preempted
from vlp_jax.training.report import StepReport
from vlp_jax.training.state import TrainState
from vlp_jax.training.step import StepFunction

When = Callable[[int], bool]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluator, the name its scores go by, and the steps at which it runs."""

    name: str
    when: When
    evaluator: Evaluator


@dataclasses.dataclass(frozen=True)
class Loop:
    """What a run consists of. A part that is off is a null object.

    Attributes:
      first_step: the step to begin with: 0, or that of the checkpoint.
      last_step: the run ends before this batch.
      input_state: the record of the input just before a batch, for the checkpoint.
      preempted: whether to save and stop before this batch.
    """

    step_function: StepFunction
    batches: Iterator[Batch]
    input_state: Callable[[int], Mapping[str, Any]]
    first_step: int
    last_step: int
    save_when: When
    evaluations: Sequence[Evaluation]
    preempted: When
    report: StepReport
    checkpointer: Checkpointer
    writer: Writer
    progress: Progress
    clock: StepClock
    profiler: Profiler
    measures: LoopMeasures

    def run(self, state: TrainState) -> TrainState:
        """Trains from `state`, just before batch `first_step`, to the end.

        The order within a step never changes, so the checkpoint of step i is the state just before
        batch i and after every score of step i.

        Raises:
          Preempted: told to stop; the state is saved.
          UserError: a loss or gradient that is not finite; no later state was saved.
        """
        for step in range(self.first_step, self.last_step + 1):
            if self.preempted(step):
                self.save(step, state)
                raise Preempted(f"told to stop; saved step {step}, run the same command to go on")
            self.evaluate(step, state)
            if self.save_when(step):
                self.save(step, state)
            if step == self.last_step:
                break
            self.measures.collect_garbage(step)
            self.profiler.step(step, state)
            with self.clock.data_wait():
                batch = next(self.batches)
            state, metrics = self.step_function(state, batch)
            self.report.take(step, metrics)
        return state

    def evaluate(self, step: int, state: TrainState) -> None:
        """Runs the evaluators that are due before batch `step`."""
        for evaluation in self.evaluations:
            if evaluation.when(step):
                self.report.settle()
                with self.clock.paused("evaluation"), self.progress.paused():
                    scores = dict(evaluation.evaluator(state.eval_params))
                named = {f"eval/{evaluation.name}/{key}": value for key, value in scores.items()}
                self.writer.write_scalars(step, named)
                text = "  ".join(f"{key} {value:.4g}" for key, value in scores.items())
                self.progress.print(f"step {step:,}  {evaluation.name}: {text}")

    def save(self, step: int, state: TrainState) -> None:
        """Saves the state before batch `step`, once all steps before it proved finite."""
        self.report.settle()
        with self.clock.paused("checkpoint"), self.progress.paused():
            self.checkpointer.save(step, state, self.input_state(step))
        self.measures.saved(step)
        self.writer.flush()
