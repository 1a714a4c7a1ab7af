"""Whether a backend of attention runs here, and how long it takes, forward and backward.

python -m tools.bench_attention --backend xla --backend cudnn [--batch 64] [--json FILE]

A backend is a value of `config.objective.attention`. A shape that it does not hold is told with the
first line of the error, and is no failure of this command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from vlp_jax.arguments import check_arguments
from vlp_jax.benchmarking.contender import StepTimer
from vlp_jax.benchmarking.provenance import provenance
from vlp_jax.errors import UserError
from vlp_jax.models.attention import ATTENTIONS
from vlp_jax.models.attention_mask import AttentionMask
from vlp_jax.models.heads import MultiHeadAttention
from vlp_jax.models.values import ComputeConfig, TransformerConfig
from vlp_jax.training.command import run_command

STEPS = 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of the attention in one tower."""

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
    """Median of a layer's forward and backward pass, its projections included.

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
            return layer.apply(params, x, x, mask).astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1))(params, x)

    jax.block_until_ready(step(params, x))
    timer = StepTimer(jax.block_until_ready)
    for _ in range(STEPS):
        timer.started(step(params, x))
    return statistics.median(timer.seconds())


def probe(backends: Sequence[str], batch: int) -> dict[str, dict[str, float | str]]:
    """Shape -> backend -> seconds, or why it does not run."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    found: dict[str, dict[str, float | str]] = {}
    for name, shape in SHAPES.items():
        for backend in backends:
            try:
                result: float | str = seconds(shape, backend, batch, dtype)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                result = str(error).strip().splitlines()[0][:200]
            found.setdefault(name, {})[backend] = result
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        parser = argparse.ArgumentParser(
            prog="python -m tools.bench_attention",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--backend", action="append", required=True, metavar="NAME")
        parser.add_argument("--batch", type=int, default=64, metavar="N", help="default 64")
        parser.add_argument("--json", metavar="FILE", help="also write the figures there")
        arguments = parser.parse_args(argv)
        check_arguments(arguments, "batch")
        for name in arguments.backend:
            if name not in ATTENTIONS:
                raise UserError(f"--backend {name}: known are {', '.join(ATTENTIONS)}")
        found = probe(arguments.backend, arguments.batch)
        table = Table(title=f"ms, forward and backward, batch {arguments.batch}")
        for name in ("shape", *arguments.backend):
            table.add_column(name)
        for shape, row in found.items():
            cells = (row[name] for name in arguments.backend)
            table.add_row(shape, *(x if isinstance(x, str) else f"{1e3 * x:.3f}" for x in cells))
        Console(width=None if sys.stdout.isatty() else 140).print(table, markup=False)
        if arguments.json:
            content = {**provenance("tools.bench_attention", argv), "seconds": found}
            Path(arguments.json).write_text(json.dumps(content, indent=2) + "\n")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
