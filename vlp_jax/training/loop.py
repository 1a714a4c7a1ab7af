"""The one training loop. It knows steps, states and batches, and nothing about the objective."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vlp_jax.errors import NoScores, NotFinite, Preempted
from vlp_jax.evaluators import Evaluator
from vlp_jax.objectives.base import Batch
from vlp_jax.observe.profiler import Profiler
from vlp_jax.observe.progress import Progress
from vlp_jax.observe.samples import write_samples
from vlp_jax.observe.throughput import StepClock
from vlp_jax.observe.watchdog import Watchdog
from vlp_jax.observe.writers import Writer
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.measures import LoopMeasures
from vlp_jax.training.report import StepReport
from vlp_jax.training.several_steps import StepProgram
from vlp_jax.training.state import TrainState
from vlp_jax.training.step import StepFunction

When = Callable[[int], bool]


def one_at_a_time(step: int) -> int:
    """Dispatches one step at a time."""
    del step
    return 1


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluator, the name that prefixes its scores, and the steps at which it runs."""

    name: str
    when: When
    evaluator: Evaluator


@dataclasses.dataclass(frozen=True)
class Loop:
    """The components of a run, and the order in which each step calls them.

    A component that is off is a null object.

    Attributes:
      program_of: step -> the compiled program of its phase.
      first_step: the step to begin with: 0, or the step of the restored checkpoint.
      last_step: the run ends before this batch.
      input_state: step -> the record of the input just before that batch, for the checkpoint.
      one_evaluation: a context in which evaluators share embeddings of the given parameters.
      preempted: step -> whether to save and stop before that batch.
      interruptible: a context in which a request to stop may raise KeyboardInterrupt.
      log_when: the steps whose metrics are written. Processes exchange messages at these steps.
      steps_ahead: step -> how many steps to dispatch at once, beginning with it. The host sees
        nothing in between, so a step that the host must see comes first in its dispatch.
    """

    program_of: Callable[[int], StepFunction | StepProgram]
    batches: Iterator[Batch]
    input_state: Callable[[int], Mapping[str, Any]]
    first_step: int
    last_step: int
    save_when: When
    evaluations: Sequence[Evaluation]
    one_evaluation: Callable[[Any], contextlib.AbstractContextManager]
    preempted: When
    log_when: When
    report: StepReport
    checkpointer: Checkpointer
    writer: Writer
    progress: Progress
    clock: StepClock
    profiler: Profiler
    watchdog: Watchdog
    measures: LoopMeasures
    steps_ahead: Callable[[int], int] = one_at_a_time
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
            if self.preempted(step):
                raise self.stop(step, state)
            try:
                self.evaluate(step, state)
            except KeyboardInterrupt:  # the resumed run repeats the whole evaluation of this step
                raise self.stop(step, state) from None
            saved = self.save_when(step) and self.save(step, state)
            if step == self.last_step:
                break
            self.measures.collect_garbage(step)
            count = self.steps_ahead(step)
            self.profiler.step(step, state, count)
            with self.clock.data_wait():
                batches = [next(self.batches) for _ in range(count)]
            state, metrics = self.program_of(step)(state, *batches)
            del batches  # else the host would hold their memory until the next batches are here
            self.report.take(step, metrics)
            self.watchdog.beat()
            if self.log_when(step):
                self.checkpointer.poll()
                if self.checkpointer.failed:
                    self.measures.note("saves failed", self.checkpointer.failed)
            step += count
        if saved:
            self.finish(step)
        return state

    def stop(self, step: int, state: TrainState) -> Preempted:
        """Saves the state before batch `step`, and returns the error that ends the run."""
        saved = self.save(step, state)
        if saved:
            self.finish(step)
        newest = self.checkpointer.latest_step()
        why = "" if saved else " in the middle of steps that are skipped"
        return Preempted(f"told to stop{why}; saved step {newest}, run the same command to go on")

    def evaluate(self, step: int, state: TrainState) -> None:
        """Runs the evaluators that are due before batch `step`.

        Raises:
          KeyboardInterrupt: the run was told to stop; the remaining evaluators did not run.
        """
        due = [evaluation for evaluation in self.evaluations if evaluation.when(step)]
        params = state.eval_params
        with self.one_evaluation(params):
            for evaluation in due:
                if evaluation is not due[0] and self.preempted(step):
                    raise KeyboardInterrupt
                self.report.settle()
                try:
                    with self.pause("evaluation"), self.interruptible():
                        outcome = evaluation.evaluator.outcome(params)
                        scores, samples = outcome.scores(), outcome.samples()
                # Scores that are not finite do not end a run: the guard alone decides on that.
                except (NotFinite, NoScores) as error:
                    self.progress.print(f"step {step:,}  {evaluation.name}: no scores: {error}")
                    self.measures.note(f"no scores of {evaluation.name}", f"at step {step:,}")
                    continue
                named = {f"eval/{evaluation.name}/{key}": value for key, value in scores.items()}
                self.writer.write_scalars(step, named)
                write_samples(self.writer, step, evaluation.name, samples)
                text = "  ".join(f"{key} {value:.4g}" for key, value in scores.items())
                self.progress.print(f"step {step:,}  {evaluation.name}: {text}")

    def save(self, step: int, state: TrainState) -> bool:
        """Saves the state before batch `step`, once the outcome of all earlier steps is known.

        Nothing is saved between skipped steps: their cause may be gone after a restart, which then
        repeats all of them. Returns whether the state was saved.
        """
        self.report.settle()
        if self.report.skipped_in_a_row and step != self.last_step:
            self.progress.print(f"step {step:,}  not saved: the steps before it were skipped")
            return False
        with self.pause("checkpoint"):
            self.checkpointer.save(step, state, self.input_state(step))
        self.measures.saved(step)
        self.writer.flush()
        return True

    def finish(self, step: int) -> None:
        """Waits until the checkpoint of `step` is on disk."""
        with self.pause("checkpoint"):
            self.checkpointer.finish(step)

    @contextlib.contextmanager
    def pause(self, cause: str) -> Iterator[None]:
        """Wraps work other than training: the watchdog is patient, and the time has a cause."""
        with self.watchdog.patient(cause), self.clock.paused(cause), self.progress.paused():
            yield
