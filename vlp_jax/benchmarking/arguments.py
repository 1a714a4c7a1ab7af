"""What benchmarks ask of their arguments before anything is measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlp_jax.errors import UserError


def check_arguments(arguments: argparse.Namespace, *counts: str) -> None:
    """Looks at numbers that may not be below 1, and at where files are to be written.

    Args:
      arguments: of these `json` and `markdown`, as far as there are any, name files.
      counts: names of the numbers, or of lists of them; one that is None is left alone.

    Raises:
      UserError: one is below 1, or there is no such folder.
    """
    for name in counts:
        given = getattr(arguments, name)
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is at least 1, not {value}")
    for name in ("json", "markdown"):
        file = getattr(arguments, name, None)
        if file and not Path(file).absolute().parent.is_dir():
            raise UserError(f"--{name} {file}: its folder does not exist")
