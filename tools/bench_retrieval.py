"""How fast ranks are computed, beside NumPy's matrix product alone, and in how much memory.

    python -m tools.bench_retrieval [--images 20000] [--texts 100000] [--dim 512] [--json FILE]

Both do the same blocks in turns, in rounds; the ratio is the median of those of the rounds. 1 would
be matrix products alone: ranks of images and of texts share them, so 2 * images * texts * dim
floating-point operations are counted once. Peak memory is that of the whole process, embeddings
included. On a machine that does other things too, the ratio of the seconds that its cores worked
(cpu) says more than that of the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.evaluators import ranking
from vlp_jax.training.command import run_command


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_retrieval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--images", default=20_000, **number)
    parser.add_argument("--texts", default=100_000, help="at least as many as images", **number)
    parser.add_argument("--dim", default=512, **number)
    parser.add_argument("--rounds", default=3, **number)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args(argv)


def embeddings(count: int, dim: int, seed: int) -> np.ndarray:
    """Random unit vectors, float32 [count, dim], made in parts."""
    random = np.random.default_rng(seed)
    rows = np.empty((count, dim), np.float32)
    for start in range(0, count, 4096):
        part = random.standard_normal(rows[start : start + 4096].shape, np.float32)
        rows[start : start + 4096] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return rows


def products_alone(image: np.ndarray, text: np.ndarray) -> None:
    """NumPy's matrix products of the blocks that `rank_both_ways` goes through."""
    memory = np.empty((ranking.BLOCK_ROWS, ranking.BLOCK_COLUMNS), np.float32)
    for columns in range(0, len(text), ranking.BLOCK_COLUMNS):
        part = text[columns : columns + ranking.BLOCK_COLUMNS]
        for rows in range(0, len(image), ranking.BLOCK_ROWS):
            block = image[rows : rows + ranking.BLOCK_ROWS]
            out = memory.reshape(-1)[: len(block) * len(part)].reshape(len(block), len(part))
            np.matmul(block, part.T, out=out)


def seconds(function: Any, *arguments: Any) -> np.ndarray:
    """By the clock, and of the cores' work, of one call."""
    begin, work = time.perf_counter(), time.process_time()
    function(*arguments)
    return np.array([time.perf_counter() - begin, time.process_time() - work])


def peak_gib() -> float:
    """Most memory that the process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def measure(images: int, texts: int, dim: int, rounds: int) -> dict[str, float]:
    """Speeds in GFLOP/s, their ratio, and peak memory in GiB.

    Raises:
      UserError: fewer texts than images, or a number below 1.
    """
    if min(images, dim, rounds) < 1 or texts < images:
        raise UserError("give at least 1 image, dimension and round, and a text for every image")
    image, text = embeddings(images, dim, 0), embeddings(texts, dim, 1)
    owners = np.arange(texts) % images
    flop = 2 * images * texts * dim
    plain, ranks, ratios = [], [], []
    for number in range(rounds):
        plain.append(seconds(products_alone, image, text))
        ranks.append(seconds(ranking.rank_both_ways, image, text, owners))
        ratios.append(plain[-1] / ranks[-1])
        print(
            f"round {number + 1}: products {plain[-1][0]:.1f} s, ranks {ranks[-1][0]:.1f} s, "
            f"ratio {ratios[-1][0]:.3f} (cpu {ratios[-1][1]:.3f})",
            flush=True,
        )
    return {
        "images": images,
        "texts": texts,
        "dim": dim,
        "matmul_gflops": flop / statistics.median(x[0] for x in plain) / 1e9,
        "ranks_gflops": flop / statistics.median(x[0] for x in ranks) / 1e9,
        "ratio": statistics.median(x[0] for x in ratios),
        "cpu_ratio": statistics.median(x[1] for x in ratios),
        "peak_gib": peak_gib(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        figures = measure(arguments.images, arguments.texts, arguments.dim, arguments.rounds)
        print(
            f"{figures['images']:,} images x {figures['texts']:,} texts of {figures['dim']}: "
            f"ranks at {figures['ranks_gflops']:.0f} GFLOP/s, matrix products alone at "
            f"{figures['matmul_gflops']:.0f} GFLOP/s, ratio {figures['ratio']:.3f} "
            f"(cpu {figures['cpu_ratio']:.3f}), "
            f"peak memory {figures['peak_gib']:.2f} GiB"
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
