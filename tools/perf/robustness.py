"""Scores of a trained model under corruptions and attacks.

    python -m tools.perf.robustness --workdir DIR

The run has a `zero_shot` or an `accuracy` evaluator: its data and prompts are taken for the
evaluator `robustness` (docs/downstream.md), which the run's config need not have.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from ml_collections import ConfigDict

from tools.perf import harness
from vlp_jax import evaluate
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.encoders.subject import Subject
from vlp_jax.errors import UserError
from vlp_jax.evaluators import make_evaluators
from vlp_jax.evaluators.corruptions import CORRUPTIONS, SEVERITIES

CLASSIFIERS = ("zero_shot", "accuracy")
TAKEN = ("data", "label_field", "templates", "class_names")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = harness.make_parser("robustness", __doc__)
    add, told = parser.add_argument, "default: %(default)s"
    add("--workdir", metavar="DIR", required=True, help="folder of the run")
    add("--step", type=int, metavar="N", help="which checkpoint (default: the newest)")
    add("--evaluator", metavar="NAME", help="gives the data (default: the first that classifies)")
    add("--images", type=int, default=256, metavar="N", help=f"taken from the first on; {told}")
    add("--severities", type=int, nargs="+", default=SEVERITIES, metavar="S", help=told)
    radii = {"type": float, "nargs": "+", "default": (1, 2, 4, 8), "metavar": "R"}
    add("--radii", help=f"of attacks, on the scale of 0 to 255; {told}", **radii)
    add("--steps", type=int, default=10, metavar="N", help=f"of PGD; {told}")
    return parse_with_overrides(parser, argv, "images", "steps")[0]


def section_of(subject: Subject, name: str | None, arguments: argparse.Namespace) -> ConfigDict:
    """Returns the section of `robustness` on the data of the run's evaluator `name`.

    Raises:
      UserError: the run has no such evaluator, or none that classifies.
    """
    known = subject.config.evaluators
    fitting = [key for key in known if known[key].name in CLASSIFIERS]
    if name is None and fitting:
        name = fitting[0]
    if name not in fitting:
        raise UserError(
            f"--evaluator takes one that classifies ({' or '.join(CLASSIFIERS)}); this run has: "
            f"{', '.join(fitting) or 'none'}"
        )
    section = {key: value for key, value in known[name].items() if key in TAKEN}
    # Each image is seen once for every corruption and severity, and again by attacks.
    section["data"] = {**section["data"].to_dict(), "limit": arguments.images}
    more = {"severities": tuple(arguments.severities), "radii": tuple(arguments.radii)}
    return ConfigDict({"name": "robustness", **section, **more, "steps": arguments.steps})


def table(scores: Mapping[str, float], severities: Sequence[int], radii: Sequence[float]) -> str:
    """Returns the scores in Markdown: a row for each corruption, and one for each attack."""

    def row(name: str, *keys: str) -> list[str]:
        return [name, *(f"{scores[key]:.3f}" for key in keys)]

    corruptions = [row(c, *(f"{c}_{s}" for s in severities), c) for c in CORRUPTIONS]
    attacks = [row(a, *(f"{a}_{radius:g}" for radius in radii)) for a in ("fgsm", "pgd")]
    heads = ("corruption, severity", *map(str, severities), "mean")
    return "\n\n".join(
        [
            f"clean {scores['clean']:.3f} of {scores['examples']:.0f} images; mean under "
            f"corruptions {scores['corruption_mean']:.3f}, {scores['corruption_relative']:.3f} of "
            "it",
            harness.markdown(heads, corruptions),
            harness.markdown(("attack, radius", *(f"{r:g}/255" for r in radii)), attacks),
        ]
    )


def command(argv: list[str]) -> None:
    """Evaluates, prints and writes."""
    arguments = parse(argv)
    harness.start_run()
    subject, loaded = evaluate.load_run(arguments.workdir, arguments.step)
    section = section_of(subject, arguments.evaluator, arguments)
    made = make_evaluators({"robustness": section}, subject.config.data, subject.resources)
    scores = dict(made["robustness"](loaded.params))
    print(table(scores, arguments.severities, arguments.radii))
    harness.write_json(arguments.json, "robustness", argv, scores)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
