"""The command `vlp-jax SUBCOMMAND`, also as `python -m vlp_jax SUBCOMMAND`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from vlp_jax import signals
from vlp_jax.errors import ExitStatus, unknown_key_message

# Subcommand -> its module, and its line in `vlp-jax --help`. A module is imported when it is asked
# for: importing all of them takes seconds.
COMMANDS = {
    "train": ("train", "pretrain the model of a config and evaluate it along the way"),
    "evaluate": ("evaluate", "run evaluators on checkpoints of a run, or on weights of others"),
    "export": ("export", "write a run's model as the library of another project loads it"),
    "serve": ("serve.__main__", "a local page to search images with a trained model"),
    "convert": ("commands.convert", "convert weights from one project's files to another's"),
    "plan": ("commands.plan", "memory, time and cost of a run on devices that are not here"),
    "show-sharding": ("commands.show_sharding", "where each parameter of a config lies on a mesh"),
    "prepare-data": ("commands.prepare_data", "captioned images into shuffled shards, on Beam"),
    "inspect-data": ("commands.inspect_data", "a contact sheet and statistics of a config's data"),
    "train-tokenizer": ("commands.train_tokenizer", "train a tokenizer on captions"),
    "look-inside": ("commands.look_inside", "heat maps, attention and neighbours of an image"),
    "compare-scores": ("commands.compare_scores", "compute scores again by other people's code"),
    "write-evaluation-tars": (
        "commands.write_evaluation_tars",
        "write an evaluator's data as CLIP_benchmark reads it",
    ),
    "clip-benchmark": ("commands.clip_benchmark", "run CLIP_benchmark on a model of ours"),
}


def usage() -> str:
    """Returns the list of subcommands, a line each."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {told}" for name, (_, told) in COMMANDS.items())
    more = "`vlp-jax SUBCOMMAND --help` lists its arguments."
    return f"usage: vlp-jax SUBCOMMAND ...\n\n{lines}\n\n{more}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the subcommand; returns its exit status."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, as in `vlp-jax --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(argv: Sequence[str] | None) -> int:
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        wrong = unknown_key_message(name, COMMANDS, "vlp-jax") if name else usage()
        print(f"error: {wrong}" if name else wrong, file=sys.stderr)
        return int(ExitStatus.MISTAKE)
    if argv is None:
        # Before the import of the command, which takes seconds: Ctrl-C then ends in one line.
        signals.listen()
    return importlib.import_module(f"vlp_jax.{COMMANDS[name][0]}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
