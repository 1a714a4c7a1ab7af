"""The pointing game on `shapes`: how often the peak of a heat map lies in the right box.

A case is an object that is the only one of its class in a test scene. A hit is a map whose highest
pixel lies in the object's box (Zhang et al. 2018, "Top-down Neural Attention by Excitation
Backprop", 4.1).
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import Bool, Float, UInt8

import vlp_jax
from vlp_jax.data.shapes import records, vocabulary
from vlp_jax.encoders import Encoder
from vlp_jax.inspection import heat_map

CONTRAST = "+contrast"  # after a method's name: against the texts of all classes
METHODS = ("windows", "occlusion", "patches", f"patches{CONTRAST}", "relevance")
SCENES = 300


@dataclasses.dataclass(frozen=True)
class Case:
    """An object that is the only one of its class in a scene."""

    scene: int
    label: str
    box: tuple[float, float, float, float]  # ymin, xmin, ymax, xmax in [0, 1]


def play(
    source: str | Path, scenes: int = SCENES, methods: Sequence[str] = METHODS
) -> dict[str, float]:
    """Returns method -> share of hits, `chance`, `middle` (the image's middle as a guess), `cases`.

    Args:
      source: a dual encoder, as `vlp_jax.load` takes it.
      scenes: number of test scenes, from the first on.
    """
    encoder = vlp_jax.load(str(source))
    images, cases = read_cases(scenes, encoder)
    texts = encoder.texts([vocabulary.with_article(case.label) for case in cases])
    classes = [vocabulary.with_article(name) for name in vocabulary.CLASS_NAMES]
    y0, x0, y1, x1 = np.array([case.box for case in cases]).T
    found = {
        "chance": float(((y1 - y0) * (x1 - x0)).mean()),  # a random pixel
        "middle": float(in_box(np.ones((len(cases), 1, 1)), cases).mean()),
        "cases": float(len(cases)),
    }
    for method in methods:
        name, contrast, _ = method.partition(CONTRAST)
        maps = heat_map(
            encoder.module,
            encoder.params,
            images[[case.scene for case in cases]],
            texts,
            method=name,
            against=encoder.embed_text(classes) if contrast else None,
        )
        found[method] = float(in_box(maps, cases).mean())
    return found


def read_cases(
    count: int, encoder: Encoder
) -> tuple[UInt8[np.ndarray, "n height width 3"], list[Case]]:
    """Returns the first test scenes as the model takes them, and every case in them."""
    images, cases = [], []
    stream = records.stream_records(records.SPECS["default"], "test", 0)
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
