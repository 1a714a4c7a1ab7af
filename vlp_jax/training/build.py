"""Builds all components of a run from its config and workdir, before the first file is written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vlp_jax.data.pipeline import MultiPipeline
from vlp_jax.data.tokenizers import Tokenizer
from vlp_jax.evaluators import differing_wordings, make_evaluators
from vlp_jax.evaluators.base import Resources, compile_functions
from vlp_jax.evaluators.loss import evaluator_functions
from vlp_jax.objectives import Objective
from vlp_jax.objectives.base import LABELS
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.parallel import agreement
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.training import setup as setup_lib
from vlp_jax.training import workdir as workdir_lib
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.init_from import Start, make_start
from vlp_jax.training.input_state import InputState
from vlp_jax.training.loop import Evaluation, Loop, When
from vlp_jax.training.measures import profile_steps
from vlp_jax.training.run import text_wording
from vlp_jax.training.setup import Setup
from vlp_jax.training.state import TrainState
from vlp_jax.training.when import EveryMinutes, EverySteps, StepsAhead, StepsOrMinutes


@dataclasses.dataclass(frozen=True)
class RunComponents:
    """The components of a run, built for these devices and this data. Nothing is written yet."""

    setup: Setup
    start: Start
    tokenizer: Tokenizer | None
    resources: Resources
    pipeline: MultiPipeline
    input_state: InputState
    evaluations: Sequence[Evaluation]
    save_when: StepsOrMinutes
    log_when: When
    notes: tuple[str, ...]

    def steps_ahead(self, first_step: int) -> StepsAhead:
        """Makes the rule for how many steps are dispatched at once, from `first_step` on."""
        config, total = self.setup.config, self.setup.units.total_steps
        # Without a trace both ends below are step 0, which begins a dispatch in any case.
        first, last = profile_steps(config) or (0, -1)
        return StepsAhead(
            several=config.steps_per_dispatch,
            first=first_step,
            last=total,
            begins=(
                self.save_when.steps,
                self.log_when,
                EverySteps(config.garbage_collection_every, last=total),
                lambda step: step in (first, last + 1, *self.setup.phases),
                *(evaluation.when for evaluation in self.evaluations),
            ),
        )

    def monitoring(self, workdir: epath.Path) -> dict[str, Any]:
        """Returns the arguments of the run's `Monitor` that are in here."""
        return {
            "log_when": self.log_when,
            "batch_size": self.setup.config.batch_size,
            "input_metrics": self.input_state.metrics,
            "max_skipped": self.setup.config.guard.max_skipped,
            "keep_examples": functools.partial(self.input_state.write_examples, workdir),
        }

    def loop(self, first_step: int, **more: Any) -> Loop:
        """Makes the loop from `first_step` on; `more` are the parts of it that are not in here."""
        return Loop(
            input_state=self.input_state.save,
            first_step=first_step,
            last_step=self.setup.units.total_steps,
            save_when=self.save_when,
            log_when=self.log_when,
            evaluations=self.evaluations,
            one_evaluation=self.resources.one_evaluation,
            steps_ahead=self.steps_ahead(first_step),
            **more,
        )


def _check_classes(objective: Objective, pipeline: MultiPipeline) -> None:
    """Raises UserError if the data of a classifier has another list of classes than the model."""
    for part in objective.parts().values():
        for name, field in part.objective.reads.items():
            if field.kind == LABELS:
                pipeline.pipelines()[part.data or ""].check_classes(name, field.classes)


def build(config: ConfigDict, workdir: epath.Path, clock: StartupClock) -> RunComponents:
    """Builds the components of a run, and so checks everything before the first file is written.

    Raises:
      UserError: the config does not fit the devices, the data, the workdir or itself.
    """
    # Cheap checks come first: a batch that does not fit the mesh is known before data is opened.
    with clock.phase("find the devices"):
        mesh = mesh_lib.make_mesh(config.mesh)
        setup_lib.check_batch_size(config, mesh)
    with clock.phase("open the data"):
        tokenizer = workdir_lib.open_tokenizer(workdir, config)
        pipeline = setup_lib.make_pipeline(config, tokenizer)
    with clock.phase("build the model"):
        setup = setup_lib.make_setup(config, mesh, tokenizer, pipeline.batch_spec(), len(pipeline))
        _check_classes(setup.objective, pipeline)
    with clock.phase("find the weights to start from"):
        start = make_start(setup, workdir, tokenizer)
    wording, notes = text_wording(config, setup.objective)
    resources = Resources(
        functions=compile_functions(evaluator_functions(setup.objective), mesh),
        tokenizer=tokenizer,
        mesh=mesh,
        batch_size=config.batch_size,
        wording=wording,
    )
    with clock.phase("open the evaluation data"):
        evaluators = make_evaluators(config.evaluators, config.data, resources)
    evaluations = [
        Evaluation(
            key,
            setup.every(config.evaluators[key].every, f"config.evaluators.{key}.every"),
            evaluator,
        )
        for key, evaluator in evaluators.items()
    ]
    return RunComponents(
        setup=setup,
        start=start,
        tokenizer=tokenizer,
        resources=resources,
        pipeline=pipeline,
        input_state=InputState(pipeline, config.batch_size, config.checkpoint.accept_other_data),
        evaluations=evaluations,
        save_when=StepsOrMinutes(
            setup.every(config.checkpoint.every, "config.checkpoint.every"),
            EveryMinutes(config.checkpoint.minutes, setup.log_when(), agreement.from_first),
        ),
        log_when=setup.log_when(),
        notes=notes + differing_wordings(config.evaluators, config.data, wording),
    )


def make_checkpointer(config: ConfigDict, workdir: epath.Path, **more: Any) -> Checkpointer:
    """Opens the checkpoints of the run in `workdir`; for the arguments see `Checkpointer`."""
    names = ("keep_last", "keep_every", "asynchronous", "max_failed")
    settings = {name: config.checkpoint[name] for name in names}
    return Checkpointer(workdir, **settings, **more)


def first_state(run: RunComponents, checkpointer: Checkpointer, first_step: int) -> TrainState:
    """Restores the checkpoint at `first_step`, or makes the initial state for step 0."""
    if not first_step:
        return run.start.state(run.setup)
    return checkpointer.restore(run.setup.abstract, first_step)
