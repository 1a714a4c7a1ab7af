"""The time that saving a checkpoint keeps training waiting, asynchronously and synchronously.

python -m tools.perf.checkpoint [--megabytes 300] [--rounds 5] [--json FILE]

The state is a contrastive model with AdamW, made as deep as the size wants; it lies on all devices
of this machine, parameters sharded or whole on each. Each round trains a few steps, saves once each
way with the checkpoints of a run (vlp_jax.training.checkpoint.Checkpointer), and restores once; the
ways take turns. While an asynchronous save is being written, steps go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import sys
import tempfile
import threading
import time
import types
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as the demo

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from tools.perf import harness
from tools.perf.harness import seconds
from vlp_jax import config as config_lib
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.errors import UserError
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.batch import put_batch
from vlp_jax.training.checkpoint import Checkpointer, absolute
from vlp_jax.training.setup import Setup, make_setup
from vlp_jax.training.step import compile_step

MEGABYTE = 1_000_000
WIDTH, IMAGE_SIZE, WORDS, VOCABULARY = 384, 32, 16, 512
POLL_SECONDS = 0.002
TITLES = {
    "synchronous": "synchronous save (blocks all the while)",
    "blocked": "asynchronous save: blocks",
    "first": "the first of all saves: blocks",
    "whole": "asynchronous save: until the checkpoint is whole",
    "step": "a step",
    "step_meanwhile": "a step while a checkpoint is being written",
    "restored": "restore",
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = harness.make_parser("checkpoint", __doc__, rounds=5)
    add = parser.add_argument
    add("--megabytes", type=float, default=300, help="size of the state (default: %(default)s)")
    add("--steps", type=int, default=5, help="steps of a round with no save (default: 5)")
    add("--batch-size", type=int, default=8, help="examples of a step (default: %(default)s)")
    add("--directory", metavar="DIR", help="where checkpoints go (default: a temporary folder)")
    add("--replicated", action="store_true", help="each device holds the whole state, not a part")
    return parse_with_overrides(parser, argv, "megabytes", "rounds", "steps", "batch_size")[0]


def bench_config(depth: int, batch_size: int, replicated: bool) -> ConfigDict:
    """Returns a contrastive model whose towers have `depth` layers, on all devices."""
    config = config_lib.base()
    config.batch_size = batch_size
    config.duration = config_lib.duration(steps=1_000_000)
    config.mesh.update(**{"replica": -1, "fsdp": 1} if replicated else {"replica": 1, "fsdp": -1})
    tower = {"width": WIDTH, "depth": depth, "mlp_dim": 4 * WIDTH, "heads": WIDTH // 64}
    config.objective = ConfigDict(
        {
            "name": "contrastive",
            "loss": "softmax",
            "embed_dim": WIDTH,
            "image": {"variant": "mu/8", "image_size": IMAGE_SIZE, **tower},
            "text": {"variant": "mu", **tower},
        }
    )
    return config


def make_batch(batch_size: int) -> dict[str, np.ndarray]:
    """Returns one batch of noise."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (batch_size, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8),
        "text": rng.integers(3, VOCABULARY, (batch_size, WORDS)).astype(np.int32),
    }


def state_bytes(setup: Setup) -> int:
    """Returns the size of the whole state."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(setup.abstract))


def setup_of_size(size: int, batch_size: int, replicated: bool) -> Setup:
    """Makes the shallowest model whose state has `size` bytes.

    Raises:
      UserError: the devices do not divide the batch.
    """
    tokenizer = types.SimpleNamespace(
        vocab_size=VOCABULARY, context_length=WORDS, pad_id=0, eos_id=2
    )
    spec = {name: (x.shape, x.dtype) for name, x in make_batch(batch_size).items()}

    def setup(depth: int) -> Setup:
        config = bench_config(depth, batch_size, replicated)
        return make_setup(config, mesh_lib.make_mesh(config.mesh), tokenizer, spec, batch_size)

    # Layers are equal, so the size is a line in the depth.
    one, two = state_bytes(setup(1)), state_bytes(setup(2))
    return setup(1 + max(0, -(-(size - one) // (two - one))))


class Appearance(threading.Thread):
    """Notes when `path` came to be, in `seconds` from its start."""

    def __init__(self, path: epath.Path):
        super().__init__(daemon=True)
        self.seconds: float | None = None
        self._path, self._begin = path, time.perf_counter()

    def run(self) -> None:
        """Polls."""
        while not self._path.exists():
            time.sleep(POLL_SECONDS)
        self.seconds = time.perf_counter() - self._begin


@dataclasses.dataclass
class Bench:
    """Saves of one state both ways, and steps before and meanwhile.

    Attributes:
      folder: the asynchronous checkpoints go there.
      times: name in `TITLES` -> seconds, one value a round.
    """

    setup: Setup
    synchronous: Checkpointer
    asynchronous: Checkpointer
    folder: epath.Path
    times: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        setup = self.setup
        self._program = compile_step(setup.step, setup.abstract, setup.batch_spec, setup.mesh)
        self._batch = put_batch(make_batch(setup.config.batch_size), setup.mesh)
        self._state = setup.fresh_state()

    def _note(self, name: str, value: float) -> None:
        self.times.setdefault(name, []).append(value)

    def _step(self) -> None:
        self._state, _ = self._program(self._state, self._batch)
        jax.block_until_ready(self._state)

    def round(self, number: int, steps: int) -> None:
        """Adds the times of one round; every second round has the other order."""
        self._note("step", statistics.mean(seconds(self._step) for _ in range(steps)))
        turns = [self._save_synchronously, self._save_meanwhile]
        for turn in turns if number % 2 else turns[::-1]:
            turn(number)
        self._note("restored", seconds(lambda: self._restore(number)))

    def _save(self, checkpointer: Checkpointer, number: int) -> float:
        arguments = (number, self._state, {"position": number})
        return seconds(functools.partial(checkpointer.save, *arguments))

    def _save_synchronously(self, number: int) -> None:
        self._note("synchronous", self._save(self.synchronous, number))

    def _save_meanwhile(self, number: int) -> None:
        appearance = Appearance(self.folder / "checkpoints" / str(number))
        # A checkpoint gets its final name when it is whole: its folder appears at once.
        appearance.start()
        self._note("blocked", self._save(self.asynchronous, number))
        meanwhile = []
        # As in training: steps compete with the save for cores and memory.
        while appearance.is_alive():
            meanwhile.append(seconds(self._step))
            self.asynchronous.poll()
            if self.asynchronous.failed:
                raise UserError(f"a checkpoint could not be written in {self.folder}")
        self._note("step_meanwhile", statistics.mean(meanwhile))
        self.asynchronous.finish(number)
        self._note("whole", appearance.seconds)

    def _restore(self, number: int) -> None:
        jax.block_until_ready(self.asynchronous.restore(self.setup.abstract, number))


def measure(setup: Setup, rounds: int, steps: int, folder: epath.Path) -> dict[str, list[float]]:
    """Returns the times of `rounds` rounds, by their names in `TITLES`."""
    with (
        Checkpointer(folder / "synchronous", asynchronous=False) as synchronous,
        Checkpointer(folder / "asynchronous", asynchronous=True) as asynchronous,
    ):
        bench = Bench(setup, synchronous, asynchronous, folder / "asynchronous")
        bench.round(0, steps)
        first = bench.times.pop("blocked")
        # A warm-up: the first save of a process makes threads and compiles, and counts by itself.
        bench.times.clear()
        for number in range(1, rounds + 1):
            bench.round(number, steps)
    return {**bench.times, "first": first}


def summary(setup: Setup, times: dict[str, list[float]]) -> dict[str, Any]:
    """Returns the figures: of every list of times the median, and ratios of the rounds."""
    return {
        "megabytes": state_bytes(setup) / MEGABYTE,
        "arrays": len(jax.tree.leaves(setup.abstract)),
        "mesh": mesh_lib.describe(setup.mesh),
        "median_seconds": {name: statistics.median(each) for name, each in times.items()},
        "seconds": times,
        "blocked_share": harness.ratio(times["blocked"], times["synchronous"]).as_json(),
        "slowdown_of_steps": harness.ratio(times["step_meanwhile"], times["step"]).as_json(),
    }


def report(figures: dict[str, Any]) -> str:
    """Returns the figures as a Markdown table, and a line on the share."""
    rows = []
    for name, title in TITLES.items():
        each = figures["seconds"][name]
        cells = (f"{x:.3f}" for x in (statistics.median(each), min(each), max(each)))
        rows.append((title, *cells))
    share = figures["blocked_share"]
    return (
        f"{harness.markdown(('', 'median s', 'least', 'most'), rows)}\n\n"
        f"an asynchronous save blocks for {share['median']:.1%} of a synchronous one (median of "
        f"{len(share['rounds'])} rounds, {share['min']:.1%} to {share['max']:.1%}); steps take "
        f"{figures['slowdown_of_steps']['median']:.2f} times as long meanwhile"
    )


def command(argv: list[str]) -> None:
    """Measures, prints and writes."""
    arguments = parse(argv)
    harness.start_run()
    size = int(arguments.megabytes * MEGABYTE)
    setup = setup_of_size(size, arguments.batch_size, arguments.replicated)
    print(f"{mesh_lib.describe(setup.mesh)}; a state of {state_bytes(setup) / MEGABYTE:.0f} MB")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        times = measure(setup, arguments.rounds, arguments.steps, absolute(folder))
    figures = summary(setup, times)
    print(report(figures))
    harness.write_json(arguments.json, "checkpoint", argv, figures)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
