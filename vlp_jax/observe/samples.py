"""Examples with a model's answers, for people to look at while a run goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
from jaxtyping import Float, UInt8

from vlp_jax.observe.palette import DARK
from vlp_jax.observe.writers import Writer

# Bright, since photographs are rather dark; any kind of color vision tells them apart.
_COLORS = [color for name, color in DARK.items() if name.startswith("series-")]
_LEAST_SIDE = 256  # pixels; smaller pictures are enlarged, or lines would hide what is in a box


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """An example with a model's answer.

    Attributes:
      picture: uint8 [height, width, 3]; None for an example without one.
      texts: label -> text, in the order in which they are shown.
      boxes: float32 [n, 4], ymin, xmin, ymax, xmax in [0, 1] of the picture; None for none.
      box_labels: a text for each box, or none at all.
    """

    picture: UInt8[np.ndarray, "height width 3"] | None
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    boxes: Float[np.ndarray, "n 4"] | None = None
    box_labels: Sequence[str] = ()

    def drawn(self) -> UInt8[np.ndarray, "height width 3"]:
        """Returns the picture with its boxes drawn in; ValueError without a picture."""
        if self.picture is None:
            raise ValueError("a sample without a picture cannot be drawn")
        if self.boxes is None:
            return self.picture
        image = PIL.Image.fromarray(np.ascontiguousarray(self.picture))
        factor = max(1, -(-_LEAST_SIDE // min(image.size)))
        width, height = image.width * factor, image.height * factor
        image = image.resize((width, height), PIL.Image.Resampling.NEAREST)
        pen = PIL.ImageDraw.Draw(image)
        for number, (top, left, bottom, right) in enumerate(np.asarray(self.boxes).tolist()):
            color = _COLORS[number % len(_COLORS)]
            corners = (left * width, top * height, right * width - 1, bottom * height - 1)
            pen.rectangle(corners, outline=color, width=max(2, _LEAST_SIDE // 100))
            if self.box_labels:
                place = (corners[0] + 3, corners[1] + 2)
                pen.text(place, self.box_labels[number], fill=color)
        return np.asarray(image)


def write_samples(writer: Writer, step: int, name: str, samples: Sequence[Sample]) -> None:
    """Writes pictures "samples/NAME/0" ... and a table of texts "samples/NAME" of an evaluator."""
    pictures = {
        f"samples/{name}/{number}": sample.drawn()
        for number, sample in enumerate(samples)
        if sample.picture is not None
    }
    if pictures:
        writer.write_images(step, pictures)
    labels = list(dict.fromkeys(label for sample in samples for label in sample.texts))
    if labels:
        head = ["|".join(("", "", *labels, "")), "|" + "---|" * (1 + len(labels))]
        rows = [
            "|".join(("", str(number), *(_cell(sample.texts.get(x, "")) for x in labels), ""))
            for number, sample in enumerate(samples)
        ]
        writer.write_text(step, {f"samples/{name}": "\n".join([*head, *rows])})


def _cell(text: str) -> str:
    """Escapes a text for a table of Markdown."""
    return " ".join(text.replace("|", "\\|").split())
