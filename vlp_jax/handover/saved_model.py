"""Writes TensorFlow's SavedModel with `jax.experimental.jax2tf`, which JAX 0.10 and 0.11 have.

The graph contains the same StableHLO as the artifact "stablehlo", in an XlaCallModule, and has the
weights as variables. Loading it needs only TensorFlow with XLA, which its packages include. One
graph serves any batch size, and CPU, CUDA and TPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlp_jax.data.lazy_tensorflow import import_tensorflow
from vlp_jax.errors import UserError
from vlp_jax.handover.functions import Function
from vlp_jax.handover.stablehlo import PLATFORMS


def write(functions: list[Function], signature: dict[str, Any], directory: Path) -> list[Path]:
    """Writes the SavedModel; its signatures have the names of the functions.

    Raises:
      UserError: TensorFlow is not installed, or JAX is one without `jax2tf`.
    """
    tf = import_tensorflow()
    try:
        from jax.experimental import jax2tf
    except ImportError as error:
        raise UserError(
            f"--format saved_model needs jax.experimental.jax2tf, which this JAX {jax.__version__} "
            f"lacks ({error}); take --format stablehlo"
        ) from None
    module = tf.Module()
    module.weights = {}
    calls = {}
    for function in functions:
        for key, x in function.weights.items():
            # Functions that need the same weights share their variables.
            if key not in module.weights:
                module.weights[key] = tf.Variable(x, trainable=False, name=key)
        calls[function.name] = _graph(tf, jax2tf, module.weights, function)
        # `saved_model.load` restores the attributes of the module.
        setattr(module, function.name, calls[function.name])
        signature["functions"][function.name]["signature"] = function.name
    tf.saved_model.save(module, str(directory), signatures=calls)
    signature["platforms"] = list(PLATFORMS)
    signature["jax"], signature["tensorflow"] = jax.__version__, tf.__version__
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _graph(tf: Any, jax2tf: Any, variables: Any, function: Function) -> Any:
    """Converts a function to a `tf.function` of its inputs."""
    shapes = [", ".join(["batch", *map(str, x.shape)]) for x in function.inputs]
    # None stands for the weights, whose shapes are fixed. An artifact is for inference: it stores
    # no gradient functions.
    converted = jax2tf.convert(
        function.call,
        polymorphic_shapes=[None, *(f"({shape})" for shape in shapes)],
        native_serialization_platforms=PLATFORMS,
        with_gradient=False,
    )
    weights = {key: variables[key] for key in function.weights}
    specs = [
        tf.TensorSpec((None, *x.shape), np.dtype(x.dtype), name=x.name) for x in function.inputs
    ]
    return tf.function(
        lambda *inputs: converted(weights, *inputs), autograph=False, input_signature=specs
    )
