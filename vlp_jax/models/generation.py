"""Texts from a decoder, token by token, inside of a compiled program: greedy, sampled, by beams.

A `Step` is `Decoder.step` of some parameters: (tokens [batch, tokens], cache) -> (the scores of the
next token [batch, vocab], the cache after them).
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
LEAST = -1e30  # the score of what is not to be chosen; finite, so that no difference of two is NaN


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Describes how the next token is chosen.

    Attributes:
      temperature: by which the scores are divided; 0 takes the best token always.
      top_k: only so many tokens of the best are chosen from; 0 for all.
      top_p: only the fewest tokens that have so much of the probability together (Holtzman et al.
        2020, "The Curious Case of Neural Text Degeneration", 3.1); 1 for all.

    Raises:
      ValueError: a number out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self.temperature < 0:
            raise ValueError(f"temperature is at least 0, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k is at least 0, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is above 0 and at most 1, not {self.top_p}")

    def __call__(
        self, scores: Float[Array, "batch vocab"], rng: PRNGKeyArray
    ) -> Int[Array, " batch"]:
        """A token for each row of scores."""
        if self.temperature == 0:
            return jnp.argmax(scores, axis=-1).astype(jnp.int32)
        return jax.random.categorical(rng, self.narrowed(scores)).astype(jnp.int32)

    def narrowed(self, scores: Float[Array, "batch vocab"]) -> Float[Array, "batch vocab"]:
        """The scores over the temperature, of the tokens that may be chosen; others are -1e30."""
        scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = jax.lax.top_k(scores, self.top_k)[0][:, -1:]
            scores = jnp.where(scores < least, LEAST, scores)
        if self.top_p < 1:
            ordered = jnp.sort(scores, axis=-1)[:, ::-1]
            share = jax.nn.softmax(ordered, axis=-1)
            before = jnp.cumsum(share, axis=-1) - share  # of the tokens that are better
            kept = jnp.where(before < self.top_p, ordered, jnp.inf)
            scores = jnp.where(scores < kept.min(axis=-1, keepdims=True), LEAST, scores)
        return scores


class Generated(NamedTuple):
    """Holds generated texts.

    Attributes:
      tokens: behind the prompt, up to the end of text, and then padding.
      scores: the log-probability of each text's tokens, the end of text included; divided by a
        power of their number where a length penalty was asked for.
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
    """Goes on with prompts of one length, until all have ended or have `length` tokens more.

    Args:
      cache: empty, with room for prompt and text.
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
        total += jnp.where(done, 0, log)
        token = jnp.where(done, pad_id, token)
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
    """The best of `width` texts that are followed side by side for each prompt.

    Args:
      cache: empty, for `batch * width` sequences, a prompt's side by side, with room for prompt and
        text.
      length_penalty: a text counts by its log-probability over (number of its tokens) to this power
        (Wu et al. 2016, "GNMT", 7, without its constants); 0 for none.

    Raises:
      ValueError: no beams.
    """
    if width < 1:
        raise ValueError(f"a beam search follows at least one text, not {width}")
    batch = prompt.shape[0]
    scores, cache = step(jnp.repeat(prompt, width, axis=0), cache)
    # At first all texts of a prompt are the same: the first alone may be gone on with.
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
        # A text that has ended goes on with padding, for nothing.
        ended = jnp.where(jnp.arange(log.shape[-1]) == pad_id, 0.0, LEAST)
        log = jnp.where(beams.done[..., None], ended, log)
        beams, parent = beams.extended(log, index, eos_id, length_penalty)
        rows = (jnp.arange(batch)[:, None] * width + parent).reshape(-1)
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
    """The texts that are followed for each prompt.

    Attributes:
      done: whether they have ended.
      total: their log-probabilities.
      count: of their tokens, the end of text included.
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
        """The best texts that are one token longer, and which each was before."""
        batch, width, vocab = log.shape
        sums, counts = self.total[..., None] + log, self.count + ~self.done
        values = _penalized(sums, counts[..., None], length_penalty)
        _, best = jax.lax.top_k(values.reshape(batch, -1), width)
        parent, token = best // vocab, (best % vocab).astype(jnp.int32)

        def of_parents(x: Array) -> Array:
            places = parent.reshape(batch, width, *(1,) * (x.ndim - 2))
            return jnp.take_along_axis(x, places, axis=1)

        tokens = jax.lax.dynamic_update_index_in_dim(of_parents(self.tokens), token, index, axis=2)
        done = of_parents(self.done) | (token == eos_id)
        total = jnp.take_along_axis(sums.reshape(batch, -1), best, axis=1)
        return _Beams(tokens, done, total, of_parents(counts)), parent


def _penalized(total: Array, count: Array, power: float) -> Array:
    return total / jnp.maximum(count, 1).astype(jnp.float32) ** power
