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

from vlp_jax.models.attention import SEE_ALL, AttentionMask
from vlp_jax.models.dense import norm
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
    """Returns the path at which `tapped` reports the attention of a layer, counted from 0."""
    return f"{tower}/encoder/layer_{layer}/attention"


def tapped(
    module: DualEncoder,
    params: Params,
    *inputs: Array,
    method: str = "__call__",
    edits: Mapping[str, Edit] | None = None,
) -> tuple[Any, Seen]:
    """Runs a method of a dual encoder, under jit; returns its result, and path -> what was seen.

    Each layer is seen by itself, under the path of its module:

    | path | value |
    |---|---|
    | `TOWER/encoder/layer_N/attention` | weights, float32 [batch, heads, tokens, tokens] |
    | `TOWER/pooling/attention` | weights of an attention pooling, [batch, heads, 1, tokens] |
    | `TOWER/encoder` | the tokens that the encoder ends in, [batch, tokens, width] |
    | `TOWER`, `TOWER_projection` | pooled features, before and after the projection |

    A weights' path with "/mixed" after it is what the model itself mixed with its own, unseen
    weights, [batch, tokens, heads, head_dim]; with "/value" the values that were mixed.

    `edits` maps a path to a function of the value there; its result takes that place in the rest of
    the pass, and the value is reported as it was before. Raises ValueError for an edit of a path
    that the method does not come by.
    """
    edits = dict(edits or {})
    taps = _Taps(edits)
    with nn.intercept_methods(taps):
        output = _plain(module).apply({"params": nn.unbox(params)}, *inputs, method=method)
    missing = sorted(set(edits) - set(taps.seen))
    if missing:
        raise ValueError(f"{method} does not come by {', '.join(missing)}")
    return output, taps.seen


def _plain(module: DualEncoder) -> DualEncoder:
    """The same model by XLA's attention, whose queries and keys can be seen, and without remat."""

    def plain(tower: nn.Module) -> nn.Module:
        # Under remat, what an interceptor sees would not be allowed to leave the layer.
        compute = dataclasses.replace(tower.compute, remat="none", attention="xla")
        return tower.clone(compute=compute)

    return module.clone(image=plain(module.image), text=plain(module.text))


def attention_weights(
    query: Float[Array, "batch query_tokens heads head_dim"],
    key: Float[Array, "batch tokens heads head_dim"],
    mask: AttentionMask,
) -> Float[Array, "batch heads query_tokens tokens"]:
    """Computes softmax(q k / sqrt(head_dim)) in float32 (Vaswani et al. 2017, 3.2.1)."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    logits = logits.astype(jnp.float32) * query.shape[-1] ** -0.5
    seen = mask.visible(*logits.shape[-2:])
    return jax.nn.softmax(logits if seen is None else jnp.where(seen, logits, _MASKED), axis=-1)


class _Taps:
    """Intercepts every method that the model calls while it is traced."""

    def __init__(self, edits: Mapping[str, Edit]):
        self.seen: Seen = {}
        self._edits = edits
        self._above = ""  # the path of the layer that is running, and a slash
        self._masks: dict[str, AttentionMask] = {}
        self._parts: dict[str, Array] = {}  # queries, keys and values, until they are used

    def __call__(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module, path = context.module, self._path(context.module)
        if context.method_name != "__call__" or not module.path:
            return call(*args, **kwargs)
        if isinstance(module, Encoder):
            return self._see(path, self._layers(module, path, *args, **kwargs))
        if isinstance(module, MultiHeadAttention):
            self._masks[path] = args[2] if len(args) > 2 else kwargs.get("mask", SEE_ALL)
        inside = isinstance(module.parent, MultiHeadAttention)
        if inside and module.name == "out":
            path = self._path(module.parent)
            return call(self._mix(module.parent, path, args[0]), **kwargs)
        output = call(*args, **kwargs)
        if inside:
            self._parts[path] = output
        elif path in TOWERS or path.endswith("_projection"):
            output = self._see(path, output)
        return output

    def _path(self, module: nn.Module) -> str:
        return self._above + "/".join(module.path)

    def _layers(
        self,
        encoder: Encoder,
        path: str,
        x: Array,
        mask: AttentionMask = SEE_ALL,
        train: bool = False,
    ) -> Array:
        """Does what the encoder does, one layer after the other.

        The encoder's own loop is traced once for all layers, so that nothing seen in it could be
        told apart or leave it.
        """
        config, compute = encoder.config, encoder.compute
        params = encoder.variables["params"]
        for layer in range(config.depth):
            self._above = f"{path}/layer_{layer}/"
            own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
            block = encoder.block(config, compute, parent=None)
            x = block.apply({"params": own}, x, None, mask)
        self._above = ""
        if encoder.final_norm:
            last = norm(config, compute.dtype, None).clone(parent=None)
            x = last.apply({"params": params["norm"]}, x)
        return x

    def _mix(self, module: MultiHeadAttention, path: str, mixed: Array) -> Array:
        """Returns the values mixed by the observed weights, the input of the output projection."""
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
