"""Values that describe a model: what its layers compute, how, and how pixels are normalized."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

# Images as stored, or float32 with values in [0, 255]: a computed image, such as an adversarial
# one, must not be rounded.
Images = (
    UInt8[Array, "*batch image_height image_width 3"]
    | Float[Array, "*batch image_height image_width 3"]
)
Tower = TypeVar("Tower", bound=nn.Module)
NORMS = ("layer", "rms")


def check_choice(what: str, name: str, known: Sequence[str]) -> None:
    """Raises ValueError if `name` is not one of `known`."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r} (known: {', '.join(known)})")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Describes what the layers of a Transformer compute. Sizes must fit each other (ValueError).

    Attributes:
      width: width of the residual stream.
      depth: number of layers.
      mlp_dim: hidden width of the feed-forward layer.
      heads: heads of the queries.
      kv_heads: heads of the keys and values; each serves `heads / kv_heads` heads of queries
        (Ainslie et al. 2023, "GQA"). None for as many as `heads`.
      head_dim: width of a head; None for `width / heads`.
      activation: a name in `layers.ACTIVATIONS`.
      gated: the feed-forward layer has two input products, and multiplies the activation of one
        by the other (Shazeer 2020, "GLU Variants Improve Transformer").
      norm: "layer" (Ba et al. 2016) or "rms" (Zhang and Sennrich 2019).
      norm_eps: added to the variance, or to the mean square.
      bias: whether products and norms have biases ("rms" never has one).
      qk_norm: normalizes queries and keys of each head (Dehghani et al. 2023, "ViT-22B", 2.2).
      layer_scale: initial `LayerScale` of both branches; None for none.
      stochastic_depth: chance that a branch of the last layer is left out in training; it rises
        linearly from 0 at the first (Huang et al. 2016, "Deep Networks with Stochastic Depth").
      rope: base of the wavelengths of rotary positions, 10,000 as published (Su et al. 2021,
        "RoFormer"); None for none.
    """

    width: int
    depth: int
    mlp_dim: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    activation: str = "gelu_tanh"
    gated: bool = False
    norm: str = "layer"
    norm_eps: float = 1e-6
    bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    stochastic_depth: float = 0.0
    rope: float | None = None

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        if self.heads < 1 or (self.head_dim is None and self.width % self.heads):
            raise ValueError(f"{self.heads} heads do not divide the width {self.width}")
        if self.head_width < 1:
            raise ValueError(f"head_dim must be at least 1, not {self.head_width}")
        if self.key_heads < 1 or self.heads % self.key_heads:
            raise ValueError(f"{self.key_heads} kv_heads do not divide the {self.heads} heads")
        if self.rope is not None and self.head_width % 2:
            raise ValueError(f"rope needs heads of an even width, not {self.head_width}")

    @property
    def head_width(self) -> int:
        """The width of a head's query, key or value."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def key_heads(self) -> int:
        """The number of heads of the keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """Describes how layers are computed. No field changes the model or its parameters' values.

    Attributes:
      dtype: dtype of the computation. Parameters are float32.
      attention: the attention backend, a name in `attention.ATTENTIONS`. There is no fallback: a
        backend that does not support the shapes raises.
      quantization: "none" or "fp8", see `models.dense`.
      remat: "none", or a name in `layers.REMAT_POLICIES`: what the backward pass computes again.
      scan_layers: the program loops over the layers, so that it takes no longer to compile for more
        of them; False writes the loop out, and may run faster. Parameters are stacked either way.
    """

    dtype: Any = jnp.float32
    attention: str = "xla"
    quantization: str = "none"
    remat: str = "none"
    scan_layers: bool = True

    def unquantized(self) -> ComputeConfig:
        """Returns a copy without quantization, for the first and the last product of a model."""
        return dataclasses.replace(self, quantization="none")


PLAIN = ComputeConfig()


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The normalization of pixels: each channel, scaled to [0, 1], minus `mean`, over `std`."""

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def normalize(self, image: Images) -> Float[Array, "*batch height width 3"]:
        """Computes (x / 255 - mean) / std of pixels in [0, 255], in float32."""
        scaled = image.astype(jnp.float32) / 255.0
        return (scaled - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)


# Mean and standard deviation of ImageNet, as in He et al. 2022 (MAE) and torchvision.
IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Fields for which published image and text towers have the default. Weight formats that cannot
# express anything else check their models against this.
PLAIN_LAYERS = {
    field.name: field.default
    for field in dataclasses.fields(TransformerConfig)
    if field.name in ("kv_heads", "head_dim", "norm", "gated", "bias", "rope")
}

_TRANSFORMER = tuple(field.name for field in dataclasses.fields(TransformerConfig))
# Flax's own fields of a module, and the two values that a tower passes on whole.
_NO_FIELDS = ("parent", "name", "transformer", "compute")


def make_tower(
    kind: Callable[..., Tower],
    compute: ComputeConfig = PLAIN,
    variant: str | None = None,
    **fields: Any,
) -> Tower:
    """Makes a module of class `kind` from fields of the class and of its `TransformerConfig`.

    Args:
      variant: a name in `VARIANTS`, whose sizes hold where `fields` do not say otherwise.

    Raises:
      ValueError: an unknown variant, a size that is missing, or sizes that do not fit each other.
      TypeError: an unknown field.
    """
    own = {name: value for name, value in fields.items() if name not in _TRANSFORMER}
    layers = {name: value for name, value in fields.items() if name in _TRANSFORMER}
    # parent=None, or a tower made within another module's method would become its submodule.
    return kind(transformer=size_of(variant, **layers), compute=compute, parent=None, **own)


def tower_fields(tower: nn.Module) -> dict[str, Any]:
    """Returns the fields of a tower and its `TransformerConfig`: arguments of `make_tower`."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(tower):
        if field.name == "transformer":
            fields |= vars(tower.transformer)
        elif field.name not in _NO_FIELDS:
            fields[field.name] = getattr(tower, field.name)
    return fields


def keywords_of(
    *sources: Any, without: Collection[str] = (), optional: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function with `**fields` so that its signature lists the possible names.

    The sections of a config are checked against this signature, and `help` shows it.

    Args:
      sources: dataclasses or functions whose fields or keyword arguments `**fields` may contain.
        A parameter that the function declares itself takes precedence.
      without: names that the function does not take.
      optional: gives parameters without a default the default None.
    """
    kinds = inspect.Parameter

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        named = {n: p for n, p in signature.parameters.items() if p.kind is not kinds.VAR_KEYWORD}
        for source in sources:
            for name, parameter in inspect.signature(source).parameters.items():
                if name in (*named, *_NO_FIELDS, *without):
                    continue
                missing = optional and parameter.default is kinds.empty
                # Keyword-only: several sources have no common order of arguments.
                named[name] = parameter.replace(
                    kind=kinds.KEYWORD_ONLY, default=None if missing else parameter.default
                )
        function.__signature__ = signature.replace(parameters=list(named.values()))
        function.keyword_sources = sources
        return function

    return decorate


# Sizes of published Transformers, under their usual names. Ti, S: Touvron et al. 2021 (DeiT), table
# 1; B, L, H: Dosovitskiy et al. 2021 (ViT), table 1; g, G: Zhai et al. 2022 (Scaling Vision
# Transformers), table 2; e: Chen et al. 2023 (PaLI); So400m: Alabdulmohsin et al. 2023 (Getting ViT
# in Shape); M, g-opt, G-opt and mu, a test size: google-research/big_vision, models/vit.py.
VARIANTS: dict[str, TransformerConfig] = {  # width, depth, mlp_dim, heads
    "mu": TransformerConfig(32, 1, 128, 2),
    "Ti": TransformerConfig(192, 12, 768, 3),
    "S": TransformerConfig(384, 12, 1536, 6),
    "M": TransformerConfig(512, 12, 2048, 8),
    "B": TransformerConfig(768, 12, 3072, 12),
    "L": TransformerConfig(1024, 24, 4096, 16),
    "So400m": TransformerConfig(1152, 27, 4304, 16),
    "H": TransformerConfig(1280, 32, 5120, 16),
    "g": TransformerConfig(1408, 40, 6144, 16),
    "g-opt": TransformerConfig(1536, 40, 6144, 16),
    "G": TransformerConfig(1664, 48, 8192, 16),
    "G-opt": TransformerConfig(1536, 48, 8192, 16),
    "e": TransformerConfig(1792, 56, 15360, 16),
}
SIZES = ("width", "depth", "mlp_dim", "heads")  # what a variant says


def size_of(variant: str | None, **overrides: Any) -> TransformerConfig:
    """Returns the layers of `variant`, with each override that is not None in its place.

    Without a variant the overrides must give all of `SIZES`; for errors see `make_tower`.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if variant is None:
        missing = [size for size in SIZES if size not in given]
        if missing:
            raise ValueError(f"set variant, such as 'B', or else also {', '.join(missing)}")
        return TransformerConfig(**given)
    check_choice("variant", variant, tuple(VARIANTS))
    return dataclasses.replace(VARIANTS[variant], **given)


def split_variant(variant: str | None, patch_size: int | None = None) -> tuple[str | None, int]:
    """Splits "B/16" into ("B", 16), or takes `patch_size`; ValueError if neither has a size."""
    name, slash, patch = (variant or "").partition("/")
    if patch_size is None and patch.isdigit():
        patch_size = int(patch)
    if (slash and not patch.isdigit()) or not patch_size or patch_size < 1:
        raise ValueError(
            "an image variant is SIZE/PATCH, such as 'B/16', unless patch_size is set; got "
            f"variant={variant!r}, patch_size={patch_size!r}"
        )
    return name or None, patch_size
