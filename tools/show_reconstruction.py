"""Draws what a masked autoencoder paints: python -m tools.show_reconstruction --workdir DIR.

Test images of the run's `reconstruction` evaluator: what the encoder sees, what is painted into the
hidden patches, and the image.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from vlp_jax import evaluate
from vlp_jax.observe.pictures import draw_reconstructions
from vlp_jax.parallel import startup
from vlp_jax.report.paintings import hidden_share, paint
from vlp_jax.training.command import run_command


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.show_reconstruction", description=__doc__
    )
    parser.add_argument("--workdir", metavar="DIR", required=True, help="folder of the run")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint; default: newest")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: DIR/painted.png")
    parser.add_argument(
        "--images", type=int, default=24, metavar="N", help="how many, from the first"
    )
    parser.add_argument(
        "--evaluator", default="reconstruction", metavar="NAME", help="whose images; see the config"
    )
    return parser.parse_args(argv)


def draw(workdir: Path, output: Path, step: int | None, evaluator: str, count: int) -> None:
    """Writes the picture of the run in `workdir`."""
    subject, loaded = evaluate.load_run(workdir, step)
    views = paint(subject, loaded, evaluator, count)
    draw_reconstructions(
        output,
        views,
        title="What a masked autoencoder paints",
        subtitle=(
            f"{loaded.step:,} steps; {hidden_share(subject):.0%} of the patches are hidden; images "
            "it was not trained on"
        ),
    )
    print(f"wrote {output}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    workdir = Path(arguments.workdir)

    def command() -> None:
        startup.initialize()
        startup.use_compilation_cache()
        output = arguments.output or workdir / "painted.png"
        draw(workdir, output, arguments.step, arguments.evaluator, arguments.images)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
