"""Compares the zero-shot accuracy of a run with its exports', in the libraries they are for.

    python -m tools.perf.check_exports --workdir demo/run --output exports

Writes the images of the run's zero-shot evaluators to a folder of plain PNG files, exports the run
in several formats, and evaluates each export on these files with the library it is for, its
tokenizer and its image processor, in a process that cannot import vlp_jax. The status is 1 if one
of them differs from the run by more than 0.1 points.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tools.perf import harness
from vlp_jax import export
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.commands.write_evaluation_tars import class_names, examples
from vlp_jax.data.image_ops.upright import upright_rgb
from vlp_jax.data.sources.base import as_plain
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.evaluators import class_lists, merged_data
from vlp_jax.handover import foreign, scores
from vlp_jax.handover.verify import LIBRARIES
from vlp_jax.interop.staging import check_free
from vlp_jax.parallel import startup
from vlp_jax.training import checkpoint
from vlp_jax.training.restore import SavedParameters
from vlp_jax.training.run import Run

FORMATS = ("hf", "open_clip", "stablehlo", "saved_model")
TOLERANCE = 0.001  # a tenth of a point
HEADS = ("format", "library", "evaluator", "images", "there", "the run's", "difference")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = harness.make_parser("check_exports", __doc__)
    add = parser.add_argument
    add("--workdir", metavar="DIR", required=True, help="folder of the run")
    add("--output", metavar="DIR", required=True, help="folder that is made")
    add("--formats", metavar="A,B", default=",".join(FORMATS), help="default: %(default)s")
    add("--step", type=int, metavar="N", help="which checkpoint (default: the newest)")
    return parse_with_overrides(parser, argv)[0]


def write_task(config: ConfigDict, name: str, directory: Path) -> int:
    """Writes the images of the zero-shot evaluator `name` as PNG files, beside task.json.

    Images are as the dataset has them, before any resize.

    Returns:
      The number of images.
    """
    section = config.evaluators[name]
    data = as_plain(merged_data(config.data, section))
    field = section.get("label_field", "label")
    names, number = class_names(section, data, field)
    given = section.get("templates") or ("a photo of a {}.",)
    templates = class_lists.lines(given, "templates")
    directory.mkdir(parents=True)
    files, labels = [], []
    for image, label in examples(data, field, {}):
        files.append(f"{len(files):06d}.png")
        picture(image).save(directory / files[-1])
        labels.append(number(label))
    task = {
        "images": files,
        "labels": labels,
        "prompts": [[class_lists.fill(t, one) for t in templates] for one in names],
    }
    (directory / "task.json").write_text(json.dumps(task), encoding="utf-8")
    return len(files)


def picture(image: bytes | np.ndarray) -> Image.Image:
    """Returns the image of an encoded file, upright as the run sees it, or of pixels."""
    if isinstance(image, bytes):
        return upright_rgb(Image.open(io.BytesIO(image)))
    return Image.fromarray(image)


def evaluated_elsewhere(format: str, folder: Path, data: Path) -> dict[str, Any]:
    """Returns the scores that foreign/check.py prints.

    Raises:
      UserError: it ended with an error.
    """
    program = Path(foreign.__file__).parent / "check.py"
    library = LIBRARIES[format.split("_")[0]]
    done = subprocess.run(
        # Isolated: it cannot import vlp_jax, so nothing of ours helps the foreign library.
        [
            *(sys.executable, "-I", "-B", program, "--zero-shot"),
            *(library, folder.resolve(), data.resolve()),
        ],
        capture_output=True,
        text=True,
        cwd=data,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{format}: the evaluation of {folder} failed: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def scores_of_run(workdir: Any, config: ConfigDict, step: int) -> dict[str, float]:
    """Returns "EVALUATOR/SCORE" -> value of a checkpoint, as noted by the run or else computed."""
    noted = scores.noted(workdir, step)
    # `noted` gives the nearest step, which may be another.
    if noted is not None and noted.step == step:
        return noted.values
    saved = SavedParameters.of(workdir, step)
    return scores.evaluate_rounded(workdir, config, saved, "float32")[0].values


def export_one(arguments: argparse.Namespace, format: str, folder: Path, step: int) -> str:
    """Exports the run; returns why that is refused, empty if it is not.

    The format's library need not compute a random batch first: it is to evaluate.
    """
    words = ["--workdir", arguments.workdir, "--format", format, "--output", str(folder)]
    words.append("--no-verify")
    try:
        print(export.export(export.parse([*words, "--step", str(step)])), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return str(error)
    return ""


def check(arguments: argparse.Namespace) -> tuple[list[Sequence[str]], bool]:
    """Exports and evaluates; returns the rows of the table, and whether all agree.

    Raises:
      UserError: no run, no zero-shot evaluator in it, an unknown format, or a folder that is not
        free.
    """
    formats = arguments.formats.split(",")
    for format in formats:
        if format not in FORMATS:
            raise UserError(unknown_key_message(format, FORMATS, "--formats"))
    workdir, output = checkpoint.absolute(arguments.workdir), Path(arguments.output).expanduser()
    check_free(output, overwrite=False)
    run = Run.open(workdir)
    config, step = run.config, run.saved(arguments.step).step
    tasks = [key for key, e in config.evaluators.items() if e.name == "zero_shot"]
    if not tasks:
        raise UserError(f"{workdir}: the run's config has no zero_shot evaluator")
    expected = scores_of_run(workdir, config, step)
    rows: list[Sequence[str]] = []
    failed = False
    for name in tasks:
        count = write_task(config, name, output / "data" / name)
        print(f"{name}: {count:,} images", flush=True)
    for format in formats:
        refusal = export_one(arguments, format, output / format, step)
        if refusal:
            rows.append((format, "refused", "-", "-", "-", "-", "-"))
            failed = True
            continue
        for name in tasks:
            said = evaluated_elsewhere(format, output / format, output / "data" / name)
            row, agrees = _row(format, name, said, expected[f"{name}/top1"])
            print(f"{format}, {name}: {row[4]} there, {row[5]} in the run", flush=True)
            rows.append(row)
            failed |= not agrees
    return rows, not failed


def _row(
    format: str, name: str, said: dict[str, Any], expected: float
) -> tuple[tuple[str, ...], bool]:
    """Returns a row of the table, and whether the scores agree."""
    if "skipped" in said:
        return (format, said["skipped"], name, "-", "-", f"{expected:.4f}", "-"), True
    difference = said["top1"] - expected
    library = f"{said['library']} {said['version']}"
    numbers = (f"{said['top1']:.4f}", f"{expected:.4f}", f"{difference:+.4f}")
    return (format, library, name, str(said["examples"]), *numbers), abs(difference) <= TOLERANCE


def command(argv: list[str]) -> int:
    """Exports, evaluates and prints the table; returns 1 if a score differs."""
    arguments = parse(argv)
    startup.use_compilation_cache()
    rows, agree = check(arguments)
    print(harness.markdown(HEADS, rows, left=3))
    content = {"rows": [dict(zip(HEADS, row, strict=True)) for row in rows]}
    harness.write_json(arguments.json, "check_exports", argv, content)
    return int(not agree)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
