"""Image-text retrieval: ranks each image's texts among all texts, and the other way round."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from vlp_jax.errors import UserError
from vlp_jax.evaluators.base import Evaluator, Outcome, Resources
from vlp_jax.evaluators.ranking import Ranks, rank_both_ways
from vlp_jax.evaluators.splits import Split, embed_captions


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalOutcome(Outcome):
    """Unit vectors of a split's images and texts, in the order of the source, and their ranks.

    `owners` has the row of each text's image; the texts of an image are adjacent. `index` is the
    position of each image in its source (after `where`, `limit`). Ranks are each image's best text
    among all texts, and each text's image among all images; `ks` are the values of k for R@k.
    """

    image: Float[np.ndarray, "images dim"]
    text: Float[np.ndarray, "texts dim"]
    owners: Int[np.ndarray, " texts"]
    index: Int[np.ndarray, " images"]
    image_to_text: Ranks
    text_to_image: Ranks
    ks: tuple[int, ...]

    saved = ("image", "text", "owners", "index", "ks")

    def scores(self) -> dict[str, float]:
        """Computes the scores of both directions, `image_to_text_...` and `text_to_image_...`.

        `..._rK` is R@K in [0, 1], `..._median_rank` counts from 1, and `..._mrr` is the mean
        reciprocal rank in (0, 1]. Further: `pairs` (texts), `images`, and `chance_r1`.
        """
        scores = {}
        ways = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        for name, ranks in ways.items():
            scores |= {f"{name}_r{k}": ranks.recall(k) for k in self.ks}
            scores[f"{name}_median_rank"] = ranks.median()
            scores[f"{name}_mrr"] = ranks.mean_reciprocal()
        return {
            **scores,
            "pairs": float(len(self.text)),
            "images": float(len(self.image)),
            "chance_r1": 1 / len(self.image),
        }


class Retrieval(Evaluator):
    """Scores R@k, median rank and mean reciprocal rank over all images and texts of a split.

    An image is a hit at k if any of its texts is among the k most similar ones. Texts with exactly
    equal similarity (a caption that two images share) are in random order: a query then counts with
    the probability of a hit.

    Args:
      data: the pairs.
      ks: the values of k for R@k.
      captions: a field that holds one caption or a list of captions. All of them count, after the
        text operations of `data.preprocess`. None takes the one `text` of each example. Empty
        captions do not count, and neither do images without a caption.

    Raises:
      UserError: a k below 1, or a field that is missing or holds no text.
    """

    SMOKE: ClassVar[Mapping[str, Any]] = {"captions": "captions"}
    needs = ("embed_image", "embed_text")
    reads_text = True

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        resources: Resources,
        ks: Sequence[int] = (1, 5, 10),
        captions: str | None = None,
    ):
        if not ks or min(ks) < 1:
            raise UserError(f"ks must be at least 1, not {tuple(ks)}")
        self._ks, self._captions = tuple(ks), captions
        self._split = Split(resources, data, () if captions is None else (captions,))
        # Only fields of numbers have a spec: strings do not go to the devices.
        if captions in self._split.pipeline.batch_spec():
            raise UserError(
                f"captions: the field {captions!r} holds numbers; leave captions out to take the "
                "text of each example"
            )

    def outcome(self, params: Any) -> RetrievalOutcome:
        """Embeds the whole split, and ranks images and texts."""
        if self._captions is None:
            functions = {"image": "embed_image", "text": "embed_text"}
            pairs = self._split.embed(params, functions)
            image, text, index = pairs.outputs["image"], pairs.outputs["text"], pairs.index
            owners = np.arange(len(text))
        else:
            image, text, owners, index = embed_captions(self._split, params, self._captions)
        image_to_text, text_to_image = rank_both_ways(image, text, owners)
        return RetrievalOutcome(image, text, owners, index, image_to_text, text_to_image, self._ks)

    def similarity(self, params: Any) -> Float[np.ndarray, "images texts"]:
        """Computes all cosine similarities at once, float32, for small splits."""
        outcome = self.outcome(params)
        return outcome.image @ outcome.text.T
