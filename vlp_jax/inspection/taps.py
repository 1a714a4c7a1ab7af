"""A forward pass that shows its inside: attention weights, tokens and features, read or changed.

Nothing in `vlp_jax.models` knows of this: Flax lets a method be intercepted from outside while the
model is traced (`nn.intercept_methods`), so that a training step compiles to what it always was.
`jax.nn.dot_product_attention` gives no weights away; they are computed again here from the queries
and keys that the model made, and it is they that mix the values in a tapped pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlp_jax.models.attention_mask import SEE_ALL, AttentionMask
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.heads import MultiHeadAttention
from vlp_jax.models.layers import Encoder

Params = Any
Edit = Callable[[Array], Array]
Seen = dict[str, Array]

TOWERS = ("image", "text")
POOLING = "pooling/attention"
_MASKED = -1e30


def layer_path(tower: str, layer: int) -> str:
    """Where the attention of a layer, counted from 0, is found in what `tapped` has seen."""
    return f"{tower}/encoder/layer_{layer}/attention"


def tapped(
    module: DualEncoder,
    params: Params,
    *inputs: Array,
    method: str = "__call__",
    edits: Mapping[str, Edit] | None = None,
) -> tuple[Any, Seen]:
    """Runs a method of a dual encoder and tells what happened inside. To be called under jit.

    What is seen has the path of the module that made it, as its parameters have it with
    `scan_layers` off:

    | path | what |
    |---|---|
    | `TOWER/encoder/layer_N/attention` | weights, float32 [batch, heads, tokens, tokens] |
    | `TOWER/pooling/attention` | weights of an attention pooling, [batch, heads, 1, tokens] |
    | `TOWER/encoder` | the tokens that the encoder ends in, [batch, tokens, width] |
    | `TOWER`, `TOWER_projection` | pooled features, before and after the projection |

    A weights' path with "/mixed" after it is what the model itself mixed with its own, unseen
    weights, [batch, tokens, heads, head_dim]; with "/value" the values that were mixed.

    Args:
      params: the parameters, boxed or not, of layers stacked or not.
      inputs: of the method.
      edits: path -> a function of what is seen there; its result takes that place in the rest of
        the pass. What is reported is as it was before.

    Returns:
      What the method returns, and path -> what was seen.

    Raises:
      ValueError: an edit of something that the method does not come by.
    """
    edits = dict(edits or {})
    plain, tree = unrolled(module), unrolled_params(module, params)
    taps = _Taps(edits)
    with nn.intercept_methods(taps):
        output = plain.apply({"params": tree}, *inputs, method=method)
    missing = sorted(set(edits) - set(taps.seen))
    if missing:
        raise ValueError(f"{method} does not come by {', '.join(missing)}")
    return output, taps.seen


def unrolled(module: DualEncoder) -> DualEncoder:
    """The same model with its layers one by one, so that each of them can be told apart."""

    # Under remat, what an interceptor sees would not be allowed to leave the layer.
    def plain(tower: nn.Module) -> nn.Module:
        compute = dataclasses.replace(
            tower.compute, scan_layers=False, remat="none", attention="xla"
        )
        return tower.clone(compute=compute)

    return module.clone(image=plain(module.image), text=plain(module.text))


def unrolled_params(module: DualEncoder, params: Params) -> dict[str, Any]:
    """The parameters that `unrolled` takes, from those of the module."""
    tree = dict(nn.unbox(params))
    for tower in TOWERS:
        if not getattr(module, tower).compute.scan_layers:
            continue
        encoder = dict(tree[tower]["encoder"])
        stacked = encoder.pop("layers")
        for layer in range(getattr(module, tower).transformer.depth):
            encoder[f"layer_{layer}"] = jax.tree.map(lambda x, layer=layer: x[layer], stacked)
        tree[tower] = {**tree[tower], "encoder": encoder}
    return tree


def attention_weights(
    query: Float[Array, "batch query_tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    mask: AttentionMask,
) -> Float[Array, "batch heads query_tokens tokens"]:
    """softmax(q k / sqrt(head_dim)) over what may be seen, in float32 (Vaswani et al. 2017, 3.2.1).

    Args:
      mask: who sees whom.
    """
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    logits = logits.astype(jnp.float32) * query.shape[-1] ** -0.5
    seen = mask.visible(*logits.shape[-2:])
    return jax.nn.softmax(logits if seen is None else jnp.where(seen, logits, _MASKED), axis=-1)


class _Taps:
    """The interceptor: sees every method that is called while the model is traced."""

    def __init__(self, edits: Mapping[str, Edit]):
        self.seen: Seen = {}
        self._edits = edits
        self._masks: dict[str, AttentionMask] = {}
        self._parts: dict[str, Array] = {}  # queries, keys and values, until they are used

    def __call__(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module, path = context.module, "/".join(context.module.path)
        if context.method_name != "__call__" or not path:
            return call(*args, **kwargs)
        if isinstance(module, MultiHeadAttention):
            self._masks[path] = args[2] if len(args) > 2 else kwargs.get("mask", SEE_ALL)
        inside = isinstance(module.parent, MultiHeadAttention)
        if inside and module.name == "out":
            path = "/".join(module.parent.path)
            return call(self._mix(module.parent, path, args[0]), **kwargs)
        output = call(*args, **kwargs)
        if inside:
            self._parts[path] = output
        elif isinstance(module, Encoder) or path in TOWERS or path.endswith("_projection"):
            output = self._see(path, output)
        return output

    def _mix(self, module: MultiHeadAttention, path: str, mixed: Array) -> Array:
        """What goes to the output projection: values mixed by weights that are seen."""
        norm = "_norm" if module.config.qk_norm else ""
        query, key = (self._parts[f"{path}/{name}{norm}"] for name in ("query", "key"))
        value = self._parts[f"{path}/value"]
        weights = attention_weights(query, key, self._masks[path])
        self.seen[f"{path}/mixed"], self.seen[f"{path}/value"] = mixed, value
        weights = self._see(path, weights)
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)

    def _see(self, path: str, value: Array) -> Array:
        self.seen[path] = value
        return self._edits[path](value) if path in self._edits else value
