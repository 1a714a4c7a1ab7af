"""Describes which keys each query may attend to: causal, prefix, lengths, segments, explicit."""

from __future__ import annotations

from collections.abc import Collection

import flax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

CAUSAL, LENGTHS = "causal", "lengths"
KINDS = (CAUSAL, "offset", "prefix", LENGTHS, "segments", "explicit")


@flax.struct.dataclass
class AttentionMask:
    """Describes which keys each query sees: the keys that all given rules allow.

    For 4 tokens, rows are queries, columns are keys, and x is "sees":

        causal        prefix=2      lengths=3     segments=0011
        x . . .       x x . .       x x x .       x x . .
        x x . .       x x . .       x x x .       x x . .
        x x x .       x x x .       x x x .       . . x x
        x x x x       x x x x       x x x .       . . x x

    Attributes:
      causal: query i sees keys 0 to i.
      offset: needs `causal`. The position of the first query among the keys, for decoding with a
        cache; None for 0.
      prefix: needs `causal`. All queries of an example see its first `prefix` keys (Raffel et al.
        2020, "T5", 3.2.1).
      lengths: only the first `lengths` keys of each example are seen; at least 1.
      segments: the segment of each token. A query sees the keys of its segment alone, so several
        texts can share a sequence. Queries and keys must be the same tokens.
      explicit: True where a query sees a key; a dimension of size 1 is broadcast.
    """

    causal: bool = flax.struct.field(pytree_node=False, default=False)
    offset: Int[Array, ""] | None = None
    prefix: Int[Array, " batch"] | None = None
    lengths: Int[Array, " batch"] | None = None
    segments: Int[Array, "batch tokens"] | None = None
    explicit: Bool[Array, "#batch #heads #queries #keys"] | None = None

    def kinds(self) -> tuple[str, ...]:
        """Returns the names of the given rules, from `KINDS`.

        Raises:
          ValueError: a prefix or an offset without `causal`.
        """
        for name in ("prefix", "offset"):
            if getattr(self, name) is not None and not self.causal:
                raise ValueError(f"a mask with {name} needs causal=True: without it all see all")
        # False becomes None, so that all rules are tested alike; the order is the order of KINDS.
        rules = (self.causal or None, self.offset, self.prefix, self.lengths, self.segments)
        given = (*rules, self.explicit)
        return tuple(kind for kind, value in zip(KINDS, given, strict=True) if value is not None)

    def check(self, who: str, holds: Collection[str]) -> None:
        """Raises ValueError if an attention backend does not support a rule of this mask.

        Args:
          who: the backend's name.
          holds: the rules that it supports, from `KINDS`.
        """
        refused = [kind for kind in self.kinds() if kind not in holds]
        if refused:
            raise ValueError(
                f"attention {who!r} holds no mask with {' and '.join(refused)} (it holds: "
                f"{', '.join(holds) or 'none'}); take attention 'xla'"
            )

    def visible(self, queries: int, keys: int) -> Bool[Array, "#batch #heads queries keys"] | None:
        """Makes the mask as an array, True where a query sees a key; None if no rule is given.

        Raises:
          ValueError: see `kinds`; or segments whose length differs from queries or keys.
        """
        row, column = jnp.arange(queries)[:, None], jnp.arange(keys)
        if self.offset is not None:
            # Queries begin at `offset`, keys at 0: the cache holds the keys before them.
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
            rules.append(self.segments[:, None, :, None] == self.segments[:, None, None, :])
        if self.explicit is not None:
            rules.append(self.explicit)
        if not rules:
            return None
        seen = rules[0]
        for rule in rules[1:]:
            seen = seen & rule
        return seen.reshape((1,) * (4 - seen.ndim) + seen.shape)  # causal alone is 2-dimensional


SEE_ALL = AttentionMask()
