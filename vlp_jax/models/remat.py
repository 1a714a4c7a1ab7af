"""What the backward pass keeps of a layer; everything else it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

# What a layer names of its activations, so that a policy can speak of it: queries, keys and values,
# the heads' output before it is projected, and the feed-forward layer before its activation.
NAMES = ("query", "key", "value", "attention", "mlp_hidden")
# Mean and variance of each token in the norms: two numbers, for which it would be read again.
STATISTICS = ("norm_mean", "norm_variance")

REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names(*NAMES, *STATISTICS),
    # Half of it: the first product of the feed-forward layer is done again too.
    "names_lean": jax.checkpoint_policies.save_only_these_names(*NAMES[:-1], *STATISTICS),
    # All of it, in the memory of the host while it is not needed.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(STATISTICS),
        names_which_can_be_offloaded=list(NAMES),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
