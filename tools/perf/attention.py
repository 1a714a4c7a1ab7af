"""Backends of attention: whether each runs here, and how long it takes, forward and backward.

python -m tools.perf.attention --backend xla --backend cudnn [--batch 64] [--json FILE]

A backend is a value of `config.objective.attention`. A shape that it does not hold is told with the
first line of the error, and is no failure of this command.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tools.perf import harness
from tools.perf.harness import StepTimer
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.models.attention import ATTENTIONS, AttentionMask
from vlp_jax.models.heads import MultiHeadAttention
from vlp_jax.models.values import ComputeConfig, TransformerConfig

STEPS = 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of the attention in one tower."""

    tokens: int
    width: int
    heads: int
    causal: bool


# 224 pixels in patches of 16, with and without class token; texts of 64, and of 77 tokens; the
# visible patches and the decoder of a masked autoencoder; patches of 14 with a class token.
SHAPES = {
    "image B/16": Shape(196, 768, 12, False),
    "image B/16, class token": Shape(197, 768, 12, False),
    "image L/14, class token": Shape(257, 1024, 16, False),
    "text 64": Shape(64, 768, 12, False),
    "text 77, causal": Shape(77, 768, 12, True),
    "MAE encoder": Shape(50, 768, 12, False),
    "MAE decoder": Shape(197, 512, 16, False),
}


def seconds(shape: Shape, backend: str, batch: int, dtype: Any) -> float:
    """Returns the median of a layer's forward and backward pass, its projections included.

    Raises:
      ValueError, RuntimeError, NotImplementedError: the backend does not hold the shape.
    """
    config = TransformerConfig(shape.width, 1, 4 * shape.width, shape.heads)
    layer = MultiHeadAttention(config, ComputeConfig(dtype, attention=backend))
    mask = AttentionMask(shape.causal)
    x = jax.random.normal(jax.random.key(0), (batch, shape.tokens, shape.width), dtype)
    params = jax.jit(layer.init)(jax.random.key(1), x[:1], x[:1])

    @jax.jit
    def step(params: Any, x: jax.Array) -> Any:
        def loss(params: Any, x: jax.Array) -> jax.Array:
            # Any scalar will do: its gradient reaches all projections.
            return layer.apply(params, x, x, mask).astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1))(params, x)

    jax.block_until_ready(step(params, x))
    timer = StepTimer(jax.block_until_ready)
    for _ in range(STEPS):
        timer.started(step(params, x))
    return statistics.median(timer.seconds())


def probe(backends: Sequence[str], batch: int) -> dict[str, dict[str, float | str]]:
    """Returns shape -> backend -> seconds, or why it does not run."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    found: dict[str, dict[str, float | str]] = {}
    for name, shape in SHAPES.items():
        for backend in backends:
            try:
                result: float | str = seconds(shape, backend, batch, dtype)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                # Some errors of compilers are pages long.
                result = str(error).strip().splitlines()[0][:200]
            found.setdefault(name, {})[backend] = result
    return found


def command(argv: list[str]) -> None:
    """Measures, prints and writes."""
    parser = harness.make_parser("attention", __doc__)
    told = f"{', '.join(ATTENTIONS)}; can be given several times"
    parser.add_argument("--backend", action="append", required=True, metavar="NAME", help=told)
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="default: 64")
    arguments, _ = parse_with_overrides(parser, argv, "batch")
    for name in arguments.backend:
        if name not in ATTENTIONS:
            raise UserError(unknown_key_message(name, ATTENTIONS, "--backend"))
    found = probe(arguments.backend, arguments.batch)
    rows = [
        (shape, *(x if isinstance(x, str) else f"{1e3 * x:.3f}" for x in row.values()))
        for shape, row in found.items()
    ]
    title = f"ms, forward and backward, batch {arguments.batch}"
    table = harness.make_table(title, ("shape", *arguments.backend), rows)
    harness.make_console().print(table, markup=False)
    harness.write_json(arguments.json, "attention", argv, {"seconds": found})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
