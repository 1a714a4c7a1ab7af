"""Writes the data of an evaluator as CLIP_benchmark reads it: tar shards and class names.

    vlp-jax write-evaluation-tars --workdir runs/clip --evaluator zero_shot --output DIR
    vlp-jax clip-benchmark eval --model runs/clip --pretrained "" --dataset wds/mine \\
        --dataset_root DIR --task zeroshot_classification --output scores.json

The images are the source's, as they are stored: each model resizes them by itself. The layout is
from clip_benchmark/datasets/builder.py, `build_wds_dataset`, 1.6.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import PIL.Image
from ml_collections import ConfigDict
from rich.progress import track

from vlp_jax import config as config_lib
from vlp_jax.arguments import make_parser
from vlp_jax.data.image_ops.upright import orientation, upright_rgb
from vlp_jax.data.ops import in_order
from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.data.source_reader import RAW_TEXT
from vlp_jax.data.sources import build_source
from vlp_jax.data.sources.base import as_plain
from vlp_jax.data.wording import TEXT_TO_TEXT
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.evaluators import class_lists, merged_data
from vlp_jax.training.command import run_command
from vlp_jax.training.run import Run

KINDS = ("zero_shot", "retrieval")
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # what CLIP_benchmark decodes
BATCH = 256


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = make_parser("vlp-jax write-evaluation-tars", __doc__)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", metavar="DIR", help="of a run, whose evaluator it is")
    source.add_argument("--config", metavar="FILE[:ARG]", help="a config, whose evaluator it is")
    add("--evaluator", metavar="NAME", required=True, help="in config.evaluators")
    add("--output", type=Path, metavar="DIR", required=True, help="which is made")
    add("--split", default="test", metavar="NAME", help="its folder; default: test")
    told = "for retrieval: a field with all captions of an image; default: the one caption that "
    add("--captions", metavar="FIELD", help=told + "the evaluator's choose_text takes")
    add("--shard-examples", type=int, default=10_000, metavar="N", help="images of a tar")
    return parser.parse_args(argv)


def sections(arguments: argparse.Namespace) -> tuple[ConfigDict, Mapping[str, Any]]:
    """Returns the evaluator's section, and its data.

    Raises:
      UserError: there is no such evaluator, or it is of another kind.
    """
    if arguments.workdir:
        config = Run.open(arguments.workdir).config
    else:
        config = config_lib.load(arguments.config)
    if arguments.evaluator not in config.evaluators:
        raise UserError(unknown_key_message(arguments.evaluator, config.evaluators, "--evaluator"))
    section = config.evaluators[arguments.evaluator]
    if section.name not in KINDS:
        raise UserError(
            f"--evaluator {arguments.evaluator} is of the kind {section.name!r}; CLIP_benchmark "
            f"has {' and '.join(KINDS)}"
        )
    return section, as_plain(merged_data(config.data, section))


def examples(
    data: Mapping[str, Any], field: str, preprocess: Mapping[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """Yields (image as it is stored, field) of each example that can be used."""
    pipeline = EvalPipeline(
        {**data, "preprocess": preprocess}, None, batch_size=BATCH, extra_fields=("image", field)
    )
    batches = track(pipeline.batches(), "reading", pipeline.num_batches, transient=True)
    for batch in batches:
        for place in np.flatnonzero(batch["mask"]):
            yield batch["image"][place], batch[field][place]


def encoded(image: Any) -> tuple[str, bytes]:
    """Returns (suffix, content) of an image file that CLIP_benchmark decodes as a run does.

    CLIP_benchmark turns no image, and shows what transparent pixels hide. An image that needs it,
    or is of another format, becomes a PNG.
    """
    if isinstance(image, bytes):
        opened = PIL.Image.open(io.BytesIO(image))
        # Such a file goes on byte for byte: what CLIP_benchmark sees is what was published.
        plain = not opened.has_transparency_data and not opened.mode.startswith("I")
        if opened.format in SUFFIXES and plain and orientation(opened) == 1:
            return SUFFIXES[opened.format], image
    else:
        opened = PIL.Image.fromarray(np.asarray(image))
    buffer = io.BytesIO()
    upright_rgb(opened).save(buffer, "PNG")
    return "png", buffer.getvalue()


def write_shards(
    pairs: Iterator[tuple[Any, str, bytes]], folder: Path, shard_examples: int
) -> tuple[int, int]:
    """Writes (image, suffix of the other file, its content); returns examples and shards."""
    number = 0
    with contextlib.ExitStack() as stack:
        for number, (image, suffix, content) in enumerate(pairs, start=1):
            place = number - 1
            if place % shard_examples == 0:
                stack.close()  # the shard before
                file = folder / f"{place // shard_examples}.tar"
                shard = stack.enter_context(tarfile.open(file, "w"))
            kind, picture = encoded(image)
            for name, data in ((kind, picture), (suffix, content)):
                # webdataset joins files by the name before the first dot.
                member = tarfile.TarInfo(f"s{place:08d}.{name}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    if not number:
        raise UserError("the evaluator's data has no example that can be used")
    return number, -(-number // shard_examples)


def class_names(
    section: ConfigDict, data: Mapping[str, Any], field: str
) -> tuple[list[str], Callable[[Any], int]]:
    """Finds the names that the section has, or else the data, and the place of each label in them.

    Raises:
      UserError: there are none, or the section lacks a class of the data.
    """
    known = build_source(data).class_names(field)
    names = class_lists.lines(section.get("class_names") or (), "class_names") or known
    if not names:
        raise UserError(f"neither the evaluator nor the data names the classes in {field!r}")
    where = f"{field!r} in the data"
    numbers = known and class_lists.numbers_onto(known, names, where, "class_names")
    return list(names), lambda label: int(class_lists.renumber(np.asarray(label), numbers))


def write(arguments: argparse.Namespace) -> str:
    """Writes the folder; returns a line with the counts.

    Raises:
      UserError: see `sections`; or the folder is there already.
    """
    section, data = sections(arguments)
    if arguments.shard_examples < 1:
        raise UserError(f"--shard-examples is at least 1, not {arguments.shard_examples}")
    output, folder = arguments.output, arguments.output / arguments.split
    if folder.exists():
        raise UserError(f"{folder} exists; name another --output or --split")
    folder.mkdir(parents=True)
    if section.name == "zero_shot":
        field = section.get("label_field", "label")
        names, number = class_names(section, data, field)
        (output / "classnames.txt").write_text("\n".join(names) + "\n")
        given = class_lists.lines(section.get("templates", ("{}",)), "templates")
        # CLIP_benchmark's own placeholder.
        templates = [template.replace("{}", "{c}") for template in given]
        listed = "\n".join(templates) + "\n"
        (output / "zeroshot_classification_templates.txt").write_text(listed)
        found = ((x, "cls", str(number(y)).encode()) for x, y in examples(data, field, {}))
    else:
        (output / "dataset_type.txt").write_text("retrieval\n")
        # Operations on images stay out: each model resizes by itself.
        kept = ("choose_text", *TEXT_TO_TEXT)
        ops = [pair for pair in in_order(data.get("preprocess")) if pair[0] in kept]
        field, ops = (RAW_TEXT, ops) if arguments.captions is None else (arguments.captions, {})
        found = ((x, "txt", _lines(y)) for x, y in examples(data, field, ops))
    count, shards = write_shards(found, folder, arguments.shard_examples)
    (folder / "nshards.txt").write_text(f"{shards}\n")
    return f"wrote {count:,} images in {shards} shards to {folder}"


def _lines(captions: Any) -> bytes:
    listed = [captions] if isinstance(captions, bytes) else list(captions)
    return b"\n".join(b" ".join(caption.split()) for caption in listed if caption.strip())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: print(write(arguments)))


if __name__ == "__main__":
    sys.exit(main())
