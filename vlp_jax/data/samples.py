"""Texts of the training data, for a tokenizer to be trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlp_jax.data.order import Order, example_seeds
from vlp_jax.data.pipeline import split_mixture
from vlp_jax.data.sources import build_source
from vlp_jax.data.sources.base import STRING, as_plain
from vlp_jax.errors import UserError


def sample_texts(config: Mapping[str, Any], limit: int = 20_000, seed: int = 0) -> Iterator[str]:
    """Texts as the tokenizer will meet them in training, at most `limit`.

    These are `text` and the fields that `tokenize` marks. The operations of the config are run as
    far as these depend on them: captions are chosen and lower-cased, no image is decoded. Examples
    come in random order, at most five times each; the parts of a mixture in its proportions. Bad
    examples are left out. Raises UserError if the operations leave no string `text`.
    """
    parts, weights = split_mixture(as_plain(config))
    for part, weight in zip(parts.values(), weights, strict=True):
        yield from _of_one(part, max(1, round(limit * weight / sum(weights))), seed)


def _of_one(config: Mapping[str, Any], limit: int, seed: int) -> Iterator[str]:
    source = build_source(config)
    positions = np.arange(min(limit, 5 * len(source)))
    order = Order(len(source), seed)
    if not config.get("preprocess") and not source.needs_tensorflow:
        if source.fields().get("text") != STRING:
            raise UserError("there is no string 'text' in data.arrays to train a tokenizer on")
        texts = source.column("text")[order.indices(positions)]
        yield from (text.decode("utf-8", "replace") for text in texts)
        return
    from vlp_jax.data import preprocess_graph
    from vlp_jax.data.ops import build_ops

    ops = build_ops(config.get("preprocess"))
    graph = preprocess_graph.PreprocessGraph(source, ops, texts_only=True)
    # An example with several texts gives several samples.
    positions = positions[: -(-limit // len(graph.outputs))]
    size = preprocess_graph.CHUNK

    def plan(number: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = positions[number * size : (number + 1) * size]
        return order.indices(chosen), example_seeds(seed, chosen, len(ops))

    for batch, _ in graph.chunks(plan, -(-len(positions) // size)):
        for texts in zip(*batch.values(), strict=True):
            yield from (text.decode("utf-8", "replace") for text in texts)
