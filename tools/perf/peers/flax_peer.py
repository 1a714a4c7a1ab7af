"""A dual encoder out of Flax's and Optax's own parts, with none of our optimizations.

Layers are a scan without rematerialization, attention is Flax's, the loss holds all logits, the
optimizer is Optax's, and the step is jitted with the state donated, on one device. It shares no
code with our models.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from tools.perf.jax_step import program_bytes, timed_steps
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.values import PLAIN_LAYERS, tower_fields
from vlp_jax.objectives import Objective
from vlp_jax.objectives.contrastive import Contrastive
from vlp_jax.training.setup import Setup

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}
IMAGE_POOLINGS = ("cls", "mean", "map")
TEXT_POOLINGS = ("eos", "argmax", "first", "last")
# Printed below the table, so that nobody takes the ratio for more than it is.
NOTES = (
    "one device; Flax's own layers as a scan without remat, Optax's own AdamW, all logits at once",
    "no check of the gradients, and no skipped steps",
)


def refusal(objective: Objective) -> str | None:
    """Returns why there is no such model for `objective`; None if there is."""
    if not isinstance(objective, Contrastive):
        return f"it trains image with text, not {type(objective).__name__}"
    image, text = objective.model.image, objective.model.text
    if objective.mask_ratio:
        return "it sees whole images"
    if any(tower.transformer.activation not in ACTIVATIONS for tower in (image, text)):
        return f"its activation is one of {', '.join(ACTIVATIONS)}"
    if image.pooling not in IMAGE_POOLINGS or text.pooling not in TEXT_POOLINGS:
        return f"it pools images by {IMAGE_POOLINGS} and texts by {TEXT_POOLINGS}"
    # Each line below is a part that Flax has no module for.
    if image.position != "learned" or image.norm_after_pool or not image.class_position:
        return "its positions are learned, of all tokens, and its last norm is before the pooling"
    unknown = ("registers", "qk_norm", "layer_scale", "stochastic_depth", "padding_mask")
    for fields in map(tower_fields, (image, text)):
        for name in unknown:
            if fields.get(name):
                return f"it has no {name}"
        for name, value in PLAIN_LAYERS.items():
            if fields[name] != value:
                return f"its layers have {name} {value!r}"
    return None


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, as a body of `nn.scan`."""

    heads: int
    mlp_dim: int
    activation: str
    eps: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Array | None
    ) -> tuple[Float[Array, "batch tokens width"], None]:
        y = nn.LayerNorm(self.eps, dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y, mask=mask)
        y = nn.LayerNorm(self.eps, dtype=self.dtype)(x)
        y = nn.Dense(self.mlp_dim, dtype=self.dtype)(y)
        y = ACTIVATIONS[self.activation](y)
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(y), None


def _layers(tower: Any, x: Array, mask: Array | None) -> Array:
    """Applies all layers of `tower`, and the last LayerNorm."""
    scan = nn.scan(
        Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=tower.transformer.depth,
    )
    config, dtype = tower.transformer, tower.compute.dtype
    # A scan compiles one layer, however deep the tower is.
    made = scan(config.heads, config.mlp_dim, config.activation, config.norm_eps, dtype)
    x, _ = made(x, mask)
    return nn.LayerNorm(config.norm_eps, dtype=dtype)(x)


class ImageTower(nn.Module):
    """A Vision Transformer of the sizes of `like`."""

    like: Any

    @nn.compact
    def __call__(
        self, image: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch embedding"]:
        like, config, dtype = self.like, self.like.transformer, self.like.compute.dtype
        patch = (like.patch_size, like.patch_size)
        x = nn.Conv(like.width, patch, patch, use_bias=like.patch_bias, dtype=dtype)(image)
        x = x.reshape(x.shape[0], -1, like.width)
        if like.class_token:
            token = self.param("class_token", nn.initializers.normal(0.02), (1, 1, like.width))
            token = jnp.broadcast_to(token, (x.shape[0], 1, like.width)).astype(dtype)
            x = jnp.concatenate([token, x], axis=1)
        x = x + _positions(self, x)
        if like.pre_norm:
            x = nn.LayerNorm(config.norm_eps, dtype=dtype)(x)
        x = _layers(like, x, None)
        if like.pooling == "cls":
            return x[:, 0]
        if like.pooling == "mean":
            return x[:, int(like.class_token) :].mean(axis=1)
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, like.width))
        probe = jnp.broadcast_to(probe, (x.shape[0], 1, like.width)).astype(dtype)
        x = nn.MultiHeadDotProductAttention(config.heads, dtype=dtype)(probe, x)
        y = nn.LayerNorm(config.norm_eps, dtype=dtype)(x)
        y = nn.Dense(config.mlp_dim, dtype=dtype)(y)
        y = ACTIVATIONS[config.activation](y)
        return (x + nn.Dense(like.width, dtype=dtype)(y))[:, 0]


class TextTower(nn.Module):
    """A text Transformer of the sizes of `like`."""

    like: Any

    @nn.compact
    def __call__(self, text: Int[Array, "batch tokens"]) -> Float[Array, "batch embedding"]:
        like = self.like
        x = nn.Embed(like.vocab_size, like.width, dtype=like.compute.dtype)(text)
        x = x + _positions(self, x)
        x = _layers(like, x, nn.make_causal_mask(text) if like.causal else None)
        if like.pooling in ("eos", "argmax"):
            # "argmax": OpenAI's CLIP takes the largest id, which is its end of text.
            marks = text == like.eos_id if like.pooling == "eos" else text
            return jnp.take_along_axis(x, marks.argmax(axis=1)[:, None, None], axis=1)[:, 0]
        return x[:, 0 if like.pooling == "first" else -1]


def _positions(module: nn.Module, x: Array) -> Array:
    shape = (1, *x.shape[1:])
    return module.param("positions", nn.initializers.normal(0.02), shape).astype(x.dtype)


class FlaxDualEncoder(nn.Module):
    """Both towers and the scale and bias of the logits."""

    like: DualEncoder

    @nn.compact
    def __call__(
        self, image: UInt8[Array, "batch height width 3"], text: Int[Array, "batch tokens"]
    ) -> tuple[Float[Array, "batch embedding"], Float[Array, "batch embedding"], Array, Array]:
        """Returns (unit vectors of images, of texts, scale, bias)."""
        like = self.like
        # Pixels are normalized within the step, as ours does.
        image = ImageTower(like.image)(like.pixels.normalize(image))
        text = TextTower(like.text)(text)
        if like.image_head != "none":
            image = nn.Dense(like.embed_dim, use_bias=like.image_head == "linear_bias")(image)
        if like.text_head != "none":
            text = nn.Dense(like.embed_dim, use_bias=like.text_head == "linear_bias")(text)
        scale = self.param("scale", nn.initializers.constant(like.logit_scale_init), ())
        bias = jnp.float32(0)
        if like.logit_bias_init is not None:
            bias = self.param("bias", nn.initializers.constant(like.logit_bias_init), ())
        return _unit(image), _unit(text), jnp.exp(scale), bias


def _unit(x: Array) -> Array:
    # Cosines of bfloat16 vectors would be off in the third digit.
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def contrastive_loss(
    image: Float[Array, "batch embedding"],
    text: Float[Array, "batch embedding"],
    scale: Array,
    bias: Array,
    kind: str,
) -> Float[Array, ""]:
    """Computes CLIP's loss ("softmax") or SigLIP's ("sigmoid"), out of Optax's."""
    logits = image @ text.T * scale + bias
    if kind == "sigmoid":
        return optax.sigmoid_binary_cross_entropy(logits, jnp.eye(len(logits))).sum(-1).mean()
    labels = jnp.arange(len(logits))
    both = (logits, logits.T)
    losses = [optax.softmax_cross_entropy_with_integer_labels(x, labels).mean() for x in both]
    return sum(losses) / 2


def make_optimizer(config: Mapping[str, Any]) -> optax.GradientTransformation:
    """Makes AdamW with the settings of `config.optimizer`, at a constant rate."""
    adamw = optax.adamw(
        config["learning_rate"],
        b1=config["b1"],
        b2=config["b2"],
        eps=config["eps"],
        weight_decay=config["weight_decay"],
    )
    clip = config["clip_norm"]
    return optax.chain(optax.clip_by_global_norm(clip), adamw) if clip else adamw


@dataclasses.dataclass(frozen=True)
class FlaxModel:
    """The model of an objective, with the step that trains it."""

    module: FlaxDualEncoder
    optimizer: optax.GradientTransformation
    kind: str

    @classmethod
    def of(cls, objective: Contrastive, optimizer: Mapping[str, Any]) -> FlaxModel:
        """Makes the model with the sizes of `objective`."""
        module = FlaxDualEncoder(objective.model)
        return cls(module, make_optimizer(optimizer), objective.pairwise_loss)

    def init(self, batch: Mapping[str, Array]) -> tuple[Any, Any]:
        """Returns (parameters, state of the optimizer)."""
        params = jax.jit(self.module.init)(jax.random.key(0), batch["image"], batch["text"])
        return params, self.optimizer.init(params)

    def loss(self, params: Any, batch: Mapping[str, Array]) -> Array:
        """Returns the loss of a batch."""
        return contrastive_loss(
            *self.module.apply(params, batch["image"], batch["text"]), self.kind
        )

    def step(
        self, state: tuple[Any, Any], batch: Mapping[str, Array]
    ) -> tuple[tuple[Any, Any], Array]:
        """Returns (state, loss) after one update."""
        params, moments = state
        loss, grads = jax.value_and_grad(self.loss)(params, batch)
        updates, moments = self.optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss


class FlaxStep:
    """A `Contender`: the step of `FlaxModel`, on the first device of `setup`.

    Args:
      batch: a global one of `setup`.
      differences: further notes.
    """

    def __init__(
        self,
        name: str,
        setup: Setup,
        batch: Mapping[str, np.ndarray],
        differences: Sequence[str],
    ):
        device = setup.mesh.devices.flat[0]
        model = FlaxModel.of(setup.objective, setup.config.optimizer)
        self.name, self.notes = name, (*NOTES, *differences)
        self._batch = jax.device_put(dict(batch), device)
        self._state = model.init(self._batch)
        begin = time.perf_counter()
        # Without donation the state would be held twice, which nobody does on purpose.
        step = jax.jit(model.step, donate_argnums=0)
        self._program = step.lower(self._state, self._batch).compile()
        self.facts: dict[str, Any] = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self._state[0])),
            "devices": 1,
            "compile_seconds": {"cold": time.perf_counter() - begin},
            "program_bytes": program_bytes(self._program),
        }

    def run(self, steps: int) -> list[float]:
        """Trains `steps` steps; the seconds of each."""
        self._state, seconds = timed_steps(self._program, self._state, self._batch, steps)
        return seconds
