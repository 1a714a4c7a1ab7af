"""The functions of a model that a compiled artifact contains, from arrays to arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.interop import precision
from vlp_jax.interop.base import Extras
from vlp_jax.interop.trees import Module, Params, image_of, to_tree, with_dtype
from vlp_jax.models.coca import CoCa
from vlp_jax.models.dual_encoder import DualEncoder, l2_normalize
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.masking import kept_patches, mask_from_noise
from vlp_jax.models.vit import VisionTransformer
from vlp_jax.objectives.masked_autoencoding import MaskedAutoencoding

KINDS = (DualEncoder, CoCa, MaskedAutoencoder, VisionTransformer)
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Input:
    """An argument of a function. Its first dimension is a batch of any size.

    Attributes:
      name: the name of the argument.
      shape: the shape of one example.
      dtype: the name of the dtype.
      meaning: a description for users.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Function:
    """A function of a model, with the weights that it needs.

    Attributes:
      name: "embed_image", "embed_text" or "reconstruct".
      inputs: its arguments beside the weights.
      output: a description of the result for users.
      weights: the arrays that it needs, as they are stored (`precision.stored`).
      call: `call(weights, *inputs) -> array`.
    """

    name: str
    inputs: tuple[Input, ...]
    output: str
    weights: Mapping[str, np.ndarray]
    call: Callable[..., jax.Array]


def artifact_functions(
    module: Module, params: Params, extras: Extras, dtype: str = "float32"
) -> list[Function]:
    """Returns the functions that a model offers.

    Args:
      params: all parameters of the module (`vlp_jax.interop.trees`).
      extras: supplies the precision of stored weights, the normalization of pixels for an image
        tower alone, and the mask ratio of a masked autoencoder.
      dtype: dtype of the matrix products, one of `DTYPES`.
    """
    module = with_dtype(module, jnp.dtype(dtype))
    stored = precision.stored(params, extras.weights)
    image = Input(
        "image",
        (*image_of(module).image_size, 3),
        "uint8",
        "RGB pixels, resized and not normalized",
    )

    def make(
        name: str, inputs: tuple[Input, ...], output: str, body: Any, parts: tuple[str, ...]
    ) -> Function:
        needed = {key: x for key, x in stored.items() if key.split("/")[0] in parts}

        # Weights are restored within the program, so a file in int8 stays small in memory as well.
        def call(weights: Mapping[str, Any], *arrays: Any) -> jax.Array:
            tree = to_tree(module, precision.restored(weights))
            # One dtype of the results, in whatever dtype the products are computed.
            return body({"params": tree}, *arrays).astype(jnp.float32)

        return Function(name, inputs, output, needed, call)

    if isinstance(module, VisionTransformer):
        embed = _tower(module, extras)
        return [make("embed_image", (image,), "features", embed, ("image",))]
    if isinstance(module, MaskedAutoencoder):
        return _autoencoder(module, extras, image, make)
    text = Input(
        "text",
        (module.text.context_length,),
        "int32",
        "ids of tokens, framed and padded as tokenizer.json says",
    )

    def tower(method: str) -> Callable[..., jax.Array]:
        def embed(tree: Any, x: jax.Array) -> jax.Array:
            # The module's `setup` reads these two in every method.
            unused = dict.fromkeys(("logit_scale", "logit_bias"), jnp.zeros(()))
            return module.apply({"params": {**unused, **tree["params"]}}, x, method=method)

        return embed

    unit = "unit vectors"
    parts = ("image", "pooler", "image_projection"), ("text", "text_projection")
    return [
        make("embed_image", (image,), unit, tower("embed_image"), parts[0]),
        make("embed_text", (text,), unit, tower("embed_text"), parts[1]),
    ]


def _tower(module: VisionTransformer, extras: Extras) -> Callable[..., jax.Array]:
    def embed(tree: Any, image: jax.Array) -> jax.Array:
        return module.apply(tree, extras.pixels.normalize(image))

    return embed


def _autoencoder(
    module: MaskedAutoencoder, extras: Extras, image: Input, make: Callable[..., Function]
) -> list[Function]:
    objective = MaskedAutoencoding(module, extras.mask_ratio, extras.norm_pix_loss)
    patches = module.image.patches
    kept = kept_patches(patches, extras.mask_ratio)
    noise = Input(
        "noise", (patches,), "float32", f"of each patch; the {kept} with the least are seen"
    )

    def embed(tree: Any, image: jax.Array) -> jax.Array:
        return l2_normalize(module.apply(tree, image, method="features"))

    def reconstruct(tree: Any, image: jax.Array, noise: jax.Array) -> jax.Array:
        return objective.reconstruct(tree["params"], image, mask_from_noise(noise, kept))

    views = "[batch, 3, height, width, 3] in [0, 1]: what is seen, what is painted, the image"
    return [
        make("embed_image", (image,), "unit vectors", embed, ("image",)),
        make("reconstruct", (image, noise), views, reconstruct, ("image", "decoder")),
    ]
