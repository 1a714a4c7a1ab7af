"""Who sees whom in attention, as one value: causal, prefix, lengths, segments, or any choice."""

from __future__ import annotations

from collections.abc import Collection

import flax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

CAUSAL, LENGTHS = "causal", "lengths"
KINDS = (CAUSAL, "offset", "prefix", LENGTHS, "segments", "explicit")


@flax.struct.dataclass
class AttentionMask:
    """Describes which keys each query sees: those that every rule that is given lets it see.

    Attributes:
      causal: query i sees keys up to i alone.
      offset: with `causal`, the place of the first query among the keys, for queries that come
        later (a cache); None for 0.
      prefix: with `causal`, the keys of each example that all of its queries see, from the first on
        (Raffel et al. 2020, "T5", 3.2.1).
      lengths: of each example only the first so many keys are seen; at least 1.
      segments: the number of a segment for each token; a query sees keys of its own alone, so that
        several texts can be one sequence. Queries and keys are the same tokens.
      explicit: what is True is seen; a dimension of 1 is for all.
    """

    causal: bool = flax.struct.field(pytree_node=False, default=False)
    offset: Int[Array, ""] | None = None
    prefix: Int[Array, " batch"] | None = None
    lengths: Int[Array, " batch"] | None = None
    segments: Int[Array, "batch tokens"] | None = None
    explicit: Bool[Array, "#batch #heads #queries #keys"] | None = None

    def kinds(self) -> tuple[str, ...]:
        """The rules that are given.

        Raises:
          ValueError: a prefix or an offset without `causal`.
        """
        for name in ("prefix", "offset"):
            if getattr(self, name) is not None and not self.causal:
                raise ValueError(f"a mask with {name} needs causal=True: without it all see all")
        rules = (self.causal or None, self.offset, self.prefix, self.lengths, self.segments)
        given = (*rules, self.explicit)
        return tuple(kind for kind, value in zip(KINDS, given, strict=True) if value is not None)

    def check(self, who: str, holds: Collection[str]) -> None:
        """Raises ValueError if an attention does not hold a rule, with what to take.

        Args:
          who: the attention's name.
          holds: names in `KINDS`.
        """
        refused = [kind for kind in self.kinds() if kind not in holds]
        if refused:
            raise ValueError(
                f"attention {who!r} holds no mask with {' and '.join(refused)} (it holds: "
                f"{', '.join(holds) or 'none'}); take attention 'xla'"
            )

    def visible(self, queries: int, keys: int) -> Bool[Array, "#batch #heads queries keys"] | None:
        """The mask as an array, True where a query sees a key; None where all see all.

        Raises:
          ValueError: see `kinds`; or segments whose tokens are not both queries and keys.
        """
        row, column = jnp.arange(queries)[:, None], jnp.arange(keys)
        if self.offset is not None:
            row = row + self.offset
        rules = []
        if CAUSAL in self.kinds():
            seen = column <= row
            if self.prefix is not None:
                seen = seen | (column < self.prefix[:, None, None, None])
            rules.append(seen)
        if self.lengths is not None:
            rules.append(column < self.lengths[:, None, None, None])
        if self.segments is not None:
            if not self.segments.shape[1] == queries == keys:
                raise ValueError(
                    f"segments of {self.segments.shape[1]} tokens are not for {queries} queries "
                    f"and {keys} keys"
                )
            own = self.segments[:, None, :, None] == self.segments[:, None, None, :]
            rules.append(own)
        if self.explicit is not None:
            rules.append(self.explicit)
        if not rules:
            return None
        seen = rules[0]
        for rule in rules[1:]:
            seen = seen & rule
        return seen.reshape((1,) * (4 - seen.ndim) + seen.shape)


SEE_ALL = AttentionMask()
