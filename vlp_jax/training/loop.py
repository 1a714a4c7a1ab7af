"""The one training loop. It knows steps, states and batches, and nothing about the objective."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vlp_jax.errors import NoScores, NotFinite, Preempted
from vlp_jax.evaluators import Evaluator
from vlp_jax.objectives.base import Batch
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.monitor import Monitor
from vlp_jax.training.state import TrainState
from vlp_jax.training.step import StepFunction, StepProgram

When = Callable[[int], bool]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluator, the name that prefixes its scores, and the steps at which it runs."""

    name: str
    when: When
    evaluator: Evaluator


@dataclasses.dataclass(frozen=True)
class Loop:
    """The parts of a run. A part that is off is a null object.

    Attributes:
      program_of: step -> its program.
      batches: the global batches from `first_step` on.
      input_state: step -> the record of the input just before its batch, for the checkpoint.
      first_step: the step to begin with: 0, or the step of the checkpoint.
      last_step: the run ends before this batch.
      save_when: the steps before which the state is saved.
      log_when: the steps whose metrics are written, at which processes exchange news.
      one_evaluation: within it, evaluators share what they compute of the given parameters.
      preempted: step -> whether to save and stop before its batch.
      steps_ahead: step -> how many steps to hand to the devices at once. The host looks at nothing
        in between, so each step that it has to look at is the first of them.
      interruptible: within it, being told to stop may raise KeyboardInterrupt.
    """

    program_of: Callable[[int], StepFunction | StepProgram]
    batches: Iterator[Batch]
    input_state: Callable[[int], Mapping[str, Any]]
    first_step: int
    last_step: int
    save_when: When
    log_when: When
    evaluations: Sequence[Evaluation]
    one_evaluation: Callable[[Any], contextlib.AbstractContextManager]
    preempted: When
    checkpointer: Checkpointer
    monitor: Monitor
    steps_ahead: Callable[[int], int] = lambda step: 1
    interruptible: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def run(self, state: TrainState) -> TrainState:
        """Trains from `state`, just before batch `first_step`, to the end of the run.

        The order within a step never changes, so the checkpoint of step i is the state just before
        batch i and after every score of step i.

        Raises:
          Preempted: the run was told to stop; the state is saved.
          NotFinite: too many steps in a row were skipped; none of them was saved.
          CannotSave: a checkpoint that the run depends on could not be written.
        """
        step = self.first_step
        while True:
            # Before the evaluation, which may take longer than the notice that a machine gets.
            if self.preempted(step):
                raise self.stop(step, state)
            try:
                self.evaluate(step, state)
            except KeyboardInterrupt:  # the resumed run repeats the whole evaluation of this step
                raise self.stop(step, state) from None
            # After the evaluation, so that the checkpoint of step i follows every score of step i.
            saved = self.save_when(step) and self.save(step, state)
            if step == self.last_step:
                break
            count = self.steps_ahead(step)
            self.monitor.begin_step(step, state, count)
            with self.monitor.waiting_for_data():
                batches = [next(self.batches) for _ in range(count)]
            state, metrics = self.program_of(step)(state, *batches)
            del batches  # their memory is free when the step is done
            self.monitor.end_step(step, metrics)
            if self.log_when(step):
                self.checkpointer.poll()
                self.monitor.saves_failed(self.checkpointer.failed)
            step += count
        if saved:
            self.finish(step)
        return state

    def stop(self, step: int, state: TrainState) -> Preempted:
        """Saves the state before batch `step`, and returns the error that ends the run."""
        saved = self.save(step, state)
        if saved:
            self.finish(step)
        # A save in the middle of skipped steps does not happen; the newest may be older.
        newest = self.checkpointer.latest_step()
        why = "" if saved else " in the middle of steps that are skipped"
        return Preempted(f"told to stop{why}; saved step {newest}, run the same command to go on")

    def evaluate(self, step: int, state: TrainState) -> None:
        """Runs the evaluators that are due; KeyboardInterrupt if the run is told to stop."""
        due = [evaluation for evaluation in self.evaluations if evaluation.when(step)]
        params = state.eval_params
        with self.one_evaluation(params):
            for evaluation in due:
                # `run` has just asked before the first. All processes must ask equally often.
                if evaluation is not due[0] and self.preempted(step):
                    raise KeyboardInterrupt
                self.monitor.settle()
                try:
                    with self.monitor.pause("evaluation"), self.interruptible():
                        outcome = evaluation.evaluator.outcome(params)
                        scores, samples = outcome.scores(), outcome.samples()
                # Scores that are not finite do not end a run: the guard alone decides on that.
                except (NotFinite, NoScores) as error:
                    self.monitor.no_scores(step, evaluation.name, error)
                else:
                    self.monitor.scores(step, evaluation.name, scores, samples)

    def save(self, step: int, state: TrainState) -> bool:
        """Saves the state before batch `step`, and returns whether it was saved.

        Not in the middle of skipped steps: a restart then goes back to before the first of them.
        """
        self.monitor.settle()
        if self.monitor.skipping and step != self.last_step:
            self.monitor.tell(f"step {step:,}  not saved: the steps before it were skipped")
            return False
        with self.monitor.pause("checkpoint"):
            self.checkpointer.save(step, state, self.input_state(step))
        self.monitor.saved(step)
        return True

    def finish(self, step: int) -> None:
        """Waits until the checkpoint of `step` is on disk."""
        with self.monitor.pause("checkpoint"):
            self.checkpointer.finish(step)
