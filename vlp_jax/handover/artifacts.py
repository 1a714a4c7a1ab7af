"""Writes compiled forms of a model, which run without its code: StableHLO and SavedModel.

StableHLO programs are serialized by `jax.export`, with the weights in a separate file. The weights
are arguments and not constants. So both functions share one file of weights, the file can be mapped
into memory, and programs stay small. The batch is a symbolic dimension: a program takes any number
of examples. Programs are lowered for all of `PLATFORMS`, on any machine. Source: docs.jax.dev,
"Exporting and serializing staged-out computations"; JAX keeps serialized programs loadable for at
least six months.

TensorFlow's SavedModel is written with `jax.experimental.jax2tf`, which JAX 0.10 and 0.11 have. Its
graph contains the same StableHLO, in an XlaCallModule, and has the weights as variables. Loading it
needs only TensorFlow with XLA, which its packages include.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from vlp_jax.data.lazy_tensorflow import import_tensorflow
from vlp_jax.errors import UserError
from vlp_jax.handover import foreign
from vlp_jax.interop import check_params, files, hf_tokenizer, native, precision
from vlp_jax.interop.base import Extras
from vlp_jax.interop.trees import Module, Params, image_of, to_tree, with_dtype
from vlp_jax.models.dual_encoder import l2_normalize
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.masking import kept_patches, mask_from_noise
from vlp_jax.models.vit import VisionTransformer
from vlp_jax.objectives.masked_autoencoding import MaskedAutoencoding

PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS, SIGNATURE, EXAMPLE = "weights.safetensors", "signature.json", "run.py"
# Function -> name of its StableHLO file.
PROGRAMS = {"embed_image": "image", "embed_text": "text", "reconstruct": "reconstruct"}
KINDS = native.MODELS
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
    """Returns the functions that a model offers, with products in `dtype` (one of `DTYPES`).

    `extras` has the precision of stored weights, the normalization of pixels for an image tower
    alone, and the mask ratio of a masked autoencoder.
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
        return _autoencoder_functions(module, extras, image, make)
    ids = "ids of tokens, framed and padded as tokenizer.json says"
    text = Input("text", (module.text.context_length,), "int32", ids)
    of_image, of_text = ("image", "pooler", "image_projection"), ("text", "text_projection")
    return [
        make("embed_image", (image,), "unit vectors", method("embed_image"), *of_image),
        make("embed_text", (text,), "unit vectors", method("embed_text"), *of_text),
    ]


def _autoencoder_functions(
    module: MaskedAutoencoder, extras: Extras, image: Input, make: Callable[..., Function]
) -> list[Function]:
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


def write(
    format: str, module: Module, params: Params, directory: Path, dtype: str, **extras: Any
) -> None:
    """Writes one of `ARTIFACTS`, with signature.json and the tokenizer, into an existing folder.

    `dtype` is of the matrix products, and `extras` are fields of `vlp_jax.interop.Extras`. Raises
    UserError if a required library is not installed.
    """
    check_params(module, params)
    given = Extras(**extras)
    functions = artifact_functions(module, params, given, dtype)
    signature = _signature(module, params, functions, given, dtype)
    ARTIFACTS[format](functions, signature, directory)
    files.save_json(signature, directory / SIGNATURE)
    hf_tokenizer.write(given.tokenizer, directory, native.TOKENIZER_GIVES)


def _signature(
    module: Module, params: Params, functions: list[Function], extras: Extras, dtype: str
) -> dict[str, Any]:
    """Describes the functions and their inputs as JSON, for users; writers add their own keys."""
    pixels = extras.pixels_of(module)
    signature: dict[str, Any] = {
        "functions": {
            function.name: {
                "inputs": [{**vars(x), "shape": ["batch", *x.shape]} for x in function.inputs],
                "output": {"dtype": "float32", "meaning": function.output},
                "weights": sorted(function.weights),
            }
            for function in functions
        },
        "weights": extras.weights,
        "computes_in": dtype,
        "preprocessing": {
            "size": list(image_of(module).image_size),
            "resize": extras.resize,
            "interpolation": extras.interpolation,
            "normalization": {"inside": True, "mean": list(pixels.mean), "std": list(pixels.std)},
        },
    }
    if "text" in module.towers():
        pad = module.text.pad_id if extras.pad_id is None else extras.pad_id
        signature["text"] = {
            **{"bos_id": extras.bos_id, "eos_id": extras.eos_id, "pad_id": pad},
            "context_length": module.text.context_length,
        }
        # The logit of a pair is logit_scale * cosine + logit_bias.
        signature["logit_scale"] = float(np.exp(params["logit_scale"]))
        signature["logit_bias"] = float(params.get("logit_bias", 0.0))
    return signature


def _write_stablehlo(functions: list[Function], signature: dict[str, Any], folder: Path) -> None:
    """Writes the programs, the weights and an example; adds their names to the signature."""
    weights: dict[str, np.ndarray] = {}
    for function in functions:
        exported, entry = _lower(function), signature["functions"][function.name]
        entry["program"] = f"{PROGRAMS[function.name]}.stablehlo"
        files.save_bytes(bytes(exported.serialize()), folder / entry["program"])
        weights |= function.weights
        shape = exported.out_avals[0].shape
        entry["output"]["shape"] = [n if isinstance(n, int) else str(n) for n in shape]
        entry["calling_convention_version"] = exported.calling_convention_version
    signature["platforms"] = list(PLATFORMS)
    signature["jax"] = jax.__version__
    files.save_safetensors(weights, folder / WEIGHTS)
    # Sorted, like the leaves of the flattened dict of weights: the order of a program's arguments.
    signature["arrays"] = {
        key: {"shape": list(x.shape), "dtype": str(x.dtype)} for key, x in sorted(weights.items())
    }
    shutil.copyfile(Path(foreign.__file__).parent / "run_stablehlo.py", folder / EXAMPLE)


def _lower(function: Function) -> jax.export.Exported:
    """Lowers a function to StableHLO. Its arguments are a dict of weights, then its inputs."""
    weights = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in function.weights.items()}
    # One scope, so that "batch" is the same number in all inputs.
    scope = jax.export.SymbolicScope()
    inputs = [
        jax.ShapeDtypeStruct(
            jax.export.symbolic_shape(_any_batch(x.shape), scope=scope), jnp.dtype(x.dtype)
        )
        for x in function.inputs
    ]
    return jax.export.export(jax.jit(function.call), platforms=PLATFORMS)(weights, *inputs)


def _any_batch(shape: tuple[int, ...]) -> str:
    return ", ".join(["batch", *map(str, shape)])


def _write_saved_model(functions: list[Function], signature: dict[str, Any], folder: Path) -> None:
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
    module.weights, calls = {}, {}
    for function in functions:
        for key, x in function.weights.items():
            # Functions that need the same weights share their variables.
            if key not in module.weights:
                module.weights[key] = tf.Variable(x, trainable=False, name=key)
        calls[function.name] = _graph(tf, jax2tf, module.weights, function)
        # `saved_model.load` restores the attributes of the module.
        setattr(module, function.name, calls[function.name])
        signature["functions"][function.name]["signature"] = function.name
    tf.saved_model.save(module, str(folder), signatures=calls)
    signature["platforms"] = list(PLATFORMS)
    signature["jax"], signature["tensorflow"] = jax.__version__, tf.__version__


def _graph(tf: Any, jax2tf: Any, variables: Any, function: Function) -> Any:
    """Converts a function to a `tf.function` of its inputs."""
    # None stands for the weights, whose shapes are fixed. An artifact is for inference: it stores
    # no gradient functions.
    converted = jax2tf.convert(
        function.call,
        polymorphic_shapes=[None, *(f"({_any_batch(x.shape)})" for x in function.inputs)],
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


ARTIFACTS: dict[str, Callable[[list[Function], dict[str, Any], Path], None]] = {
    "saved_model": _write_saved_model,
    "stablehlo": _write_stablehlo,
}
LOADED_BY = {
    "saved_model": 'tensorflow.saved_model.load("{}")',
    "stablehlo": "python {}/run.py --help",
}
