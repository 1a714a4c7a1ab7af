"""Evaluates a run's checkpoint: python -m vlp_jax.evaluate --workdir DIR."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from etils import epath

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.parallel import startup
from vlp_jax.training import checkpoint
from vlp_jax.training import workdir as workdir_lib
from vlp_jax.training.build import Parts, build
from vlp_jax.training.command import run_command
from vlp_jax.training.restore import CHOICES, LoadedParameters, SavedParameters


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m vlp_jax.evaluate",
        description="Runs the evaluators of a run's config on one of its checkpoints.",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", metavar="DIR", required=True, help="folder of the run")
    parser.add_argument(
        "--step", type=int, metavar="N", help="which checkpoint; default: the newest"
    )
    parser.add_argument(
        "--params",
        choices=CHOICES,
        default="auto",
        help="of the checkpoint its parameters, their average (ema), or the average if there is "
        "one (auto, the default)",
    )
    parser.add_argument(
        "--evaluators", metavar="A,B", help="names in config.evaluators; default: all"
    )
    parser.add_argument("--output", metavar="FILE", help="also write the scores there, as JSON")
    return parser.parse_args(argv)


def load_run(
    workdir: str | os.PathLike, step: int | None = None, choice: str = "auto"
) -> tuple[Parts, LoadedParameters]:
    """The parts of the run in `workdir` and its parameters at `step` (default: the newest).

    Of the checkpoint only these are read, onto the mesh of the run's config; nothing is written.

    Args:
      choice: one of `restore.CHOICES`.

    Raises:
      UserError: there is no run, or no such checkpoint or average, in `workdir`.
    """
    workdir = checkpoint.absolute(workdir)
    config = workdir_lib.load_config(workdir)
    saved = SavedParameters.of(workdir, checkpoint.choose_step(workdir, step), choice)
    parts = build(config, workdir, StartupClock())
    return parts, saved.load(parts.setup.abstract.params)


def evaluate(
    workdir: str | os.PathLike,
    step: int | None,
    names: Sequence[str] | None,
    choice: str = "auto",
) -> dict[str, float]:
    """`eval/NAME/SCORE` -> value, and `step`.

    Raises:
      UserError: an evaluator that the run's config does not have, or see `load_run`.
    """
    parts, loaded = load_run(workdir, step, choice)
    evaluators = {e.name: e.evaluator for e in parts.evaluations}
    for name in names or ():
        if name not in evaluators:
            raise UserError(unknown_key_message(name, evaluators, "--evaluators"))
    scores = {"step": float(loaded.step)}
    for name in names or evaluators:
        for score, value in evaluators[name](loaded.params):
            scores[f"eval/{name}/{score}"] = value
    return scores


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        startup.initialize()
        startup.use_compilation_cache()
        names = arguments.evaluators.split(",") if arguments.evaluators else None
        scores = evaluate(arguments.workdir, arguments.step, names, arguments.params)
        for name, value in scores.items():
            print(f"{name} {value:.6g}")
        if arguments.output:
            epath.Path(arguments.output).write_text(json.dumps(scores, indent=2) + "\n")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
