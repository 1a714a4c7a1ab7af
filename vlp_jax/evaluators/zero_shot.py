"""Zero-shot classification by prompts (Radford et al. 2021, 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vlp_jax.errors import UserError
from vlp_jax.evaluators.base import Pairs, Resources


class ZeroShot:
    """Top-1 and top-5 of the class whose prompts are most similar to the image.

    A class is the normalized mean of the unit vectors of all its prompts.

    Args:
      data: of the images, with the class as an integer in `label_field`.
      templates: prompts, each with `{}` where the name of the class goes.
      class_names: by label; default: those that the dataset knows for `label_field`.
    """

    needs = ("embed_image", "embed_text")

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        resources: Resources,
        templates: Sequence[str] = ("a photo of a {}.",),
        label_field: str = "label",
        class_names: Sequence[str] | None = None,
    ):
        bad = [t for t in templates if "{}" not in t]
        if bad or not templates:
            raise UserError(f"zero-shot templates need {{}} for the class; got {bad or 'none'}")
        self._resources = resources
        self._label_field = label_field
        self._templates = tuple(templates)
        self._pipeline = resources.pipeline(data, extra_fields=(label_field,))
        class_names = class_names or self._pipeline.class_names(label_field)
        if not class_names:
            raise UserError(
                f"the data has no names of the classes in {label_field!r}: set class_names"
            )
        self.class_names = tuple(class_names)

    def class_embeddings(self, params: Any) -> Float[np.ndarray, "classes dim"]:
        """A unit vector per class."""
        prompts = [t.format(name) for name in self.class_names for t in self._templates]
        vectors = self._resources.embed_texts(params, prompts)
        means = vectors.reshape(len(self.class_names), len(self._templates), -1).mean(axis=1)
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def __call__(self, params: Any) -> Pairs:
        """`top1` and `top5` in [0, 1], `examples`, `classes` and `chance`."""
        classes = self.class_embeddings(params)
        embeddings, fields = self._resources.embed(
            params, self._pipeline.batches(), {"image": "embed_image"}
        )
        scores = embeddings["image"] @ classes.T
        own = np.take_along_axis(scores, fields[self._label_field][:, None].astype(int), axis=1)
        # Ties count against the model, so that equal scores for all classes are no success.
        rank = (scores >= own).sum(axis=1) - 1
        yield "top1", float((rank < 1).mean())
        yield "top5", float((rank < 5).mean())
        yield "examples", float(len(scores))
        yield "classes", float(len(self.class_names))
        yield "chance", 1 / len(self.class_names)
