"""Computes the scores of an evaluation again, from its embeddings and by other people's code.

    vlp-jax compare-scores --embeddings DIR [--scores FILE]

DIR holds what `save_embeddings` wrote, one .npz an evaluator. NumPy in float64, scikit-learn, SciPy
and, if it is installed, CLIP_benchmark compute the scores; nothing of vlp_jax's evaluators is
imported. FILE is what `python -m vlp_jax.evaluate --output FILE` wrote; without it the scores in
the .npz are compared. The exit status is 1 if any differs by more than 1e-6.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from vlp_jax.arguments import make_parser
from vlp_jax.commands.independent_scores import KINDS
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.files import read_text

TOLERANCE = 1e-6


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = make_parser("vlp-jax compare-scores", __doc__)
    parser.add_argument("--embeddings", type=Path, metavar="DIR", required=True)
    parser.add_argument("--scores", type=Path, metavar="FILE", help="eval/NAME/SCORE -> value")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, metavar="D", help="default: %(default)g"
    )
    return parser.parse_args(argv)


def load(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Loads the arrays of each evaluator, by its name.

    Raises:
      UserError: there are no files, or one was not written by `save_embeddings`.
    """
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise UserError(f"--embeddings {folder}: there is no .npz in this folder")
    found = {}
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            found[file.stem] = dict(arrays)
        if "kind" not in found[file.stem]:
            raise UserError(f"{file} has no 'kind': it was not written by save_embeddings")
    return found


def own_scores(
    name: str, arrays: Mapping[str, np.ndarray], scores: Mapping[str, float] | None
) -> dict[str, float]:
    """Returns the scores of vlp_jax, from a file of scores or else from the .npz itself.

    Raises:
      UserError: the file has no scores of the evaluator `name`.
    """
    if scores is None:
        return dict(
            zip(arrays["score_names"].tolist(), arrays["score_values"].tolist(), strict=True)
        )
    # Names as in metrics.jsonl, which is where FILE comes from.
    prefix = f"eval/{name}/"
    own = {k.removeprefix(prefix): v for k, v in scores.items() if k.startswith(prefix)}
    if not own:
        known = {key.split("/")[1] for key in scores if key.startswith("eval/")}
        raise UserError(f"--scores: {unknown_key_message(name, known, 'its evaluators')}")
    return own


def compare(
    name: str, arrays: Mapping[str, np.ndarray], own: Mapping[str, float]
) -> Iterator[tuple[str, float, float, str]]:
    """Yields (score, ours, independent, who computed it) of every score.

    Raises:
      UserError: an unknown kind of outcome.
    """
    kind = str(arrays["kind"])
    if kind not in KINDS:
        raise UserError(f"{name}.npz: {unknown_key_message(kind, KINDS, 'kind')}")
    independent: Callable = KINDS[kind]
    others = independent(arrays)
    for score in own:
        value, by = others.get(score, (float("nan"), "nobody"))
        yield f"{name}/{score}", own[score], float(value), by


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    table = Table("score", "ours", "independent", "difference", "by")
    worst = 0.0
    try:
        scores = json.loads(read_text(arguments.scores, "--scores")) if arguments.scores else None
        for name, arrays in load(arguments.embeddings).items():
            for row in compare(name, arrays, own_scores(name, arrays, scores)):
                score, ours, other, by = row
                # Both NaN is agreement; one of them is not.
                difference = abs(ours - other) if ours == ours or other == other else 0.0
                # What nobody computed is not equal.
                worst = max(worst, difference if difference == difference else np.inf)
                table.add_row(score, f"{ours:.8g}", f"{other:.8g}", f"{difference:.1e}", by)
    except (UserError, OSError, json.JSONDecodeError) as error:
        print(error, file=sys.stderr)
        return 2
    Console(width=132).print(table)
    print(f"largest difference {worst:.1e}, allowed {arguments.tolerance:g}")
    return int(worst > arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())
