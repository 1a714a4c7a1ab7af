"""How a trained model stands corruptions and attacks: python -m tools.robustness --workdir DIR.

Of a run with a `zero_shot` or an `accuracy` evaluator: its data and prompts are taken for
`robustness` (docs/downstream.md), which the run's config need not have.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from ml_collections import ConfigDict

from vlp_jax import evaluate
from vlp_jax.encoders.subject import Subject
from vlp_jax.errors import UserError
from vlp_jax.evaluators import make_evaluators
from vlp_jax.evaluators.corruptions import CORRUPTIONS, SEVERITIES
from vlp_jax.parallel import startup
from vlp_jax.training.command import run_command

CLASSIFIERS = ("zero_shot", "accuracy")
TAKEN = ("data", "label_field", "templates", "class_names")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.robustness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", metavar="DIR", required=True, help="folder of the run")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint; default: newest")
    parser.add_argument(
        "--evaluator", metavar="NAME", help="whose data; default: the first that classifies"
    )
    parser.add_argument(
        "--images", type=int, default=256, metavar="N", help="how many, from the first (256)"
    )
    parser.add_argument(
        "--severities", type=int, nargs="+", default=SEVERITIES, metavar="S", help="1 to 5; all"
    )
    parser.add_argument(
        "--radii",
        type=float,
        nargs="+",
        default=(1, 2, 4, 8),
        metavar="R",
        help="of attacks, on the scale of 0 to 255 (1 2 4 8)",
    )
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="of PGD (10)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the scores as JSON")
    return parser.parse_args(argv)


def section_of(subject: Subject, name: str | None, arguments: argparse.Namespace) -> ConfigDict:
    """The section of `robustness` on the data of the run's evaluator `name`.

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
    section["data"] = {**section["data"].to_dict(), "limit": arguments.images}
    more = {"severities": tuple(arguments.severities), "radii": tuple(arguments.radii)}
    return ConfigDict({"name": "robustness", **section, **more, "steps": arguments.steps})


def table(scores: Mapping[str, float], severities: Sequence[int], radii: Sequence[float]) -> str:
    """The scores in Markdown: a row for each corruption, and one for each attack."""
    lines = [
        f"clean {scores['clean']:.3f} of {scores['examples']:.0f} images; mean under corruptions "
        f"{scores['corruption_mean']:.3f}, {scores['corruption_relative']:.3f} of it",
        "",
        "| corruption, severity | " + " | ".join(str(s) for s in severities) + " | mean |",
        "|---|" + "---:|" * (len(severities) + 1),
    ]
    for name in CORRUPTIONS:
        values = [scores[f"{name}_{severity}"] for severity in severities] + [scores[name]]
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    lines += ["", "| attack, radius | " + " | ".join(f"{r:g}/255" for r in radii) + " |"]
    lines.append("|---|" + "---:|" * len(radii))
    for attack in ("fgsm", "pgd"):
        values = (scores[f"{attack}_{radius:g}"] for radius in radii)
        lines.append(f"| {attack} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        startup.initialize()
        startup.use_compilation_cache()
        subject, loaded = evaluate.load_run(arguments.workdir, arguments.step)
        section = section_of(subject, arguments.evaluator, arguments)
        made = make_evaluators({"robustness": section}, subject.config.data, subject.resources)
        scores = dict(made["robustness"](loaded.params))
        print(table(scores, arguments.severities, arguments.radii))
        if arguments.output:
            arguments.output.write_text(json.dumps(scores, indent=2) + "\n")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
