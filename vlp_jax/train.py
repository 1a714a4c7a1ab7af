"""Trains what a config describes: python -m vlp_jax.train --config FILE --workdir DIR.

In Python: `train(vlp_jax.config.load("configs/demo.py"), "runs/demo")`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

# Before anything imports TensorFlow, which reads it then.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from etils import epath
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax import config_help
from vlp_jax.encoders import source_model
from vlp_jax.errors import UserError
from vlp_jax.observe.progress import NullProgress, Progress
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.observe.writers import build_writers, check_writers
from vlp_jax.parallel import agreement, startup
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.batch import Prefetcher
from vlp_jax.parallel.rules import spread
from vlp_jax.training import checkpoint, param_groups
from vlp_jax.training import workdir as workdir_lib
from vlp_jax.training.arguments import parse
from vlp_jax.training.build import RunComponents, build, first_state, make_checkpointer
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.checkpoint_files import check_path
from vlp_jax.training.command import run_command
from vlp_jax.training.measures import Measures, profile_steps
from vlp_jax.training.monitor import Monitor, make_step_clock, make_watchdog
from vlp_jax.training.optimizer import learning_rate_jumps
from vlp_jax.training.preemption import PreemptionWatch
from vlp_jax.training.setup import Phases, Setup, check_dispatch, compile_phases
from vlp_jax.training.state import TrainState

Path = str | os.PathLike[str]


def train(
    config: ConfigDict, workdir: Path, clock: StartupClock | None = None, job: str = startup.ALONE
) -> TrainState:
    """Trains from the newest checkpoint in `workdir`, or from the start; returns the last state.

    `clock` counts since the process began; `job` says how the processes found each other.

    Raises:
      UserError: a mistake in config, data or workdir; `Loop.run` raises further kinds.
    """
    workdir, clock = epath.Path(workdir), clock or StartupClock()
    config = prepare_config(config, workdir)
    with contextlib.ExitStack() as stack:
        # First what must outlive the rest: a signal, or a hang, may come at any time.
        preempted = stack.enter_context(PreemptionWatch())
        watchdog = stack.enter_context(make_watchdog(config, workdir))
        parts = build(config, workdir, clock)
        setup, last_step = parts.setup, parts.setup.units.total_steps
        is_first = jax.process_index() == 0
        progress = Progress(last_step, workdir.name) if is_first else NullProgress()
        stack.enter_context(progress)
        tell = progress.print
        # Nothing was written up to here, so a mistake leaves no trace in the workdir.
        stack.enter_context(workdir_lib.locked(workdir))
        measures = stack.enter_context(Measures(config, workdir, clock, progress))
        with clock.phase("check the checkpoints"):
            checkpointer = stack.enter_context(make_checkpointer(config, workdir, tell=tell))
        first_step = find_first_step(parts, checkpointer)
        begin(parts, workdir, job, first_step, tell)
        measures.begin(first_step, last_step)
        # Before the state is made: a step that does not fit then fails with its devices empty.
        with clock.phase("compile the step"), measures.compiling_step():
            programs = compile_phases(setup, first_step)
        with clock.phase("restore the state" if first_step else "initialize the state"):
            state = first_state(parts, checkpointer, first_step)
        # After the restore: opening a writer removes the records of later steps.
        writers = build_writers(config.writers, workdir, first_step, config.to_dict())
        writer = stack.enter_context(contextlib.closing(writers))
        step_clock = measures.use(make_step_clock(setup, clock))
        batches = Prefetcher(parts.pipeline.batches(first_step), setup.mesh, config.prefetch)
        loop = parts.loop(
            first_step,
            program_of=Phases(setup, programs, step_clock, tell),
            batches=stack.enter_context(batches),
            preempted=preempted.begin(),
            interruptible=preempted.interruptible,
            checkpointer=checkpointer,
            monitor=Monitor(
                **parts.monitoring(workdir),
                writer=writer,
                progress=progress,
                clock=step_clock,
                startup=clock,
                measures=measures,
                profiler=stack.enter_context(measures.profiler()),
                watchdog=watchdog,
            ),
        )
        with measures.training():
            return loop.run(state)


def find_first_step(parts: RunComponents, checkpointer: Checkpointer) -> int:
    """Returns the step of the newest checkpoint, 0 without one; UserError if it does not fit."""
    step, last = checkpointer.check_fits(parts.setup.abstract), parts.setup.units.total_steps
    if step > last:
        raise UserError(
            f"the newest checkpoint is of step {step:,}, and config.duration is {last:,} steps: "
            "give a longer one, or another workdir"
        )
    if step:
        parts.input_state.resume(checkpointer.input_state(step), step)
    return step


def prepare_config(config: ConfigDict, workdir: epath.Path) -> ConfigDict:
    """Completes a copy of the config, also from its source of weights; UserError for mistakes."""
    config = config.copy_and_resolve_references()
    config_lib.complete(config)  # one that comes straight from `get_config` is not complete
    config, notes = source_model.completed(config.lock(), workdir)
    for note in notes if jax.process_index() == 0 else ():
        print(f"note: {note}", flush=True)
    config_lib.check(config)
    check_path(checkpoint.absolute(workdir))
    workdir_lib.check_writable(workdir)
    check_writers(config.writers)
    profile_steps(config)
    check_dispatch(config)
    return config


def begin(
    parts: RunComponents,
    workdir: epath.Path,
    job: str,
    first_step: int,
    tell: Callable[[str], None],
) -> None:
    """Writes config and tokenizer, and tells what changed, who takes part and on which mesh."""
    config = parts.setup.config
    # The first process alone compares: it is about to overwrite the file that it reads.
    for line in agreement.on_first(lambda: list(changed(parts.setup, workdir, first_step))):
        tell(line)
    workdir_lib.prepare(workdir, config, parts.tokenizer)
    for note in parts.notes:
        tell(f"note: {note}")
    parts.start.announce(workdir, tell)
    processes = startup.describe_processes(job)
    if processes:
        tell(processes)
    tell(mesh_lib.describe(parts.setup.mesh))
    tell(describe_run(parts.setup, first_step))
    for phase in parts.setup.phases[1:]:  # the first begins with the run
        tell(f"from step {phase:,} on the loss is {parts.setup.losses_of(phase)}")


def changed(setup: Setup, workdir: epath.Path, first_step: int) -> Iterator[str]:
    """Yields lines on changed keys of the config, and on learning rates that leap by them."""
    changes = list(workdir_lib.changes(workdir, setup.config))
    yield from (f"note: {change}" for change in changes)
    if changes and first_step:  # a new run has no learning rate to leap from
        before = workdir_lib.load_config(workdir)
        params = setup.abstract.params
        yield from learning_rate_jumps(before, setup.config, setup.units, first_step, params)


def describe_run(setup: Setup, first_step: int) -> str:
    """Returns a line for the log: sizes of model and state, and the steps that are left."""
    size, frozen = param_groups.count(setup.abstract.params, setup.config.optimizer.frozen)
    last_step, batch_size = setup.units.total_steps, setup.config.batch_size
    steps = f"steps {first_step:,} to {last_step:,} of {batch_size:,} examples"
    state = spread(setup.abstract, setup.mesh)
    part = (
        f"{state.per_device / 2**20:,.1f} MiB of state a device, {state.ratio:.2f} of an even part"
    )
    return f"{size:,} parameters, of which {frozen:,} frozen; {steps}; {part}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    clock = StartupClock.from_process_start("python and imports")

    def command() -> None:
        arguments, config = parse(sys.argv[1:] if argv is None else argv, config_help.keys)
        with clock.phase("find the devices"):
            job = startup.initialize(
                arguments.coordinator,
                arguments.processes,
                arguments.process_id,
                expected=arguments.expect_processes,
                heartbeat_seconds=config.watchdog.heartbeat_seconds,
                join_seconds=arguments.join_seconds,
            )
            startup.use_compilation_cache()
        train(config, arguments.workdir, clock, job)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
