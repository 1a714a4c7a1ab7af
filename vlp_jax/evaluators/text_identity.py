"""Makes the embeddings of equal texts exactly equal, so that equal captions tie in retrieval."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int

TEXT_HASH = "_text_hash"


def text_hashes(tokens: Int[np.ndarray, "n length"]) -> Int[np.ndarray, "n 2"]:
    """Hashes each row of ids to 64 bits, as two int32: JAX's devices hold no int64 by default."""
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in tokens]
    return np.frombuffer(b"".join(digests), np.int32).reshape(len(tokens), 2)


def with_text_hashes(
    batches: Iterator[Mapping[str, np.ndarray]],
) -> Iterator[Mapping[str, np.ndarray]]:
    """Adds the field `TEXT_HASH` to each batch."""
    for batch in batches:
        yield {**batch, TEXT_HASH: text_hashes(batch["text"])}


def same_for_same_text(
    vectors: Float[np.ndarray, "n dim"], hashes: Int[np.ndarray, "n 2"]
) -> Float[np.ndarray, "n dim"]:
    """Gives all equal texts the vector of the first one.

    The position of a text in its batch may change the last bit of its embedding. Then a caption
    that occurs twice would not tie with itself.
    """
    whole = np.ascontiguousarray(hashes).view(np.int64)[:, 0]
    _, first, place = np.unique(whole, return_index=True, return_inverse=True)
    return vectors if len(first) == len(vectors) else vectors[first[place]]
