"""The speed of ranks, beside NumPy's matrix product alone, and their memory.

    python -m tools.perf.retrieval [--images 20000] [--texts 100000] [--dim 512]

Both do the same blocks in turns, in rounds; the ratio is the median over the rounds. 1 would be
matrix products alone: ranks of images and of texts share them, so 2 * images * texts * dim
floating-point operations are counted once. Peak memory is the whole process's, embeddings included.
On a machine that does other things too, the ratio of the seconds that its cores worked (cpu) says
more than the clock's.
"""

from __future__ import annotations

import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tools.perf import harness
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.errors import UserError
from vlp_jax.evaluators import ranking


def embeddings(count: int, dim: int, seed: int) -> np.ndarray:
    """Returns random unit vectors, float32 [count, dim], made in parts."""
    random = np.random.default_rng(seed)
    rows = np.empty((count, dim), np.float32)
    for start in range(0, count, 4096):
        # In parts: the quotient is a copy, and of all rows at once the peak of memory.
        part = random.standard_normal(rows[start : start + 4096].shape, np.float32)
        rows[start : start + 4096] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def products_alone(image: np.ndarray, text: np.ndarray) -> None:
    """Multiplies the blocks that `rank_both_ways` goes through, and does nothing else."""
    memory = np.empty((ranking.BLOCK_ROWS, ranking.BLOCK_COLUMNS), np.float32)
    for columns in range(0, len(text), ranking.BLOCK_COLUMNS):
        part = text[columns : columns + ranking.BLOCK_COLUMNS]
        for rows in range(0, len(image), ranking.BLOCK_ROWS):
            block = image[rows : rows + ranking.BLOCK_ROWS]
            out = memory.reshape(-1)[: len(block) * len(part)].reshape(len(block), len(part))
            np.matmul(block, part.T, out=out)


def clock_and_cores(function: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds of one call by the clock, and those that the cores worked."""
    work = time.process_time()
    return harness.seconds(function), time.process_time() - work


def measure(images: int, texts: int, dim: int, rounds: int) -> dict[str, Any]:
    """Returns speeds in GFLOP/s, their ratio, and peak memory in GiB.

    Raises:
      UserError: fewer texts than images.
    """
    if texts < images:
        raise UserError("--texts must be at least --images: every image has a text")
    image, text = embeddings(images, dim, 0), embeddings(texts, dim, 1)
    owners = np.arange(texts) % images
    calls = {
        "matmul": functools.partial(products_alone, image, text),
        "ranks": functools.partial(ranking.rank_both_ways, image, text, owners),
    }
    times = harness.in_turns(
        {name: functools.partial(clock_and_cores, call) for name, call in calls.items()}, rounds
    )
    by_clock, by_cores = (
        {name: [pair[index] for pair in pairs] for name, pairs in times.items()} for index in (0, 1)
    )
    flop = 2 * images * texts * dim
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, KiB on Linux
    return {
        **{"images": images, "texts": texts, "dim": dim},
        **{f"{k}_gflops": flop / statistics.median(v) / 1e9 for k, v in by_clock.items()},
        "ratio": harness.ratio(by_clock["matmul"], by_clock["ranks"]).as_json(),
        "cpu_ratio": harness.ratio(by_cores["matmul"], by_cores["ranks"]).as_json(),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / harness.GIB,
    }


def command(argv: list[str]) -> None:
    """Measures, prints and writes."""
    parser = harness.make_parser("retrieval", __doc__, rounds=3)
    for name, default in (("--images", 20_000), ("--texts", 100_000), ("--dim", 512)):
        told = "default: %(default)s"
        parser.add_argument(name, type=int, default=default, metavar="N", help=told)
    counts = ("images", "texts", "dim", "rounds")
    arguments, _ = parse_with_overrides(parser, argv, *counts)
    found = measure(*(getattr(arguments, name) for name in counts))
    print(
        f"{found['images']:,} images x {found['texts']:,} texts of {found['dim']}: ranks at "
        f"{found['ranks_gflops']:.0f} GFLOP/s, matrix products alone at "
        f"{found['matmul_gflops']:.0f} GFLOP/s, ratio {found['ratio']['median']:.3f} "
        f"(cpu {found['cpu_ratio']['median']:.3f}), peak memory {found['peak_gib']:.2f} GiB"
    )
    harness.write_json(arguments.json, "retrieval", argv, found)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
