"""The pointing game on `shapes`: how often the peak of a heat map lies in the right box.

    python -m tools.perf.measure_heat_maps --workdir demo/run --text "a red circle" --at-least 0.7

Test scenes that hold exactly one such object, and any others beside it. A hit is a map whose
highest pixel lies in the object's box (Zhang et al. 2018, "Top-down Neural Attention by Excitation
Backprop", 4.1). Beside it stand chance, the mean share of the image that the box takes up, and the
middle of the image as a guess. Exit status 1 if the first method is below --at-least.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, UInt8

import vlp_jax
from tools.perf import harness
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.data.shapes import records, vocabulary
from vlp_jax.encoders import Encoder
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.inspection import heat_map
from vlp_jax.inspection.heat_maps import METHODS
from vlp_jax.models.dual_encoder import DualEncoder

CONTRAST = "+contrast"  # after a method's name: against the texts of all classes
DEFAULT = ("windows", "occlusion", "patches", f"patches{CONTRAST}", "relevance")
CLASS_TEXTS = [vocabulary.with_article(name) for name in vocabulary.CLASS_NAMES]


@dataclasses.dataclass(frozen=True)
class Case:
    """An object that is the only one of its class in a scene."""

    scene: int
    label: str
    box: tuple[float, float, float, float]  # ymin, xmin, ymax, xmax in [0, 1]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments.

    Raises:
      UserError: an unknown method or split, or a number out of its range.
    """
    parser = harness.make_parser("measure_heat_maps", __doc__)
    add = parser.add_argument
    add("--workdir", metavar="SOURCE", required=True, help="as vlp_jax.load takes")
    add("--step", type=int, metavar="N", help="which checkpoint (default: the newest)")
    add("--text", default="a red circle", metavar="T", help="names one class")
    told = f"of {', '.join(METHODS)}; with {CONTRAST} against the texts of all classes; "
    told += "default: %(default)s"
    add("--methods", default=",".join(DEFAULT), metavar="A,B", help=told)
    add("--split", default="test", metavar="NAME", help="default: test")
    add("--scenes", type=int, default=3000, metavar="N", help="the first N of the split")
    told = "for the figure over all 48 classes, the first N; 0 leaves it out"
    add("--scenes-of-all", type=int, default=300, metavar="N", help=told)
    add("--at-least", type=float, default=0.0, metavar="SHARE", help="least share of hits")
    arguments, _ = parse_with_overrides(parser, argv, "scenes")
    arguments.methods = arguments.methods.split(",")
    known = [*METHODS, *(name + CONTRAST for name in METHODS if name != "relevance")]
    for name in arguments.methods:
        if name not in known:
            raise UserError(unknown_key_message(name, known, "--methods"))
    if arguments.split not in vocabulary.SPLITS:
        raise UserError(unknown_key_message(arguments.split, vocabulary.SPLITS, "--split"))
    if arguments.scenes_of_all < 0:
        raise UserError(f"--scenes-of-all must be at least 0, not {arguments.scenes_of_all}")
    return arguments


def class_of(text: str) -> str:
    """Returns the class that a text names, such as "red circle".

    Raises:
      UserError: it names none, or several.
    """
    found = [name for name in vocabulary.CLASS_NAMES if name in text]
    if len(found) != 1:
        raise UserError(
            f"--text {text!r} names {len(found)} classes of shapes; it must name one: a color "
            f"({', '.join(vocabulary.COLORS)}) and a shape ({', '.join(vocabulary.SHAPES)})"
        )
    return found[0]


def read_scenes(
    split: str, count: int, encoder: Encoder
) -> tuple[UInt8[np.ndarray, "n height width 3"], list[Case]]:
    """Returns the first scenes of a split as the model takes them, and every case in them."""
    spec, images, cases = records.SPECS["default"], [], []
    # Drawing is worth processes from some hundred scenes on.
    stream = records.stream_records(spec, split, None if count > 500 else 0)
    for number, record in enumerate(itertools.islice(stream, count)):
        with PIL.Image.open(io.BytesIO(record["image"])) as image:
            images.append(encoder.images(image, record["id"]))
        labels = [thing["label"] for thing in record["objects"]]
        cases += [
            Case(number, thing["label"], tuple(thing["bbox"]))
            for thing in record["objects"]
            if labels.count(thing["label"]) == 1
        ]
    return np.stack(images), cases


def in_box(
    maps: Float[np.ndarray, "n height width"], cases: Sequence[Case]
) -> Bool[np.ndarray, " n"]:
    """Whether the middle of the highest pixel of each map lies in the box of its case."""
    height, width = maps.shape[1:]
    y, x = np.divmod(maps.reshape(len(maps), -1).argmax(axis=1), width)
    boxes = np.array([case.box for case in cases])
    # The middle of the pixel: its corner may lie outside of a box that holds most of it.
    y, x = (y + 0.5) / height, (x + 0.5) / width
    return (boxes[:, 0] <= y) & (y <= boxes[:, 2]) & (boxes[:, 1] <= x) & (x <= boxes[:, 3])


def interval(hits: int, count: int) -> tuple[float, float]:
    """Returns the 95% interval of a share (Wilson 1927, "Probable inference", with z = 1.96)."""
    z, share = 1.96, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / count / 2) ** 2)
    return middle - half, middle + half


def measure(
    encoder: Encoder, images: np.ndarray, cases: Sequence[Case], texts: Sequence[str], method: str
) -> Bool[np.ndarray, " cases"]:
    """Whether the map of each case's text points into its box."""
    name, contrast, _ = method.partition(CONTRAST)
    maps = heat_map(
        encoder.module,
        encoder.params,
        images[[case.scene for case in cases]],
        encoder.texts(texts),
        method=name,
        against=encoder.embed_text(CLASS_TEXTS) if contrast else None,
    )
    return in_box(maps, cases)


def areas(cases: Sequence[Case]) -> Float[np.ndarray, " cases"]:
    """Returns the share of the image that each box takes up: the score of a random pixel."""
    y0, x0, y1, x1 = np.array([case.box for case in cases]).T
    return (y1 - y0) * (x1 - x0)


def middle_hits(cases: Sequence[Case]) -> Bool[np.ndarray, " cases"]:
    """Whether the middle of the image lies in the box."""
    return in_box(np.ones((len(cases), 1, 1)), cases)


def report(
    encoder: Encoder, images: np.ndarray, cases: Sequence[Case], text: str | None, methods: list
) -> Iterator[dict[str, Any]]:
    """Yields a row for each method; text None takes the text of each case's own class."""
    texts = [text or vocabulary.with_article(case.label) for case in cases]
    chance, middle = float(areas(cases).mean()), float(middle_hits(cases).mean())
    for method in methods:
        hits = measure(encoder, images, cases, texts, method)
        low, high = interval(int(hits.sum()), len(cases))
        row = {
            "method": method,
            "share": float(hits.mean()),
            "low": low,
            "high": high,
            "n": len(cases),
            "chance": chance,
            "middle": middle,
        }
        yield row


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Prints the rows of `report`."""
    heads = ("method", "in box", "95% interval", "n", "chance", "the middle")
    cells = [
        (
            *(row["method"], f"{row['share']:.1%}", f"{row['low']:.1%} to {row['high']:.1%}"),
            *(f"{row['n']:,}", f"{row['chance']:.1%}", f"{row['middle']:.1%}"),
        )
        for row in rows
    ]
    print(f"\n{title}")  # a table would wrap it to its own width
    harness.make_console().print(harness.make_table("", heads, cells))


def command(argv: list[str]) -> int:
    """Measures and prints; returns 1 if the first method does not reach `--at-least`.

    Raises:
      UserError: a source or a text that does not do, or no scene with such an object.
    """
    arguments = parse(argv)
    harness.start_run()
    label = class_of(arguments.text)
    encoder = vlp_jax.load(arguments.workdir, step=arguments.step)
    if not isinstance(encoder.module, DualEncoder):
        raise UserError(f"{arguments.workdir} is an image model: heat maps need a text tower")
    images, cases = read_scenes(arguments.split, arguments.scenes, encoder)
    own = [case for case in cases if case.label == label]
    if not own:
        raise UserError(f"no scene of {arguments.split} has one {label}: raise --scenes")
    # For such a combination a map shows what generalizes, which the reader should know.
    held_out = tuple(label.split()) in vocabulary.HELD_OUT
    title = (
        f"{arguments.text!r} in {arguments.split} scenes with one {label} (a combination "
        f"{'never seen in training' if held_out else 'of the training data'}):"
    )
    found = {"one": list(report(encoder, images, own, arguments.text, arguments.methods))}
    show(title, found["one"])
    if arguments.scenes_of_all:
        some = [case for case in cases if case.scene < arguments.scenes_of_all]
        count = len({case.scene for case in some})
        found["all"] = list(report(encoder, images, some, None, arguments.methods))
        show(f"every class that is in a scene once, in {count:,} scenes:", found["all"])
    harness.write_json(arguments.json, "measure_heat_maps", argv, found)
    first = found["one"][0]
    if first["share"] < arguments.at_least:
        print(
            f"{first['method']} points into the box in {first['share']:.1%} of the scenes, less "
            f"than {arguments.at_least:.1%}",
            file=sys.stderr,
        )
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
