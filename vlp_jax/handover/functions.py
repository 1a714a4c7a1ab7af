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
from vlp_jax.models.dual_encoder import l2_normalize
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.masking import kept_patches, mask_from_noise
from vlp_jax.models.vit import VisionTransformer
from vlp_jax.objectives.masked_autoencoding import MaskedAutoencoding

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
      call: `call(weights, *inputs) -> float32 array`.
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
    pixels = "RGB pixels, resized and not normalized"
    image = Input("image", (*image_of(module).image_size, 3), "uint8", pixels)

    def make(name: str, inputs: tuple[Input, ...], output: str, body: Any, *parts: str) -> Function:
        needed = {key: x for key, x in stored.items() if key.split("/")[0] in parts}

        # Weights are restored within the program, so a file in int8 stays small in memory as well.
        def call(weights: Mapping[str, Any], *arrays: Any) -> jax.Array:
            tree = to_tree(module, precision.restored(weights))
            return body(tree, *arrays).astype(jnp.float32)

        return Function(name, inputs, output, needed, call)

    def method(name: str) -> Callable[..., jax.Array]:
        # The module's `setup` reads these two in every method.
        unused = dict.fromkeys(("logit_scale", "logit_bias"), jnp.zeros(()))
        return lambda tree, x: module.apply({"params": {**unused, **tree}}, x, method=name)

    if isinstance(module, VisionTransformer):

        def features(tree: Any, image: jax.Array) -> jax.Array:
            return module.apply({"params": tree}, extras.pixels.normalize(image))

        return [make("embed_image", (image,), "features", features, "image")]
    if isinstance(module, MaskedAutoencoder):
        objective = MaskedAutoencoding(module, extras.mask_ratio, extras.norm_pix_loss)
        patches = module.image.patches
        kept = kept_patches(patches, extras.mask_ratio)
        seen = f"of each patch; the {kept} with the least are seen"
        noise = Input("noise", (patches,), "float32", seen)

        def embed(tree: Any, image: jax.Array) -> jax.Array:
            return l2_normalize(module.apply({"params": tree}, image, method="features"))

        def reconstruct(tree: Any, image: jax.Array, noise: jax.Array) -> jax.Array:
            return objective.reconstruct(tree, image, mask_from_noise(noise, kept))

        views = "[batch, 3, height, width, 3] in [0, 1]: what is seen, what is painted, the image"
        return [
            make("embed_image", (image,), "unit vectors", embed, "image"),
            make("reconstruct", (image, noise), views, reconstruct, "image", "decoder"),
        ]
    ids = "ids of tokens, framed and padded as tokenizer.json says"
    text = Input("text", (module.text.context_length,), "int32", ids)
    of_image, of_text = ("image", "pooler", "image_projection"), ("text", "text_projection")
    return [
        make("embed_image", (image,), "unit vectors", method("embed_image"), *of_image),
        make("embed_text", (text,), "unit vectors", method("embed_text"), *of_text),
    ]
