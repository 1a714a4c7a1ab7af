"""Parameters as flat dicts: path -> float32 array, the layers of an encoder stacked.

"image/encoder/layers/attention/query/kernel" is `[depth, width, heads, head_dim]`. A
`VisionTransformer` alone has the paths that it has as
the image tower of a larger model: they begin with "image/".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.interop.tables import Shape, mismatch_report, shapes_of
from vlp_jax.models.coca import CoCa
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.values import ComputeConfig
from vlp_jax.models.vit import VisionTransformer

Params = dict[str, np.ndarray]
Module = DualEncoder | CoCa | MaskedAutoencoder | VisionTransformer


def from_tree(module: Module, tree: Any) -> Params:
    """Flattens a nested tree of parameters, boxed or not.

    Args:
      module: the model whose parameters they are.
      tree: what its `init` gives under "params".
    """
    flat = flax.traverse_util.flatten_dict(nn.unbox(tree), sep="/")
    return {_prefix(module) + path: np.asarray(x, np.float32) for path, x in flat.items()}


def _prefix(module: Module) -> str:
    """Returns "image/" for a tower by itself, whose own tree has no such prefix; "" otherwise."""
    return next((f"{name}/" for name, tower in module.towers().items() if tower is module), "")


def to_tree(module: Module, params: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Inverts `from_tree`: makes the nested tree that `module.apply` takes under "params"."""
    prefix = _prefix(module)
    flat = {path.removeprefix(prefix): x for path, x in params.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def image_of(module: Module) -> VisionTransformer:
    """The image tower of a model, which may be that tower itself."""
    return module.towers()["image"]


# A module is frozen and hashable, and a large one takes long to trace.
@functools.lru_cache(maxsize=64)
def expected_shapes(module: Module) -> dict[str, Shape]:
    """Returns path -> shape of all parameters of a model; computes nothing."""
    module = plain(module)
    # Without the backends of `compute`, which may refuse these shapes. They change no parameter.
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), *module.example())["params"])
    flat = flax.traverse_util.flatten_dict(nn.unbox(tree), sep="/")
    return {_prefix(module) + path: tuple(x.shape) for path, x in flat.items()}


def check_params(module: Module, params: Mapping[str, np.ndarray]) -> None:
    """
    Raises:
      UserError: these are not the parameters of the model; all that differs is named, in one line.
    """
    report = mismatch_report(expected_shapes(module), shapes_of(params))
    if report:
        raise UserError(f"the parameters do not fit the {type(module).__name__}: {report}")


def plain(module: Any) -> Any:
    """The same model in float32, without what changes how it runs and not what it computes."""
    return with_dtype(module, jnp.float32)


def with_dtype(module: Module, dtype: Any) -> Module:
    """The same model with its matrix products in `dtype`, and XLA's attention on every platform."""
    if hasattr(module, "compute"):
        quantization = module.compute.quantization  # which changes what is computed
        return module.clone(compute=ComputeConfig(dtype, quantization=quantization))
    towers = module.towers().items()
    return module.clone(**{name: with_dtype(tower, dtype) for name, tower in towers})
