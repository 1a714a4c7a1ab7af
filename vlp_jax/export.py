"""Writes a run's model in a foreign format: python -m vlp_jax.export --workdir DIR ..."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Before anything imports TensorFlow, which reads it then.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from etils import epath

from vlp_jax.arguments import make_parser
from vlp_jax.data.tokenizers import ClipTokenizer
from vlp_jax.data.tokenizers.base import NORMALIZED
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.handover.artifacts import ARTIFACTS, DTYPES
from vlp_jax.handover.job import ExportJob, kinds_of, known_formats
from vlp_jax.interop.base import INTERPOLATIONS, RESIZES
from vlp_jax.interop.hf_tokenizer import TokenizerFiles
from vlp_jax.interop.precision import WEIGHTS
from vlp_jax.interop.staging import check_free
from vlp_jax.interop.transfer import Model, fitting_part, how_to_load
from vlp_jax.interop.trees import expected_shapes
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.objectives import Objective
from vlp_jax.parallel import startup
from vlp_jax.training import checkpoint
from vlp_jax.training.command import run_command
from vlp_jax.training.restore import CHOICES
from vlp_jax.training.run import Run, bounded, resizing

DESCRIPTION = """Writes the model of a run's checkpoint, with its config, tokenizer and image
processor, as the library of another project loads it. A format that holds an image tower alone gets
the image tower of the model.
"""
EPILOG = """formats:
  hf_clip     transformers CLIPModel        hf_siglip   transformers SiglipModel
  hf_vit      transformers ViTModel         hf_vit_mae  transformers ViTMAEForPreTraining
  hf          whichever of these fits       open_clip   a folder for "local-dir:DIR"
  timm        VisionTransformer             big_vision  model.npz
  safetensors our own: any model, float32, bfloat16 or int8
  stablehlo   programs of jax.export        saved_model TensorFlow's SavedModel
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("vlp-jax export", DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--workdir", metavar="DIR", required=True, help="folder of the run")
    parser.add_argument("--format", metavar="FORMAT", required=True, help="one of those below")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder that is made")
    parser.add_argument(
        "--step", type=int, metavar="N", help="which checkpoint; default: the newest"
    )
    parser.add_argument(
        "--params",
        choices=CHOICES,
        default="auto",
        help="of the checkpoint its parameters, their average (ema), or the average if there is "
        "one (auto, the default)",
    )
    parser.add_argument(
        "--part", metavar="NAME", help="of a composite objective, the part whose model is written"
    )
    add_writing_arguments(parser)
    add_handover_arguments(parser)
    return parser.parse_args(argv)


def add_handover_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that only an export of a run has."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the matrix products in stablehlo and saved_model; default: float32",
    )
    parser.add_argument(
        "--evaluate",
        action=argparse.BooleanOptionalAction,
        help="run the run's evaluators on what is written; default: only if --weights rounds them "
        "and the data is there",
    )
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not load the result with the library that it is for, in another process",
    )
    parser.add_argument("--license", metavar="NAME", help="for the model card, such as apache-2.0")


def add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of every command that writes a model."""
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="float32",
        help="numbers in the files (default: %(default)s); int8 has a scale for each output of a "
        "matrix, and only our own safetensors, stablehlo and saved_model have a place for it",
    )
    parser.add_argument(
        "--resize",
        choices=RESIZES,
        help="how images come to the model's size; default: as in the source",
    )
    parser.add_argument(
        "--interpolation", choices=INTERPOLATIONS, help="of the resize; default: as in the source"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="also write into a folder that is not empty"
    )
    parser.add_argument(
        "--no-check",
        dest="check",
        action="store_false",
        help="do not read the result back, which holds the model in memory twice",
    )


def choose(
    objective: Objective, parameters: Mapping[str, Any], format: str, part: str | None
) -> tuple[Objective, Model, str]:
    """Chooses the part of an objective to write, for a format.

    Returns:
      The objective (or its part), its model with parameters, and a line about towers that the
      format leaves out ("" if there are none).

    Raises:
      UserError: an unknown part or format.
    """
    parts = objective.parts()
    if part is not None and part not in parts:
        raise UserError(unknown_key_message(part, parts, "--part"))
    chosen = parts.values() if part is None else [parts[part]]
    candidates = [one.objective for one in chosen]
    kinds = kinds_of(format)
    # If no part fits, the first one stays: the format then explains why it cannot be written.
    leaf = next((leaf for leaf in candidates if isinstance(leaf.model, kinds)), candidates[0])
    parameters = dict(parameters)
    # The parameters of a sum include the other parts'.
    if leaf is not objective:
        parameters = {k: parameters[k] for k in expected_shapes(leaf.model) if k in parameters}
    model = Model(leaf.model, bounded(leaf, parameters))
    if format in ARTIFACTS:
        return leaf, model, ""
    model, note = fitting_part(format, model)
    return leaf, model, note


def extras_of(run: Run, objective: Objective, notes: list[str]) -> dict[str, Any]:
    """Collects the settings of a run that foreign configs need, as fields of `interop.Extras`.

    `objective` is the run's, or the part of it to write; `notes` gets lines for the user.
    """
    model, tokenizer = objective.model, run.tokenizer
    extras = {
        "image_mean": model.pixels.mean,
        "image_std": model.pixels.std,
        **resizing(run.config, notes),
    }
    if isinstance(model, MaskedAutoencoder):
        extras |= {
            "norm_pix_loss": objective.normalize_targets,
            "mask_ratio": objective.mask_ratio,
        }
    elif tokenizer is not None:
        ids = {name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "pad_id")}
        wording, more = run.wording
        notes += more
        notes += [
            f"the run's texts went through {name}, which the tokenizer's files do not do: do it "
            f"before tokenizing"
            for name in wording.names
            if name not in NORMALIZED
        ]
        if isinstance(tokenizer, ClipTokenizer):
            notes.append(
                "the run's tokenizer repairs text that was decoded wrongly (ftfy) and resolves "
                "all HTML entities; its files for others do not"
            )
        extras |= ids
        extras["tokenizer"] = TokenizerFiles.from_json(
            tokenizer.to_json(*(name in wording.names for name in NORMALIZED)),
            context_length=tokenizer.context_length,
            **ids,
        )
    return extras


def chosen_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings for resizing and weights that the command line sets."""
    settings = {name: getattr(arguments, name) for name in ("resize", "interpolation", "weights")}
    chosen: dict[str, Any] = {k: value for k, value in settings.items() if value is not None}
    # A resize of the user's own also replaces the size between scaling and cropping.
    return chosen | {"scale": None} if "resize" in chosen else chosen


def report(format: str, directory: Path, written: Sequence[Path], difference: float | None) -> str:
    """Lists the files that were written, and says how to load them."""
    lines = [f"wrote {path} ({path.stat().st_size:,} bytes)" for path in written]
    if difference is not None:
        lines.append(f"read back: features of a random input differ by at most {difference:.1e}")
    return "\n".join([*lines, f"load it with {how_to_load(format, directory)}"])


def export(arguments: argparse.Namespace) -> str:
    """Runs the export that the command line asks for; returns a report.

    Raises:
      UserError: there is no run or checkpoint, the output folder is not empty, the format cannot
        express the model, or the format's library cannot load the result.
    """
    workdir, output = checkpoint.absolute(arguments.workdir), Path(arguments.output).expanduser()
    check_arguments_fit(arguments, workdir, output)
    run = Run.open(workdir)
    saved = run.saved(arguments.step, arguments.params)
    leaf, model, note = choose(run.objective, saved.read(), arguments.format, arguments.part)
    notes = [note] if note else []
    extras = extras_of(run, leaf, notes) | chosen_settings(arguments)
    job = ExportJob(
        format=arguments.format,
        model=model,
        extras=extras,
        workdir=workdir,
        config=run.config,
        saved=saved,
        dtype=arguments.dtype or "float32",
        overwrite=arguments.overwrite,
        check=arguments.check,
        prove=arguments.verify,
        evaluate=arguments.evaluate,
        license=arguments.license,
        notes=notes,
    )
    return job.run(output)


def check_arguments_fit(arguments: argparse.Namespace, workdir: epath.Path, output: Path) -> None:
    """Raises UserError for an unknown format, an option that it lacks, or an unusable output."""
    if arguments.format not in known_formats():
        raise UserError(unknown_key_message(arguments.format, known_formats(), "--format"))
    if arguments.dtype is not None and arguments.format not in ARTIFACTS:
        raise UserError(
            f"--dtype is of the computation in {' and '.join(ARTIFACTS)}; {arguments.format} holds "
            f"weights alone, for which there is --weights"
        )
    if "://" in arguments.output:
        raise UserError(f"--output {arguments.output}: write to a local folder, then copy it")
    check_free(output, arguments.overwrite)
    # Through links, which may lead back into the run's folder.
    inside = os.path.realpath(output)
    if Path(inside).is_relative_to(os.path.realpath(workdir)):
        raise UserError(
            f"--output {output} is inside the run's folder {workdir}, which is the run's own: "
            f"choose a folder beside it"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        startup.use_compilation_cache()
        print(export(arguments))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
