"""Converts weights from one project's files to another's, without a run of ours.

    vlp-jax convert --from open_clip:models/clip --to hf_clip:models/clip_hf

The files of the source's tokenizer, and what its image processor says, go along.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlp_jax import interop
from vlp_jax.arguments import make_parser
from vlp_jax.errors import UserError
from vlp_jax.export import EPILOG, add_writing_arguments, chosen_settings, report
from vlp_jax.interop.transfer import Model, fitting_part, write_checked
from vlp_jax.interop.trees import Module
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.vit import VisionTransformer
from vlp_jax.parallel import startup
from vlp_jax.training.command import run_command

# Whose folders hold a tokenizer.
WITH_TOKENIZER = ("hf", "hf_clip", "hf_siglip", "open_clip")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = make_parser("vlp-jax convert", __doc__, epilog=EPILOG)
    add, where = parser.add_argument, {"metavar": "FORMAT:PATH"}
    add("--from", dest="source", required=True, help="a folder or a file", **where)
    add("--to", dest="target", metavar="FORMAT:DIR", required=True, help="a folder that is made")
    told = (
        "a model of the same kind, for a file of weights without a config: what shapes do not "
        "tell, such as the number of heads, is as there"
    )
    add("--like", help=told, **where)
    add_writing_arguments(parser)
    return parser.parse_args(argv)


def convert(arguments: argparse.Namespace) -> str:
    """Reads, writes, reads back; returns a report.

    Raises:
      UserError: the source cannot be read, or the target does not hold its model.
    """
    format, colon, path = arguments.target.partition(":")
    if not colon or not path:
        raise UserError(f"--to is FORMAT:DIR, such as hf_clip:models/clip, not {arguments.target}")
    like = None if arguments.like is None else interop.read(arguments.like).module
    source = interop.read(arguments.source, like)
    # A format of image towers gets the tower of a dual encoder, and a note says so.
    model, left_out = fitting_part(format, Model(source.module, source.params))
    extras = pixels(source.module) | source.extras | chosen_settings(arguments)
    notes = [*source.notes, *([left_out] if left_out else [])]
    # Without its tokenizer a text tower reads noise, and no error tells.
    texts = isinstance(model.module, DualEncoder) and format in WITH_TOKENIZER
    if texts and extras.get("tokenizer") is None:
        notes.append(f"{arguments.source} holds no files of a tokenizer: put its own into {path}")
    output = Path(path).expanduser()
    written, difference = write_checked(
        format, model, output, overwrite=arguments.overwrite, check=arguments.check, **extras
    )
    lines = [f"note: {note}" for note in notes]
    return "\n".join([*lines, report(format, output, written, difference)])


def pixels(module: Module) -> dict[str, Any]:
    """Returns how a model normalizes images, for an image tower that is taken out of it."""
    # A bare tower has no pixels: whoever uses it normalizes.
    if isinstance(module, VisionTransformer):
        return {}
    return {"image_mean": tuple(module.pixels.mean), "image_std": tuple(module.pixels.std)}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        startup.use_compilation_cache()
        print(convert(arguments))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
