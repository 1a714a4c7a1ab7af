"""Command-line arguments that several commands share: a config, its overrides, counts, files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax.errors import UserError

OVERRIDE = "--config."


def make_parser(
    command: str, description: str | None, *, config: bool | None = None, **more: Any
) -> argparse.ArgumentParser:
    """Returns a parser that prints `description` as it is written and takes no abbreviations.

    `config` adds --config and --config.KEY=VALUE; True requires --config, None leaves both out.
    """
    parser = argparse.ArgumentParser(
        prog=command,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **more,
    )
    if config is not None:
        told = "a config: a file, or the name of an installed config, and its argument"
        parser.add_argument("--config", metavar="FILE[:ARG]", required=config, help=told)
        told = "replaces a key of the config: --config.a.b=VALUE"
        parser.add_argument("--config.KEY", metavar="VALUE", help=told)
    return parser


def parse_with_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str], *counts: str
) -> tuple[argparse.Namespace, list[str]]:
    """Returns the checked arguments, and the overrides as "a.b=VALUE"; UserError for others."""
    # argparse would take --config.a=1 for an abbreviation or refuse it: keys are not known to it.
    overrides = [a.removeprefix(OVERRIDE) for a in argv if a.startswith(OVERRIDE)]
    arguments, unknown = parser.parse_known_args([a for a in argv if not a.startswith(OVERRIDE)])
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}; see --help")
    check_arguments(arguments, *counts)
    return arguments, overrides


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads the config that --config names, with its overrides applied and checked."""
    config = config_lib.load(spec)
    config_lib.override(config, list(overrides))
    config_lib.check(config)
    return config


def check_arguments(arguments: argparse.Namespace, *counts: str) -> None:
    """Checks numbers that must be at least 1, and that the folder of `arguments.json` exists.

    `counts` names numbers, or lists of numbers; None is left alone.

    Raises:
      UserError: a number is below 1, or the folder of the file does not exist.
    """
    for name in counts:
        given = getattr(arguments, name)
        for value in given if isinstance(given, list | tuple) else [given]:
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    file = getattr(arguments, "json", None)
    if file and not Path(file).absolute().parent.is_dir():
        raise UserError(f"--json {file}: its folder does not exist")
