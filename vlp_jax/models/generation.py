"""Generates texts token by token within a compiled program: greedy, sampled, or by beam search.

A `Step` is `Decoder.step` with its parameters bound: (tokens [batch, tokens], cache) -> (scores of
the next token [batch, vocab], new cache).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from vlp_jax.models.heads import Cache

Step = Callable[[Array, Cache], tuple[Array, Cache]]
LEAST = -1e30  # score of an excluded token; finite, because -inf minus -inf would be NaN


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Describes how the next token is chosen; ValueError for a number out of range.

    Attributes:
      temperature: divisor of the scores; 0 always takes the best token.
      top_k: samples only from the best `top_k` tokens; 0 for all.
      top_p: samples only from the smallest set of tokens whose probabilities add up to `top_p`
        (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", 3.1); 1 for all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")

    def __call__(
        self, scores: Float[Array, "batch vocab"], rng: PRNGKeyArray
    ) -> Int[Array, " batch"]:
        """Chooses a token for each row of scores."""
        if self.temperature == 0:
            return jnp.argmax(scores, axis=-1).astype(jnp.int32)
        return jax.random.categorical(rng, self.narrowed(scores)).astype(jnp.int32)

    def narrowed(self, scores: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """Returns scores / temperature; tokens that must not be chosen get the score -1e30."""
        scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = jax.lax.top_k(scores, self.top_k)[0][:, -1:]
            scores = jnp.where(scores < least, LEAST, scores)
        if self.top_p < 1:
            ordered = jnp.sort(scores, axis=-1)[:, ::-1]
            share = jax.nn.softmax(ordered, axis=-1)
            # A token stays if the better ones do not reach top_p yet; so the best always stays.
            before = jnp.cumsum(share, axis=-1) - share
            allowed = jnp.where(before < self.top_p, ordered, jnp.inf)
            # The worst allowed score is the threshold, so tokens with equal scores stay or go
            # together.
            scores = jnp.where(scores < allowed.min(axis=-1, keepdims=True), LEAST, scores)
        return scores


class Generated(NamedTuple):
    """Generated texts after their prompts, padded, and their log-probabilities, the end included.

    With a length penalty these are divided by a power of the number of tokens.
    """

    tokens: Int[Array, "batch length"]
    scores: Float[Array, " batch"]


def generate(
    step: Step,
    cache: Cache,
    prompt: Int[Array, "batch prompt"],
    length: int,
    *,
    eos_id: int,
    pad_id: int,
    rng: PRNGKeyArray,
    sampling: Sampling = Sampling(),
) -> Generated:
    """Continues prompts of equal length, until all texts have ended or are `length` tokens long.

    The cache is empty and has room for prompt and text.
    """
    batch = prompt.shape[0]
    scores, cache = step(prompt, cache)
    empty = jnp.full((batch, length), pad_id, jnp.int32)

    def goes_on(carry: Any) -> Array:
        index, _, done, *_ = carry
        return (index < length) & ~done.all()

    def body(carry: Any) -> Any:
        index, tokens, done, total, scores, cache = carry
        token = sampling(scores, jax.random.fold_in(rng, index))
        log = jnp.take_along_axis(jax.nn.log_softmax(scores), token[:, None], axis=1)[:, 0]
        # `done` is from before this token, so the end of text itself still counts.
        total += jnp.where(done, 0, log)
        token = jnp.where(done, pad_id, token)  # a finished row stays in the batch
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, index, axis=1)
        done |= token == eos_id
        scores, cache = step(token[:, None], cache)
        return index + 1, tokens, done, total, scores, cache

    begin = (jnp.int32(0), empty, jnp.zeros(batch, bool), jnp.zeros(batch), scores, cache)
    _, tokens, _, total, *_ = jax.lax.while_loop(goes_on, body, begin)
    return Generated(tokens, total)


def beam_search(
    step: Step,
    cache: Cache,
    prompt: Int[Array, "batch prompt"],
    length: int,
    *,
    width: int,
    eos_id: int,
    pad_id: int,
    length_penalty: float = 0.0,
) -> Generated:
    """Finds a likely text for each prompt by beam search, with `width` beams for each.

    Args:
      cache: an empty cache for `batch * width` sequences, with room for prompt and text. The beams
        of a prompt are adjacent.
      length_penalty: texts are ranked by log-probability / (number of tokens) ** length_penalty (Wu
        et al. 2016, "GNMT", 7, without its constants); 0 ranks by log-probability.

    Raises:
      ValueError: `width` is below 1.
    """
    if width < 1:
        raise ValueError(f"the width of a beam search must be at least 1, not {width}")
    batch = prompt.shape[0]
    scores, cache = step(jnp.repeat(prompt, width, axis=0), cache)
    # All beams of a prompt start equal. Only the first counts, or all would stay equal for ever.
    total = jnp.where(jnp.arange(width) == 0, 0.0, LEAST) + jnp.zeros((batch, width))
    beams = _Beams(
        tokens=jnp.full((batch, width, length), pad_id, jnp.int32),
        done=jnp.zeros((batch, width), bool),
        total=total,
        count=jnp.zeros((batch, width), jnp.int32),
    )

    def body(index: Array, carry: Any) -> Any:
        beams, scores, cache = carry
        log = jax.nn.log_softmax(scores.reshape(batch, width, -1))
        # A text that has ended goes on with padding at no cost, so its score does not change.
        ended = jnp.where(jnp.arange(log.shape[-1]) == pad_id, 0.0, LEAST)
        log = jnp.where(beams.done[..., None], ended, log)
        beams, parent = beams.extended(log, index, eos_id, length_penalty)
        rows = (jnp.arange(batch)[:, None] * width + parent).reshape(-1)
        # A beam may continue another beam's text, so it takes over that beam's cache as well.
        of_parents = functools.partial(jnp.take, indices=rows, axis=1)
        own, context = jax.tree.map(of_parents, (cache.own, cache.context))
        token = jax.lax.dynamic_index_in_dim(beams.tokens, index, axis=2)
        scores, cache = step(token.reshape(-1, 1), cache.replace(own=own, context=context))
        return beams, scores, cache

    beams, *_ = jax.lax.fori_loop(0, length, body, (beams, scores, cache))
    value = _penalized(beams.total, beams.count, length_penalty)
    best = jnp.argmax(value, axis=1)
    chosen = jnp.take_along_axis(beams.tokens, best[:, None, None], axis=1)[:, 0]
    return Generated(chosen, jnp.take_along_axis(value, best[:, None], axis=1)[:, 0])


class _Beams(NamedTuple):
    """The texts in a beam search, filled up with padding.

    Attributes:
      total: the log-probability of each text.
      count: the number of tokens of each text, its end included.
    """

    tokens: Int[Array, "batch width length"]
    done: Bool[Array, "batch width"]
    total: Float[Array, "batch width"]
    count: Int[Array, "batch width"]

    def extended(
        self,
        log: Float[Array, "batch width vocab"],
        index: Int[Array, ""],
        eos_id: int,
        length_penalty: float,
    ) -> tuple[_Beams, Int[Array, "batch width"]]:
        """Returns the best texts that are one token longer, and the beam that each comes from."""
        batch, width, vocab = log.shape
        # Padding after the end is not counted.
        sums, counts = self.total[..., None] + log, self.count + ~self.done
        values = _penalized(sums, counts[..., None], length_penalty)
        # Beams and tokens in one row: several of the best may continue the same beam.
        _, best = jax.lax.top_k(values.reshape(batch, -1), width)
        parent, token = best // vocab, (best % vocab).astype(jnp.int32)

        def of_parents(x: Array) -> Array:
            places = parent.reshape(batch, width, *(1,) * (x.ndim - 2))
            return jnp.take_along_axis(x, places, axis=1)

        tokens = jax.lax.dynamic_update_index_in_dim(of_parents(self.tokens), token, index, axis=2)
        done = of_parents(self.done) | (token == eos_id)
        # The penalty ranks, but only the sums themselves add up over steps.
        total = jnp.take_along_axis(sums.reshape(batch, -1), best, axis=1)
        return _Beams(tokens, done, total, of_parents(counts)), parent


def _penalized(total: Array, count: Array, power: float) -> Array:
    return total / jnp.maximum(count, 1).astype(jnp.float32) ** power
