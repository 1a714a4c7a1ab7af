"""The contrastive losses in blocks beside their plain form, on one device: memory, time, numbers.

python -m tools.bench_loss [--memory-batch 32768] [--time-batch 4096] [--dim 768]

The plain form has all logits of the batch in memory, several times; the blocked one has those of
`--block-size` images at a time and computes them again on the way back (see `objectives/blocked`).

- Memory is what the compiler sets aside for loss and gradients, without embeddings and gradients
  themselves, at `--memory-batch`. Nothing is run for it.
- Time is that of loss and gradients at `--time-batch`, both forms in turns; the ratio is the median
  of the rounds' ratios.
- Numbers: the largest difference of loss and gradients between the forms at `--time-batch`, each
  relative to the largest number of its array.

The exit status is 1 if a ratio is beyond its limit: `--least-memory-ratio`, `--most-time-ratio`,
`--most-difference`.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tools.loss_memory import MIB, plain_loss, temporary_bytes
from vlp_jax.arguments import check_arguments
from vlp_jax.objectives.blocked import blocked_loss
from vlp_jax.objectives.pairwise import PAIRWISE_LOSSES
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import rules
from vlp_jax.training.command import run_command

Loss = Callable[..., tuple[jax.Array, jax.Array]]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory-batch", type=int, default=32_768, help="compiled for memory")
    parser.add_argument("--time-batch", type=int, default=4096, help="run for time and numbers")
    parser.add_argument("--dim", type=int, default=768, help="width of the embeddings")
    parser.add_argument("--block-size", type=int, default=256, help="of the blocked form")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each form")
    parser.add_argument("--least-memory-ratio", type=float, default=30.0, help="plain / blocked")
    parser.add_argument("--most-time-ratio", type=float, default=1.1, help="blocked / plain")
    parser.add_argument("--most-difference", type=float, default=1e-5, help="of the numbers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args(argv)
    check_arguments(arguments, "memory_batch", "time_batch", "dim", "block_size", "rounds")
    return arguments


def measure(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    """The figures of one loss."""
    mesh = mesh_lib.make_mesh({"replica": 1}, jax.local_devices()[:1])
    blocked = functools.partial(blocked_loss, name, mesh=mesh, block_size=arguments.block_size)
    forms = {"plain": functools.partial(plain_loss, name), "blocked": blocked}
    memory = {
        form: temporary_bytes(loss, mesh, arguments.memory_batch, arguments.dim)
        for form, loss in forms.items()
    }
    with rules.use_mesh(mesh):
        times, results = run_in_turns(forms, arguments)
    ratios = [b / p for b, p in zip(times["blocked"], times["plain"], strict=True)]
    return {
        "plain_bytes": memory["plain"],
        "blocked_bytes": memory["blocked"],
        "memory_ratio": memory["plain"] / memory["blocked"],
        "plain_seconds": statistics.median(times["plain"]),
        "blocked_seconds": statistics.median(times["blocked"]),
        "time_ratio": statistics.median(ratios),
        "time_ratio_min": min(ratios),
        "time_ratio_max": max(ratios),
        "difference": difference(results["plain"], results["blocked"]),
    }


def run_in_turns(
    forms: dict[str, Loss], arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each round, and loss and gradients, of each form."""
    keys = jax.random.split(jax.random.key(0))
    shape = (arguments.time_batch, arguments.dim)
    image, text = (jax.random.normal(key, shape) for key in keys)
    image, text = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    inputs = jax.block_until_ready((image, text, jnp.float32(10.0), jnp.float32(-10.0)))
    steps = {
        form: jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
        for form, loss in forms.items()
    }
    results = {form: jax.block_until_ready(step(*inputs)) for form, step in steps.items()}
    times: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(arguments.rounds):
        order = list(steps.items())
        for form, step in order if number % 2 else reversed(order):
            begin = time.perf_counter()
            jax.block_until_ready(step(*inputs))
            times[form].append(time.perf_counter() - begin)
    return times, results


def difference(one: Any, other: Any) -> float:
    """The largest of loss and gradients, each relative to the largest number of its array.

    The gradients of scale and bias count as one array: the softmax's loss has no slope along the
    bias, and what is computed for it is nothing but rounding.
    """

    def arrays(result: Any) -> list[jax.Array]:
        (loss, hits), (image, text, scale, bias) = result
        return [loss, hits, image, text, jnp.stack([scale, bias])]

    differences = [
        jnp.where((a == b).all(), 0, jnp.abs(a - b).max() / jnp.abs(a).max())
        for a, b in zip(arrays(one), arrays(other), strict=True)
    ]
    return float(np.max(differences))  # NaN if one of them is


def faults(name: str, found: dict[str, float], arguments: argparse.Namespace) -> list[str]:
    """What is beyond its limit, in words."""
    lines = []
    if found["memory_ratio"] < arguments.least_memory_ratio:
        lines.append(f"{name}: the plain form needs only {found['memory_ratio']:.1f} x the memory")
    if found["time_ratio"] > arguments.most_time_ratio:
        lines.append(f"{name}: the blocked form takes {found['time_ratio']:.2f} x the time")
    if not found["difference"] <= arguments.most_difference:
        lines.append(f"{name}: the forms differ by {found['difference']:.1e}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    wrong: list[str] = []

    def command() -> None:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        # A program from the cache may come without its figures.
        jax.config.update("jax_enable_compilation_cache", False)
        figures = {}
        print(f"{jax.devices()[0].device_kind}, {arguments.dim} wide, float32")
        for name in PAIRWISE_LOSSES:
            figures[name] = found = measure(arguments, name)
            wrong.extend(faults(name, found, arguments))
            print(
                f"{name:8}  batch {arguments.memory_batch:,}: plain "
                f"{found['plain_bytes'] / MIB:,.0f} MiB, blocked "
                f"{found['blocked_bytes'] / MIB:,.0f} MiB, 1/{found['memory_ratio']:.1f}\n"
                f"{'':8}  batch {arguments.time_batch:,}: time x {found['time_ratio']:.3f} "
                f"({found['time_ratio_min']:.3f} to {found['time_ratio_max']:.3f}), largest "
                f"difference {found['difference']:.1e}"
            )
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
        for fault in wrong:
            print(f"error: {fault}", file=sys.stderr)

    return run_command(command) or int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
