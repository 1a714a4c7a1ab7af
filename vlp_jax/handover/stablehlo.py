"""Writes StableHLO programs, serialized by `jax.export`, with the weights in a separate file.

The weights are arguments and not constants. So both functions share one file of weights, the file
can be mapped into memory, and programs stay small. The batch is a symbolic dimension: a program
takes any number of examples. Programs are lowered for all of `PLATFORMS`, on any machine.

Source: docs.jax.dev, "Exporting and serializing staged-out computations"; JAX keeps serialized
programs loadable for at least six months.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from vlp_jax.handover import foreign
from vlp_jax.handover.functions import Function
from vlp_jax.interop import files

PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS = "weights.safetensors"
EXAMPLE = "run.py"
# Function -> name of its file.
PROGRAMS = {"embed_image": "image", "embed_text": "text", "reconstruct": "reconstruct"}


def write(functions: list[Function], signature: dict[str, Any], directory: Path) -> list[Path]:
    """Writes the programs, the weights and an example; adds their names to the signature."""
    written, weights = [], {}
    for function in functions:
        exported = lower(function)
        file = directory / f"{PROGRAMS[function.name]}.stablehlo"
        written.append(files.save_bytes(bytes(exported.serialize()), file))
        weights |= function.weights
        entry = signature["functions"][function.name]
        entry["program"] = file.name
        entry["output"]["shape"] = [
            n if isinstance(n, int) else str(n) for n in exported.out_avals[0].shape
        ]
        entry["calling_convention_version"] = exported.calling_convention_version
    signature["platforms"] = list(PLATFORMS)
    signature["jax"] = jax.__version__
    written.append(files.save_safetensors(weights, directory / WEIGHTS))
    # Sorted, like the leaves of the flattened dict of weights: the order of a program's arguments.
    signature["arrays"] = {
        key: {"shape": list(x.shape), "dtype": str(x.dtype)} for key, x in sorted(weights.items())
    }
    example = Path(foreign.__file__).parent / "run_stablehlo.py"
    shutil.copyfile(example, directory / EXAMPLE)
    return [*written, directory / EXAMPLE]


def lower(function: Function) -> jax.export.Exported:
    """Lowers a function to StableHLO. Its arguments are a dict of weights, then its inputs."""
    weights = {
        key: jax.ShapeDtypeStruct(np.shape(x), x.dtype) for key, x in function.weights.items()
    }
    # One scope, so that "batch" is the same number in all inputs.
    scope = jax.export.SymbolicScope()
    inputs = [
        jax.ShapeDtypeStruct(
            jax.export.symbolic_shape(", ".join(["batch", *map(str, x.shape)]), scope=scope),
            jnp.dtype(x.dtype),
        )
        for x in function.inputs
    ]
    return jax.export.export(jax.jit(function.call), platforms=PLATFORMS)(weights, *inputs)
