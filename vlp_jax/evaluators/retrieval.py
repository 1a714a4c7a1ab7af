"""Image-text retrieval: for each image its texts among all texts, and the other way round."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from vlp_jax.errors import UserError
from vlp_jax.evaluators.base import Evaluator, Outcome, Resources
from vlp_jax.evaluators.captions import embed_captions
from vlp_jax.evaluators.ranking import Ranks, rank_both_ways
from vlp_jax.evaluators.splits import Split


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalOutcome(Outcome):
    """The images and texts of a split, in the order of the source, and how they find each other.

    Attributes:
      image: unit vectors, float32 [images, dim].
      text: unit vectors, float32 [texts, dim]; those of an image follow one another.
      owners: int64 [texts], the image (row of `image`) that each text belongs to.
      index: int64 [images], the place of each image in its source (after `where` and `limit`).
      image_to_text: where the best of each image's texts stands among all texts.
      text_to_image: where each text's image stands among all images.
      ks: the k of R@k.
    """

    image: Float[np.ndarray, "images dim"]
    text: Float[np.ndarray, "texts dim"]
    owners: Int[np.ndarray, " texts"]
    index: Int[np.ndarray, " images"]
    image_to_text: Ranks
    text_to_image: Ranks
    ks: tuple[int, ...]

    def scores(self) -> dict[str, float]:
        """`image_to_text_rK` and `text_to_image_rK` in [0, 1], `..._median_rank` from 1, `..._mrr`
        in (0, 1], `pairs` (texts), `images` and `chance_r1`."""
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

    def arrays(self) -> dict[str, np.ndarray]:
        """What `save_embeddings` writes."""
        return {
            "image": self.image,
            "text": self.text,
            "owners": self.owners,
            "index": self.index,
            "ks": np.array(self.ks),
        }


class Retrieval(Evaluator):
    """R@k, median rank and mean reciprocal rank, both ways, over all images and texts of a split.

    An image counts as found if any of its texts is among the k most similar ones. Among texts that
    are exactly as similar (a caption that two images have) the order is random: a query counts with
    the probability that a text of its own is among the first k.

    Args:
      data: of the pairs.
      ks: the k of R@k.
      captions: a field of the examples that holds one caption or a list of them, of which all
        count, each after the text operations of `data.preprocess`; default: the one `text`.
        Captions that are empty do not count, nor images without any.

    Raises:
      UserError: a k below 1, or a field that is not there or holds no text.
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
            raise UserError(f"ks are numbers from 1, got {tuple(ks)}")
        self._resources = resources
        self._ks = tuple(ks)
        self._captions = captions
        self._split = Split(resources, data, () if captions is None else (captions,))
        if captions in self._split.pipeline.batch_spec():
            raise UserError(
                f"captions: the field {captions!r} holds numbers; leave captions out to take the "
                "text of each example"
            )

    def outcome(self, params: Any) -> RetrievalOutcome:
        """Embeddings of the whole split, and where everything stands."""
        if self._captions is None:
            functions = {"image": "embed_image", "text": "embed_text"}
            found = self._split.embed(params, functions)
            image, text, index = found.outputs["image"], found.outputs["text"], found.index
            owners = np.arange(len(text))
        else:
            image, text, owners, index = embed_captions(self._split, params, self._captions)
        image_to_text, text_to_image = rank_both_ways(image, text, owners)
        return RetrievalOutcome(image, text, owners, index, image_to_text, text_to_image, self._ks)

    def similarity(self, params: Any) -> Float[np.ndarray, "images texts"]:
        """All cosine similarities at once, float32: for small splits."""
        outcome = self.outcome(params)
        return outcome.image @ outcome.text.T
