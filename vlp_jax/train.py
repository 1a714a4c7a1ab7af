"""Trains what a config describes: python -m vlp_jax.train --config FILE --workdir DIR."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import textwrap
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from etils import epath
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax.errors import UserError
from vlp_jax.observe.profiler import NullProfiler, Profiler
from vlp_jax.observe.progress import NullProgress, Progress
from vlp_jax.observe.throughput import StartupClock, StepClock, peak_flops
from vlp_jax.observe.writers import build_writers, check_writers
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import startup
from vlp_jax.parallel.batch import Prefetcher
from vlp_jax.parallel.sharding_report import spread
from vlp_jax.training import param_groups
from vlp_jax.training import workdir as workdir_lib
from vlp_jax.training.build import Parts, build, first_state, make_checkpointer
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.command import run_command
from vlp_jax.training.loop import Loop
from vlp_jax.training.preemption import PreemptionWatch
from vlp_jax.training.report import StepReport
from vlp_jax.training.setup import Setup
from vlp_jax.training.state import TrainState
from vlp_jax.training.step import compile_step

LONGEST_VALUE = 200  # characters of a value that --help prints
EPILOG = """\
examples:
  python -m vlp_jax.train --config configs/demo.py --workdir runs/demo
  python -m vlp_jax.train --config configs/clip_folder.py --workdir runs/mine --config.data.path=DIR
  python -m vlp_jax.train --config configs/demo.py --help        lists every key of that config
  python -m vlp_jax.train --config configs/demo.py --workdir runs/new --config.init_from.source=DIR
      starts from the weights of the run in DIR, or of hf:DIR, open_clip:FILE, big_vision:FILE.npz
      or timm:FILE; config.init_from.rules say which

Run the same command again to resume. Exit status: 0 the run is complete, 2 a mistake in config,
data or workdir (the last line of stderr says which), 75 told to stop and saved: start it again.
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
    parser.add_argument("--config.KEY", metavar="VALUE", help="replaces a key: --config.a.b=VALUE")
    several = parser.add_argument_group("several processes (give all three)")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--processes", type=int, metavar="N", help="how many take part")
    several.add_argument("--process-id", type=int, metavar="I", help="which one this is")
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
    config_lib.check(config)
    if arguments.help:
        print(f"\nkeys of {arguments.config}:")
        for key, value in config_lib.flatten(config):
            print(f"  --config.{key}={textwrap.shorten(str(value), LONGEST_VALUE)}")
        raise SystemExit(0)
    if not arguments.workdir:
        raise UserError("--workdir is missing; see --help")
    return arguments, config


def train(config: ConfigDict, workdir: str | os.PathLike, clock: StartupClock) -> TrainState:
    """Trains, from the newest checkpoint in `workdir` if there is one; returns the last state.

    Raises:
      UserError: a mistake in config, data or workdir, or a loss that is not finite.
      Preempted: told to stop; the state is saved.
    """
    workdir = epath.Path(workdir)
    workdir_lib.check_writable(workdir)
    check_writers(config.writers)
    profiler = make_profiler(config, workdir)
    parts = build(config, workdir, clock)
    setup, last_step = parts.setup, parts.setup.units.total_steps
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(make_progress(last_step, workdir.name))
        checkpointer = stack.enter_context(make_checkpointer(config, workdir))
        first_step = find_first_step(parts, checkpointer)
        for change in workdir_lib.changes(workdir, config):
            progress.print(f"note: {change}")
        workdir_lib.prepare(workdir, config, parts.tokenizer)
        parts.start.announce(workdir, progress.print)
        progress.print(mesh_lib.describe(setup.mesh))
        with clock.phase("compile the step"):
            step_function = compile_step(setup.step, setup.abstract, setup.batch_spec, setup.mesh)
        with clock.phase("restore the state" if first_step else "initialize the state"):
            state = first_state(parts, checkpointer, first_step)
        progress.print(describe_run(setup, first_step))
        with clock.phase("measure the devices"):
            step_clock = make_step_clock(setup, clock)
        writer = build_writers(config.writers, workdir, first_step, config.to_dict())
        stack.callback(writer.close)
        prefetcher = Prefetcher(parts.pipeline.batches(first_step), setup.mesh, config.prefetch)
        loop = Loop(
            step_function=step_function,
            batches=stack.enter_context(prefetcher),
            input_state=parts.input_state.save,
            first_step=first_step,
            last_step=last_step,
            save_when=parts.save_when,
            evaluations=parts.evaluations,
            preempted=stack.enter_context(PreemptionWatch()),
            report=StepReport(
                log_when=parts.log_when,
                batch_size=config.batch_size,
                writer=writer,
                progress=progress,
                clock=step_clock,
                startup=clock,
                input_metrics=parts.input_state.metrics,
            ),
            checkpointer=checkpointer,
            writer=writer,
            progress=progress,
            clock=step_clock,
            profiler=stack.enter_context(profiler),
        )
        state = loop.run(state)
        checkpointer.wait()
        progress.print(step_clock.goodput_line())
    return state


def find_first_step(parts: Parts, checkpointer: Checkpointer) -> int:
    """The step of the newest checkpoint; 0 if there is none.

    Raises:
      UserError: it is of another model, another batch size or other data.
    """
    step = checkpointer.check_fits(parts.setup.abstract)
    if step:
        parts.input_state.resume(checkpointer.input_state(step), step)
    return step


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


def make_profiler(config: ConfigDict, workdir: epath.Path) -> Profiler | NullProfiler:
    """Traces the steps of `config.profile`, if it names any.

    Raises:
      UserError: only one of `first` and `last` is set, or they are the wrong way round.
    """
    first, last = config.profile.first, config.profile.last
    if first is None and last is None:
        return NullProfiler()
    if first is None or last is None:
        raise UserError("config.profile needs both first and last")
    return Profiler(first, last, workdir / "profile")


def make_step_clock(setup: Setup, clock: StartupClock) -> StepClock:
    """Examples per second, MFU and goodput, against the peak of the devices at hand."""
    device = setup.mesh.devices.flat[0]
    dtype = setup.objective.compute_dtype
    return StepClock(
        forward_flops_per_example=setup.objective.flops_per_example(setup.batch_spec),
        peak_flops_per_device=peak_flops(device, dtype).flops,
        device_count=setup.mesh.size,
        startup_seconds=clock.total(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    clock = StartupClock.from_process_start("python and imports")

    def command() -> None:
        arguments, config = parse(sys.argv[1:] if argv is None else argv)
        with clock.phase("find the devices"):
            startup.initialize(arguments.coordinator, arguments.processes, arguments.process_id)
            startup.use_compilation_cache()
        train(config, arguments.workdir, clock)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
