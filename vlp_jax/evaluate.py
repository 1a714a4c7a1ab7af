"""Evaluates checkpoints or foreign weights: python -m vlp_jax.evaluate --workdir DIR."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Before anything imports TensorFlow, which reads it then.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from etils import epath

from vlp_jax import config as config_lib
from vlp_jax import signals
from vlp_jax.arguments import make_parser, parse_with_overrides
from vlp_jax.encoders.subject import Subject, find
from vlp_jax.errors import UserError
from vlp_jax.objectives.compute import DTYPES
from vlp_jax.observe.goodput import GOODPUT_FILE, RunTime
from vlp_jax.observe.jsonl import JsonlWriter, read_metrics
from vlp_jax.parallel import agreement, startup
from vlp_jax.report import command as report_command
from vlp_jax.training.command import run_command
from vlp_jax.training.restore import CHOICES, LoadedParameters
from vlp_jax.training.run import Run
from vlp_jax.training.workdir import EVALUATIONS

LOOK_SECONDS = 10.0  # how often --follow looks for a new checkpoint

EPILOG = """examples:
  python -m vlp_jax.evaluate --workdir runs/clip                     the newest checkpoint
  python -m vlp_jax.evaluate --workdir runs/clip --all               every checkpoint that is kept
  python -m vlp_jax.evaluate --workdir runs/clip --follow            each as it appears
  python -m vlp_jax.evaluate --workdir runs/clip --config mine.py    also the evaluators of mine.py
  python -m vlp_jax.evaluate --weights hf:DIR --config configs/X.py  weights of others
  python -m vlp_jax.evaluate --workdir runs/clip --report clip.html  also a page to look at
  python -m vlp_jax.evaluate --workdir runs/a --compare runs/b --report both.html

--all and --follow keep scores in WORKDIR/evaluations.jsonl and leave out what is there already.
"""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command line into arguments and assignments "KEY=VALUE" of --config.KEY=VALUE."""
    told = "Runs the evaluators of a config on checkpoints of a run, or on weights of others."
    parser = make_parser("vlp-jax evaluate", told, epilog=EPILOG)
    _add_subject(parser)
    parser.add_argument(
        "--evaluators", metavar="A,B", help="names in config.evaluators; default: all"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="examples at a time, on all devices; scores do not depend on it",
    )
    parser.add_argument("--output", metavar="FILE", help="also write the scores there, as JSON")
    parser.add_argument(
        "--embeddings",
        metavar="DIR",
        help="also write what the scores are computed from: an .npz for each evaluator, which "
        "python -m tools.compare_scores reads",
    )
    report_command.add_arguments(parser)
    arguments, overrides = parse_with_overrides(parser, argv)
    _check(arguments)
    report_command.check_arguments(arguments)
    return arguments, overrides


def _add_subject(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--step", type=int, metavar="N", help="which checkpoint; default: the newest"
    )
    which.add_argument("--all", action="store_true", help="all checkpoints, in order")
    which.add_argument(
        "--follow", action="store_true", help="all checkpoints, and new ones until the run's end"
    )
    parser.add_argument(
        "--params",
        choices=CHOICES,
        default="auto",
        help="of the checkpoint its parameters, their average (ema), or the average if there is "
        "one (auto, the default)",
    )
    parser.add_argument(
        "--weights",
        metavar="FORMAT:PATH",
        help="instead of a checkpoint: hf:DIR, open_clip:DIR, timm:DIR, big_vision:FILE.npz, ...",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="for weights that come without: .json or .model"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="in which --weights are computed"
    )
    parser.add_argument(
        "--config",
        metavar="FILE[:ARG]",
        help="evaluators of your own: for a run beside its own, for --weights instead of "
        "those of --workdir",
    )
    parser.add_argument(
        "--config.KEY", metavar="VALUE", help="replaces a key: --config.evaluators.NAME.KEY=VALUE"
    )


def _check(arguments: argparse.Namespace) -> None:
    if arguments.embeddings and (arguments.all or arguments.follow):
        raise UserError("--embeddings are of one checkpoint: leave --all and --follow out")
    if arguments.workdir is None and arguments.weights is None:
        raise UserError("say what is evaluated: --workdir DIR, or --weights FORMAT:PATH")
    if arguments.weights is None:
        if arguments.tokenizer is not None:
            raise UserError("--tokenizer belongs to --weights; a run has its own")
        return
    if (arguments.workdir is None) == (arguments.config is None):
        raise UserError(
            "--weights needs evaluators: give --config FILE or --workdir DIR, which have some"
        )
    if arguments.step is not None or arguments.all or arguments.follow:
        raise UserError("--weights are one set of parameters: they have no steps")
    if arguments.params != "auto":
        raise UserError("--weights are one set of parameters: leave --params out")


def open_subject(
    arguments: argparse.Namespace, overrides: Sequence[str], names: Sequence[str] | None
) -> Subject:
    """Opens the run or the weights that the command line names; UserError if they cannot be."""
    if arguments.weights is None:
        return Subject.of_run(
            arguments.workdir,
            further=None if arguments.config is None else config_lib.load(arguments.config),
            overrides=overrides,
            names=names,
            batch_size=arguments.batch_size,
        )
    own = arguments.config is None
    config = Run.open(arguments.workdir).config if own else config_lib.load(arguments.config)
    config_lib.override(config, list(overrides))
    return Subject.of_weights(
        arguments.weights,
        config,
        names=names,
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        tokenizer=arguments.tokenizer,
    )


def load_run(
    workdir: str | os.PathLike, step: int | None = None, choice: str = "auto"
) -> tuple[Subject, LoadedParameters]:
    """Opens a run and loads its parameters at `step` (None: the newest); see `restore.CHOICES`."""
    subject = Subject.of_run(workdir)
    return subject, subject.load(step, choice)


def scores_of(
    subject: Subject, loaded: LoadedParameters, names: Sequence[str] | None = None
) -> dict[str, float]:
    """Runs the evaluators `names` (None for all); returns `eval/NAME/SCORE` -> value."""
    return dict(find(subject, loaded, names).scores)


def evaluate(
    workdir: str | os.PathLike,
    step: int | None = None,
    names: Sequence[str] | None = None,
    choice: str = "auto",
) -> dict[str, float]:
    """Evaluates a run; returns `eval/NAME/SCORE` -> value, and `step`. Raises as `load_run`."""
    subject = Subject.of_run(workdir, names=names)
    loaded = subject.load(step, choice)
    return {"step": float(loaded.step), **scores_of(subject, loaded)}


def known_scores(workdir: epath.Path) -> dict[int, dict[str, float]]:
    """Reads the newest scores of each step from `evaluations.jsonl`."""
    file, by_step = workdir / EVALUATIONS, {}
    for record in read_metrics(file) if file.exists() else ():
        scores = {key: value for key, value in record.items() if key.startswith("eval/")}
        by_step.setdefault(record["step"], {}).update(scores)
    return by_step


def missing(subject: Subject, known: dict[str, float]) -> list[str]:
    """Returns the evaluators without a score among the `known` scores of a checkpoint."""
    scored = {key.split("/")[1] for key in known}
    return [name for name in subject.evaluators if name not in scored]


def checkpoints(subject: Subject, follow: bool, stop: threading.Event) -> Iterator[int]:
    """Yields the steps of checkpoints; with `follow` new ones, until the end or `stop`."""
    seen: set[int] = set()
    waiting, ledger = False, subject.workdir / GOODPUT_FILE

    def is_complete() -> bool:
        return ledger.exists() and RunTime.from_json(ledger.read_text()).ended == "complete"

    while not stop.is_set():
        # Before the list is made: a run that is complete by now has saved its last checkpoint.
        last = not follow or agreement.from_first(is_complete())
        # Process 0's list: processes of a job may see a new checkpoint at different moments.
        new = [s for s in agreement.from_first(subject.run.steps()) if s not in seen]
        for step in new:
            seen.add(step)
            waiting = False
            yield step
            if stop.is_set():
                return
        if last:
            return
        if not waiting:
            _say(f"waiting for checkpoints in {subject.workdir} (Ctrl-C ends this)")
            waiting = True
        stop.wait(LOOK_SECONDS)


def evaluate_many(
    subject: Subject, arguments: argparse.Namespace, stop: threading.Event
) -> dict[str, float]:
    """Evaluates all checkpoints until `stop` is set, keeps the scores; returns the last ones."""
    if not arguments.follow and not subject.run.steps():
        subject.load()  # raises the error that there are none
    writer = None
    if jax.process_index() == 0:
        # Nothing is removed on opening: steps come in any order, and more than once.
        writer = JsonlWriter(subject.workdir / EVALUATIONS, start_step=sys.maxsize)
    last: dict[str, float] = {}
    for step in checkpoints(subject, arguments.follow, stop):
        known = agreement.on_first(lambda: known_scores(subject.workdir).get(step, {}))  # noqa: B023
        names = missing(subject, known)
        scores = dict(known)
        if names:
            begin = time.monotonic()
            try:
                loaded = subject.load(step, arguments.params)
            except (UserError, FileNotFoundError) as error:
                # A run under way removes its old checkpoints while this command computes.
                if step in subject.run.steps():
                    raise
                _say(f"step {step:,} is gone, as the run keeps its newest alone ({error})")
                continue
            new = scores_of(subject, loaded, names)
            if writer is not None:
                writer.write_scalars(step, new)
            scores |= new
            _say(f"step {step:,} evaluated in {time.monotonic() - begin:.0f} s")
        else:
            _say(f"step {step:,} was evaluated before")
        last = {"step": float(step), **scores}
        _print_scores(last)
    if writer is not None:
        writer.close()
    return last


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def _print_scores(scores: dict[str, Any]) -> None:
    for name, value in scores.items():
        short = f"{value:.6g}"  # more digits only if it takes them to read back the same number
        _say(f"{name} {short if float(short) == value else repr(float(value))}")


def run(arguments: argparse.Namespace, overrides: Sequence[str], argv: Sequence[str] = ()) -> None:
    """Runs the command: evaluates, prints the scores, and writes the files it is asked for."""
    names = arguments.evaluators.split(",") if arguments.evaluators else None
    if arguments.compare:
        for line in report_command.compare(arguments, argv):
            _say(line)
        return
    subject = open_subject(arguments, overrides, names)
    for note in subject.notes:
        _say(f"note: {note}")
    report = report_command.PageRequest.prepare(arguments, subject, argv)
    if arguments.all or arguments.follow:
        # Without --follow Ctrl-C ends the command at once, and this event is never set.
        never = contextlib.nullcontext(threading.Event())
        with signals.noted() if arguments.follow else never as stop:
            scores = evaluate_many(subject, arguments, stop)
    else:
        loaded = subject.load(arguments.step, arguments.params)
        steps = {} if subject.workdir is None else {"step": float(loaded.step)}
        findings = find(subject, loaded)
        scores = {**steps, **findings.scores}
        _print_scores(scores)
        if report is not None:
            for line in report.write(subject, loaded, findings):
                _say(line)
        if arguments.embeddings and jax.process_index() == 0:
            for line in findings.save_embeddings(Path(arguments.embeddings)):
                _say(line)
    if arguments.output and jax.process_index() == 0:
        epath.Path(arguments.output).write_text(json.dumps(scores, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit status."""

    def command() -> None:
        typed = sys.argv[1:] if argv is None else argv
        arguments, overrides = parse(typed)
        startup.initialize()
        startup.use_compilation_cache()
        run(arguments, overrides, typed)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
