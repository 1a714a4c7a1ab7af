"""The part of `python -m vlp_jax.evaluate` that writes pages.

Matplotlib and jinja2 are imported when a page is asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from vlp_jax.encoders.subject import Findings, Subject
from vlp_jax.errors import UserError
from vlp_jax.training.restore import LoadedParameters

if TYPE_CHECKING:
    from vlp_jax.report.run_record import Baseline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --report, --baseline and --compare."""
    add = parser.add_argument
    add("--report", metavar="FILE.html", help="also write a page to look at")
    told = 'what the page compares with: another run, or numbers as {"zero_shot/top1": 0.9}'
    add("--baseline", metavar="DIR|FILE.json", help=told)
    told = "evaluate nothing: the page shows --workdir and these runs side by side, from what they "
    add("--compare", nargs="+", metavar="DIR", help=told + "have written")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises UserError for arguments that exclude or need each other."""
    if arguments.report is None:
        for name in ("baseline", "compare"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name} belongs to a page: add --report FILE.html")
        return
    # These evaluate many checkpoints, and a page shows one.
    if arguments.all or arguments.follow:
        raise UserError("--report is of one checkpoint: leave --all and --follow out")
    if arguments.compare is None:
        return
    if arguments.workdir is None:
        raise UserError("--compare needs --workdir DIR, the first of the runs")
    evaluating = ("weights", "step", "evaluators", "batch_size", "output", "embeddings")
    for name in (*evaluating, "baseline"):
        if getattr(arguments, name) is not None:
            raise UserError(f"--compare evaluates nothing: leave --{name.replace('_', '-')} out")


def compare(arguments: argparse.Namespace, argv: Sequence[str]) -> list[str]:
    """Writes the page of several runs on process 0; returns lines for the user, or a UserError."""
    from vlp_jax.report.comparison import write_comparison

    if jax.process_index() != 0:
        return []
    return write_comparison(arguments.report, [arguments.workdir, *arguments.compare], argv)


@dataclasses.dataclass(frozen=True)
class PageRequest:
    """A page that is to be written, its baseline if any, and the command line for its footer."""

    path: str
    baseline: Baseline | None
    argv: Sequence[str]

    @classmethod
    def prepare(
        cls, arguments: argparse.Namespace, subject: Subject, argv: Sequence[str]
    ) -> PageRequest | None:
        """Checks the arguments before anything is computed; None if no page is asked for."""
        if arguments.report is None:
            return None
        # Here and not above: a command without a page need not have jinja2 and matplotlib.
        from vlp_jax.report.page import check_output
        from vlp_jax.report.run_record import read_baseline

        check_output(arguments.report)
        baseline = None
        if arguments.baseline is not None:
            baseline = read_baseline(arguments.baseline, list(subject.config.evaluators))
        return cls(arguments.report, baseline, argv)

    def write(self, subject: Subject, loaded: LoadedParameters, findings: Findings) -> list[str]:
        """Writes the page and returns lines for the user; every process must call it."""
        from vlp_jax.report.material import collect
        from vlp_jax.report.report import write_report

        material = collect(subject, loaded, findings)
        if jax.process_index() != 0:  # after `collect`, which computes on all processes
            return []
        return write_report(
            self.path, subject, loaded, material, baseline=self.baseline, command=self.argv
        )
