"""The command line of `python -m vlp_jax.train`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence

from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax.arguments import make_parser, parse_with_overrides
from vlp_jax.errors import UserError
from vlp_jax.observe.profiler import parse_steps
from vlp_jax.parallel import startup
from vlp_jax.training.measures import take_profile_flag

_EPILOG = """\
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


def parse(
    argv: Sequence[str], list_keys: Callable[[ConfigDict], Iterable[str]]
) -> tuple[argparse.Namespace, ConfigDict]:
    """Reads the command line of `vlp_jax.train`: arguments, and the config with its overrides.

    `list_keys` gives the lines about the keys of a config that `--help` prints.

    Raises:
      UserError: an argument, a config file or a key that does not exist.
    """
    told = "Pretrains the model of a config and evaluates it along the way."
    parser = make_parser("vlp-jax train", told, epilog=_EPILOG, add_help=False)
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
    _add_job_arguments(parser)
    arguments, overrides = parse_with_overrides(parser, argv)
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
        print(*list_keys(config), sep="\n")
        raise SystemExit(0)
    if not arguments.workdir:
        raise UserError("--workdir is missing; see --help")
    return arguments, config


def _add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments by which the processes of a job find each other."""
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
