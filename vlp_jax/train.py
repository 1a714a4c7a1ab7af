"""Trains what a config describes: python -m vlp_jax.train --config FILE --workdir DIR.

In Python: `train(vlp_jax.config.load("configs/demo.py"), "runs/demo")`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from etils import epath
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax import config_help
from vlp_jax.encoders import source_model
from vlp_jax.errors import UserError
from vlp_jax.observe.profiler import parse_steps
from vlp_jax.observe.progress import NullProgress, Progress
from vlp_jax.observe.throughput import StartupClock, StepClock, peak_flops
from vlp_jax.observe.watchdog import NullWatchdog, Watchdog
from vlp_jax.observe.writers import Writer, build_writers, check_writers
from vlp_jax.parallel import agreement, startup
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.batch import Prefetcher
from vlp_jax.parallel.sharding_report import spread
from vlp_jax.training import checkpoint, param_groups
from vlp_jax.training import workdir as workdir_lib
from vlp_jax.training.build import Parts, build, first_state, make_checkpointer
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.checkpoint_files import check_path
from vlp_jax.training.command import run_command
from vlp_jax.training.lock import locked
from vlp_jax.training.loop import Loop
from vlp_jax.training.measures import Measures, profile_steps, take_profile_flag
from vlp_jax.training.optimizer import learning_rate_jumps
from vlp_jax.training.phases import Phases, begin_phase, compile_phases, describe_losses
from vlp_jax.training.preemption import PreemptionWatch
from vlp_jax.training.report import StepReport
from vlp_jax.training.setup import Setup, check_dispatch
from vlp_jax.training.state import TrainState

Path = str | os.PathLike[str]
EPILOG = """\
examples:
  python -m vlp_jax.train --config configs/demo.py --workdir runs/demo
  python -m vlp_jax.train --config configs/clip_folder.py --workdir runs/mine --config.data.path=DIR
  python -m vlp_jax.train --config configs/demo.py --help        lists every key of that config
  python -m vlp_jax.train --config configs/demo.py --workdir runs/new --config.init_from.source=DIR
      starts from the weights of the run in DIR, or of hf:DIR, open_clip:FILE, big_vision:FILE.npz
      or timm:FILE; config.init_from.rules say which
  python -m vlp_jax.train --config configs/finetune.py --workdir runs/new \\
      --config.init_from.source=hf:DIR --config.data.path=DIR
      goes on with the model, tokenizer and preprocessing of published weights

Run the same command again to resume. Exit status (the last line of stderr says more):
   0  the run is complete
   2  a mistake in config, data or workdir; starting again does not help, all else is worth it:
  65  losses or gradients were not finite, several steps in a row
  70  no sign of life: ended by the watchdog, which has written where each thread was
  74  checkpoints could not be written
  75  told to stop (SIGTERM, Ctrl-C, a maintenance notice), and saved what it had trained
  76  another process of the job was lost
The scripts in launch/ start a run again accordingly.
"""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """The arguments, and the config with its overrides.

    Raises:
      UserError: an argument, a config file or a key that does not exist.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vlp_jax.train",
        description="Pretrains the model of a config and evaluates it along the way.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--help", "-h", action="store_true", help="this text; with --config, its keys"
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help="a config file, and its argument")
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run; may be gs://...")
    parser.add_argument(
        "--config.KEY",
        metavar="VALUE",
        help="replaces a key, or gives a part an argument: --config.a.b=VALUE, a Python literal "
        "(docs/configs.md)",
    )
    parser.add_argument(
        "--profile", metavar="FIRST:LAST", type=parse_steps, help="traces these steps"
    )
    add_job_arguments(parser)
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    arguments, unknown = parser.parse_known_args([a for a in argv if not a.startswith("--config.")])
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}; see --help")
    if arguments.help:
        parser.print_help()
    if not arguments.config:
        if arguments.help:
            raise SystemExit(0)
        raise UserError("--config is missing; see --help")
    config = config_lib.load(arguments.config)
    config_lib.override(config, overrides)
    take_profile_flag(config, arguments.profile)
    config_lib.check(config)
    if arguments.help:
        print(f"\nkeys of {arguments.config}, with the values that they have:")
        print(*config_help.keys(config), sep="\n")
        raise SystemExit(0)
    if not arguments.workdir:
        raise UserError("--workdir is missing; see --help")
    return arguments, config


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that say how the processes of a job find each other."""
    several = parser.add_argument_group(
        "several processes (give the first three; without, SLURM, Cloud TPU and GKE are asked)"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--processes", type=int, metavar="N", help="how many take part")
    several.add_argument("--process-id", type=int, metavar="I", help="which one this is")
    several.add_argument(
        "--expect-processes",
        type=int,
        metavar="N",
        help="fail if the job has another number, however it was found",
    )
    several.add_argument(
        "--join-seconds",
        type=float,
        default=startup.JOIN_SECONDS,
        metavar="S",
        help="how long to wait for process 0 (default: %(default)g)",
    )


def train(
    config: ConfigDict, workdir: Path, clock: StartupClock | None = None, job: str = startup.ALONE
) -> TrainState:
    """Trains, from the newest checkpoint in `workdir` if there is one; returns the last state.

    Args:
      clock: has counted since the process began; None begins now.
      job: how the processes found each other, for the log.

    Raises:
      UserError: a mistake in config, data or workdir, or a kind of it that `Loop.run` raises.
    """
    workdir, clock = epath.Path(workdir), clock or StartupClock()
    config = with_model(config, workdir)
    check_before_start(config, workdir)
    with contextlib.ExitStack() as stack:
        preempted = stack.enter_context(PreemptionWatch())
        watchdog = stack.enter_context(make_watchdog(config, workdir))
        parts = build(config, workdir, clock)
        setup = parts.setup
        last_step = setup.units.total_steps
        progress = stack.enter_context(make_progress(last_step, workdir.name))
        stack.enter_context(locked(workdir))
        measures = stack.enter_context(Measures(config, workdir, clock, progress))
        with clock.phase("check the checkpoints"):
            opened = make_checkpointer(config, workdir, tell=progress.print)
            checkpointer = stack.enter_context(opened)
        first_step = find_first_step(parts, checkpointer)
        begin(parts, workdir, job, first_step, progress.print)
        measures.begin(first_step, last_step)
        with clock.phase("compile the step"), measures.compiling_step():
            programs = compile_phases(setup, first_step)
        with clock.phase("restore the state" if first_step else "initialize the state"):
            state = first_state(parts, checkpointer, first_step)
        writer = stack.enter_context(open_writers(config, workdir, first_step))
        step_clock = measures.use(make_step_clock(setup, clock))
        loop = Loop(
            program_of=Phases(programs, begin_phase(setup, step_clock, progress.print)),
            batches=stack.enter_context(make_prefetcher(parts, first_step)),
            input_state=parts.input_state.save,
            first_step=first_step,
            last_step=last_step,
            save_when=parts.save_when,
            evaluations=parts.evaluations,
            one_evaluation=parts.resources.one_evaluation,
            preempted=preempted.begin(),
            interruptible=preempted.interruptible,
            log_when=parts.log_when,
            report=make_report(parts, workdir, writer, progress, step_clock, clock, measures),
            checkpointer=checkpointer,
            writer=writer,
            progress=progress,
            clock=step_clock,
            profiler=stack.enter_context(measures.profiler()),
            watchdog=watchdog,
            measures=measures,
            steps_ahead=parts.steps_ahead(first_step),
        )
        with measures.training():
            return loop.run(state)


def with_model(config: ConfigDict, workdir: epath.Path) -> ConfigDict:
    """`config` with the model of its source if it asks for it; tells what is not taken over."""
    config, notes = source_model.completed(config, workdir)
    for note in notes if jax.process_index() == 0 else ():
        print(f"note: {note}", flush=True)
    return config


def open_writers(
    config: ConfigDict, workdir: epath.Path, first_step: int
) -> contextlib.closing[Writer]:
    """Where metrics go; closed on leaving."""
    writers = build_writers(config.writers, workdir, first_step, config.to_dict())
    return contextlib.closing(writers)


def make_report(
    parts: Parts,
    workdir: epath.Path,
    writer: Writer,
    progress: Progress | NullProgress,
    step_clock: StepClock,
    clock: StartupClock,
    measures: Measures,
) -> StepReport:
    """What is told of each step."""
    return StepReport(
        log_when=parts.log_when,
        batch_size=parts.setup.config.batch_size,
        writer=writer,
        progress=progress,
        clock=step_clock,
        startup=clock,
        input_metrics=parts.input_state.metrics,
        measures=measures,
        max_skipped=parts.setup.config.guard.max_skipped,
        keep_examples=functools.partial(parts.input_state.write_examples, workdir),
    )


def make_prefetcher(parts: Parts, first_step: int) -> Prefetcher:
    """The batches from `first_step` on, on their way to the devices."""
    batches = parts.pipeline.batches(first_step)
    return Prefetcher(batches, parts.setup.mesh, parts.setup.config.prefetch)


def find_first_step(parts: Parts, checkpointer: Checkpointer) -> int:
    """The step of the newest checkpoint; 0 if there is none.

    Raises:
      UserError: it is of another model, another batch size or other data, or beyond the end.
    """
    step, last = checkpointer.check_fits(parts.setup.abstract), parts.setup.units.total_steps
    if step > last:
        raise UserError(
            f"the newest checkpoint is of step {step:,}, and config.duration is {last:,} steps: "
            "give a longer one, or another workdir"
        )
    if step:
        parts.input_state.resume(checkpointer.input_state(step), step)
    return step


def check_before_start(config: ConfigDict, workdir: epath.Path) -> None:
    """Raises UserError for what can be seen to be wrong without building anything."""
    config_lib.check(config)
    check_path(checkpoint.absolute(workdir))
    workdir_lib.check_writable(workdir)
    check_writers(config.writers)
    profile_steps(config)
    check_dispatch(config)


def begin(
    parts: Parts, workdir: epath.Path, job: str, first_step: int, tell: Callable[[str], None]
) -> None:
    """Writes config and tokenizer, and tells what has changed, who takes part and how."""
    config = parts.setup.config
    # On the first process alone, which is about to write that file.
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
    for phase in parts.setup.phases[1:]:
        tell(f"from step {phase:,} on the loss is that of {describe_losses(parts.setup, phase)}")


def changed(setup: Setup, workdir: epath.Path, first_step: int) -> Iterator[str]:
    """Lines on what is another config than before, and on learning rates that leap by it."""
    changes = list(workdir_lib.changes(workdir, setup.config))
    yield from (f"note: {change}" for change in changes)
    if changes and first_step:
        before = workdir_lib.load_config(workdir)
        params = setup.abstract.params
        yield from learning_rate_jumps(before, setup.config, setup.units, first_step, params)


def describe_run(setup: Setup, first_step: int) -> str:
    """One line for the log: the size of the model and of its state, and the steps ahead."""
    size, frozen = param_groups.count(setup.abstract.params, setup.config.optimizer.frozen)
    last_step, batch_size = setup.units.total_steps, setup.config.batch_size
    steps = f"steps {first_step:,} to {last_step:,} of {batch_size:,} examples"
    state = spread(setup.abstract, setup.mesh)
    part = (
        f"{state.per_device / 2**20:,.1f} MiB of state a device, {state.ratio:.2f} of an even part"
    )
    return f"{size:,} parameters, of which {frozen:,} frozen; {steps}; {part}"


def make_progress(last_step: int, name: str) -> Progress | NullProgress:
    """The live line, on the first process alone."""
    return Progress(last_step, name) if jax.process_index() == 0 else NullProgress()


def make_watchdog(config: ConfigDict, workdir: epath.Path) -> Watchdog | NullWatchdog:
    """Ends this process when it hangs, after the limits of `config.watchdog`.

    Raises:
      UserError: only some of the limits are 0.
    """
    limits = config.watchdog
    step_minutes = limits.step_minutes * config.steps_per_dispatch
    minutes = (limits.first_step_minutes, step_minutes, limits.pause_minutes)
    if not any(minutes):
        return NullWatchdog()
    if not all(minute > 0 for minute in minutes):
        raise UserError("config.watchdog: the limits in minutes are above 0, or all of them 0")
    return Watchdog(*(60 * minute for minute in minutes), directory=workdir / "stacks")


def make_step_clock(setup: Setup, clock: StartupClock) -> StepClock:
    """Examples per second, MFU and goodput, against the peak of the devices at hand."""
    measure = functools.partial(
        peak_flops, setup.mesh.local_devices[0], setup.objective.compute_dtype
    )
    with clock.phase("measure the devices"):
        peak = measure()
    return StepClock(
        forward_flops_per_example=setup.forward_flops / setup.config.batch_size,
        peak=peak,
        device_count=setup.mesh.size,
        measure=measure,
        before=clock.causes(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    clock = StartupClock.from_process_start("python and imports")

    def command() -> None:
        arguments, config = parse(sys.argv[1:] if argv is None else argv)
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
