"""Rematerialization policies: which activations of a layer are kept for the backward pass.

All other activations are computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

# Names that layers give their activations, for policies: queries, keys and values, the heads'
# output before its projection, and the feed-forward layer's hidden units before their activation.
NAMES = ("query", "key", "value", "attention", "mlp_hidden")
# Mean and variance of each token in the norms: two numbers that save reading the whole token again.
STATISTICS = ("norm_mean", "norm_variance")

REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names(*NAMES, *STATISTICS),
    # Half the memory of "names": the first product of the feed-forward layer is repeated too.
    "names_lean": jax.checkpoint_policies.save_only_these_names(*NAMES[:-1], *STATISTICS),
    # The activations of "names" wait in the host's memory until the backward pass.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(STATISTICS),
        names_which_can_be_offloaded=list(NAMES),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
