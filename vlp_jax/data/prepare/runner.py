"""Apache Beam: lazy import, flags, quiet logging and readable errors."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from vlp_jax.data.prepare.paths import INSTALL
from vlp_jax.errors import UserError

_OURS = re.compile(r"vlp_jax\.errors\.UserError: ([^\n]*)")
_WHERE = re.compile(r"\s*\[while running [^\]]*\]")


def import_beam() -> ModuleType:
    """Imports Apache Beam, without the notices of parts that are not used.

    Raises:
      UserError: if it is not installed.
    """
    logging.disable(logging.WARNING)
    try:
        import apache_beam
    except ImportError:
        raise UserError(f"Apache Beam is not installed: {INSTALL}") from None
    finally:
        logging.disable(logging.NOTSET)
    # A failure is raised as well as logged, with the traceback in both.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    return apache_beam


def check_flags(flags: Sequence[str]) -> None:
    """Checks that all flags are Beam's, because Beam ignores a misspelt one.

    Raises:
      UserError: naming the first that is not, and what comes near it.
    """
    import_beam()
    from apache_beam.options.pipeline_options import PipelineOptions

    # Beam has no list of all flags; its classes of options add them to a parser.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for options in PipelineOptions.__subclasses__():
        options._add_argparse_args(parser)
    _, unknown = parser.parse_known_args(list(flags))
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"unknown argument {unknown[0]}{hint} (options that only the runner itself knows go "
            "after --)"
        )


def run(build: Callable[[Any], None], flags: Sequence[str]) -> None:
    """Builds a pipeline by `build(pipeline)`, runs it on the runner of `flags`, waits for its end.

    Without a runner, or with DirectRunner, it runs in this process, in as many threads as there are
    CPUs: Beam's own choice may be one that it has to download.

    Raises:
      UserError: for a runner that is not there or lacks a flag, and what a worker raised as such,
        on any runner; anything else is raised as it is.
    """
    beam = import_beam()
    from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    options = PipelineOptions(list(flags))
    runner = options.view_as(StandardOptions).runner
    in_process = runner in (None, "DirectRunner")
    if in_process and not any(flag.startswith("--direct_num_workers") for flag in flags):
        options.view_as(DirectOptions).direct_num_workers = os.cpu_count() or 1
    try:
        pipeline = beam.Pipeline(runner=FnApiRunner() if in_process else runner, options=options)
    except (ValueError, ImportError) as error:
        raise UserError(f"Apache Beam: {' '.join(str(error).split())}") from None
    try:
        build(pipeline)
        pipeline.run().wait_until_finish()
    except Exception as error:
        # In this process Beam keeps the type and adds to the message; elsewhere it is all text.
        found = _OURS.search(str(error))
        if found is None and not isinstance(error, UserError):
            raise
        message = str(error) if found is None else found[1]
        raise UserError(_WHERE.sub("", message).strip()) from None
