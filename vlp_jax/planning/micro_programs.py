"""Small programs in several forms, compiled for one chip: what could be written in another way.

Each computes its forward and backward pass on the sizes of a ViT-B/16 at 224 pixels in bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlp_jax.models.masking import take_tokens
from vlp_jax.objectives.flops import count_flops
from vlp_jax.planning import hbm, hlo, loops
from vlp_jax.planning.target import Target

SIZE, PATCH, WIDTH, HEADS = 224, 16, 768, 12
TOKENS = (SIZE // PATCH) ** 2
KEPT = TOKENS // 4  # of masked autoencoding (He et al. 2022)

Spec = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class MicroProgram:
    """A form of a computation.

    Attributes:
      function: of (parameters, inputs), to an array.
      parameters, inputs: shapes of an example batch; the function is differentiated by the former.
    """

    name: str
    function: Callable[[Any, Any], jax.Array]
    parameters: Any
    inputs: Any


@dataclasses.dataclass(frozen=True)
class MicroMeasured:
    """What the compiler says of it on one chip; `flops` those of its jaxpr."""

    name: str
    cycles: float
    traffic: float
    temporaries: int
    flops: float


def _convolution(kernel: jax.Array, images: jax.Array) -> jax.Array:
    strides = (PATCH, PATCH)
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(images, kernel, strides, "VALID", dimension_numbers=dims)


def _patches(images: jax.Array) -> jax.Array:
    pattern = "b (h p) (w q) c -> b (h w) (p q c)"
    return einops.rearrange(images, pattern, p=PATCH, q=PATCH)


def patch_programs(batch: int) -> tuple[MicroProgram, ...]:
    """The patch embedding as a convolution and as a product; and of patches that the host cut."""
    flat = PATCH * PATCH * 3
    images = Spec((batch, SIZE, SIZE, 3), jnp.bfloat16)
    kernel = Spec((flat, WIDTH), jnp.bfloat16)
    cut = Spec((batch, TOKENS, flat), jnp.bfloat16)
    square = Spec((PATCH, PATCH, 3, WIDTH), jnp.bfloat16)
    return (
        MicroProgram("convolution", _convolution, square, images),
        MicroProgram("cut and product", lambda k, x: _patches(x) @ k, kernel, images),
        MicroProgram("product of patches from the host", lambda k, x: x @ k, kernel, cut),
    )


def _one_hot(x: jax.Array, indices: jax.Array) -> jax.Array:
    chosen = jax.nn.one_hot(indices, x.shape[1], dtype=x.dtype)
    return jnp.einsum("bkt,btd->bkd", chosen, x)


def gather_programs(batch: int) -> tuple[MicroProgram, ...]:
    """The visible tokens of each image: taken, or by a product with rows of one (FLIP's form)."""
    tokens = Spec((batch, TOKENS, WIDTH), jnp.bfloat16)
    indices = Spec((batch, KEPT), jnp.int32)
    return (
        MicroProgram("take_along_axis", take_tokens, tokens, indices),
        MicroProgram("one-hot product", _one_hot, tokens, indices),
        MicroProgram("index under vmap", jax.vmap(lambda x, i: x[i]), tokens, indices),
    )


def length_programs(batch: int) -> tuple[MicroProgram, ...]:
    """Attention of 196 tokens (14 x 14 patches) and of 256 (16 x 16), by einsum."""

    def attend(qkv: Any, unused: None) -> jax.Array:
        del unused
        return jax.nn.dot_product_attention(*qkv, implementation="xla")

    def of(tokens: int) -> MicroProgram:
        one = Spec((batch, tokens, HEADS, WIDTH // HEADS), jnp.bfloat16)
        return MicroProgram(f"{tokens} tokens", attend, (one, one, one), None)

    return of(196), of(256)


MICRO_SETS: dict[str, Callable[[int], tuple[MicroProgram, ...]]] = {
    "patch": patch_programs,
    "gather": gather_programs,
    "length": length_programs,
}


def measure_micro(program: MicroProgram, target: Target) -> MicroMeasured:
    """Compiles the forward and the backward pass for the first chip of `target`."""
    mesh = Mesh(np.array(target.devices[:1]), ("one",))
    whole = NamedSharding(mesh, PartitionSpec())

    def run(parameters: Any, inputs: Any, gradient: jax.Array) -> Any:
        out, backward = jax.vjp(lambda p: program.function(p, inputs), parameters)
        return out, backward(gradient)

    out = jax.eval_shape(program.function, program.parameters, program.inputs)
    arguments = (program.parameters, program.inputs, out)
    jitted = jax.jit(run, in_shardings=whole, out_shardings=whole)
    compiled = jitted.lower(*arguments).compile()
    module = hlo.parse(compiled.as_text())
    runs = loops.count_runs(module)
    return MicroMeasured(
        name=program.name,
        cycles=hbm.estimated_cycles(module, runs),
        traffic=hbm.hbm_bytes(module, runs),
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        flops=count_flops(run, *arguments).total,
    )
