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
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tools.perf import harness
from vlp_jax import evaluate, export
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.commands.write_evaluation_tars import class_names, examples
from vlp_jax.data.image_ops.upright import upright_rgb
from vlp_jax.data.sources.base import as_plain
from vlp_jax.errors import UserError
from vlp_jax.evaluators import class_lists, merged_data
from vlp_jax.handover import foreign
from vlp_jax.handover.verify import LIBRARIES
from vlp_jax.interop.staging import check_free
from vlp_jax.parallel import startup
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


def export_one(workdir: str, format: str, folder: Path, step: int) -> str:
    """Exports the run; returns why that is refused, empty if it is not."""
    words = ["--workdir", workdir, "--format", format, "--output", str(folder)]
    # Its library need not compute a random batch first: it is to evaluate.
    words += ["--no-verify", "--step", str(step)]
    try:
        print(export.export(export.parse(words)), flush=True)
    except UserError as error:
        return str(error)
    return ""


def check(arguments: argparse.Namespace) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Exports and evaluates; yields rows of the table, each with whether the scores agree.

    Raises:
      UserError: no run, no zero-shot evaluator in it, an unknown format, or a folder that is not
        free.
    """
    formats = arguments.formats.split(",")
    harness.check_names(formats, FORMATS, "--formats")
    workdir, output = arguments.workdir, Path(arguments.output).expanduser()
    check_free(output, overwrite=False)
    run = Run.open(workdir)
    step = run.saved(arguments.step).step
    tasks = [key for key, one in run.config.evaluators.items() if one.name == "zero_shot"]
    if not tasks:
        raise UserError(f"{workdir}: the run's config has no zero_shot evaluator")
    expected = evaluate.evaluate(workdir, step, tasks)
    for name in tasks:
        count = write_task(run.config, name, output / "data" / name)
        print(f"{name}: {count:,} images", flush=True)
    for format in formats:
        refusal = export_one(workdir, format, output / format, step)
        if refusal:
            print(f"error: {format}: {refusal}", file=sys.stderr)
            yield (format, "refused", *"-----"), False
            continue
        for name in tasks:
            said = evaluated_elsewhere(format, output / format, output / "data" / name)
            ours = expected[f"eval/{name}/top1"]
            if "skipped" in said:
                yield (format, said["skipped"], name, "-", "-", f"{ours:.4f}", "-"), True
                continue
            off = said["top1"] - ours
            print(f"{format}, {name}: {said['top1']:.4f} there, {ours:.4f} in the run", flush=True)
            numbers = (f"{said['top1']:.4f}", f"{ours:.4f}", f"{off:+.4f}")
            library = f"{said['library']} {said['version']}"
            row = (format, library, name, str(said["examples"]), *numbers)
            yield row, abs(off) <= TOLERANCE


def command(argv: list[str]) -> int:
    """Exports, evaluates and prints the table; returns 1 if a score differs."""
    arguments = parse(argv)
    startup.use_compilation_cache()
    found = list(check(arguments))
    rows = [row for row, _ in found]
    print(harness.markdown(HEADS, rows, left=3))
    content = {"rows": [dict(zip(HEADS, row, strict=True)) for row in rows]}
    harness.write_json(arguments.json, "check_exports", argv, content)
    return int(not all(agrees for _, agrees in found))


main = harness.main_of(command)

if __name__ == "__main__":
    sys.exit(main())
