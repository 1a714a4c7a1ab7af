"""How long saving a checkpoint keeps training waiting, asynchronously and synchronously.

python -m tools.bench_checkpoint [--megabytes 300] [--rounds 5] [--json FILE]

The state is that of a contrastive model with AdamW, made as deep as the size wants; it lies on all
devices of this machine, parameters sharded or whole on each. Each round trains a few steps, saves
once each way with the checkpoints of a run (vlp_jax.training.checkpoint.Checkpointer), and restores
once; so a change in the speed of the machine meets all. While an asynchronous save is being
written, steps go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as the demo

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax.errors import UserError
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import startup
from vlp_jax.parallel.batch import put_batch
from vlp_jax.training.checkpoint import Checkpointer, absolute
from vlp_jax.training.command import run_command
from vlp_jax.training.setup import Setup, make_setup
from vlp_jax.training.state import TrainState
from vlp_jax.training.step import compile_step

MEGABYTE = 1_000_000
WIDTH, IMAGE_SIZE, WORDS, VOCABULARY = 384, 32, 16, 512
POLL_SECONDS = 0.002
VERSIONS = ("jax", "orbax-checkpoint", "tensorstore")  # whose versions count


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--megabytes", type=float, default=300, help="size of the state (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="saves of each kind (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="steps of a round with no save (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, help="examples of a step (default: %(default)s)"
    )
    parser.add_argument(
        "--directory", metavar="DIR", help="where the checkpoints go (default: a temporary folder)"
    )
    parser.add_argument(
        "--replicated", action="store_true", help="each device holds the whole state, not a part"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    return parser.parse_args(argv)


def bench_config(depth: int, batch_size: int, replicated: bool) -> ConfigDict:
    """A contrastive model whose towers have `depth` layers, on all devices."""
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
    """One batch of noise."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (batch_size, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8),
        "text": rng.integers(3, VOCABULARY, (batch_size, WORDS)).astype(np.int32),
    }


def state_bytes(setup: Setup) -> int:
    """Size of the whole state."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(setup.abstract))


def setup_of_size(size: int, batch_size: int, replicated: bool) -> Setup:
    """The shallowest model whose state has `size` bytes.

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

    one, two = state_bytes(setup(1)), state_bytes(setup(2))
    return setup(1 + max(0, -(-(size - one) // (two - one))))


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


class Trainer:
    """A state that goes on by steps on one batch."""

    def __init__(self, setup: Setup):
        self._function = compile_step(setup.step, setup.abstract, setup.batch_spec, setup.mesh)
        self._batch = put_batch(make_batch(setup.config.batch_size), setup.mesh)
        self.state = setup.fresh_state()

    def step(self) -> None:
        """One step, to its end."""
        self.state, _ = self._function(self.state, self._batch)
        jax.block_until_ready(self.state)


class Appearance(threading.Thread):
    """Notes when `path` came to be."""

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
class Times:
    """Seconds, one value a round.

    Attributes:
      synchronous: of a synchronous save, which blocks all the while.
      blocked: for which an asynchronous save blocks.
      whole: from the call of an asynchronous save until its checkpoint is whole.
      step: of a step with no save under way.
      step_meanwhile: of a step while an asynchronous save is being written.
      restored: of a restore.
      first: for which the first asynchronous save of the process blocks.
    """

    synchronous: list[float] = dataclasses.field(default_factory=list)
    blocked: list[float] = dataclasses.field(default_factory=list)
    whole: list[float] = dataclasses.field(default_factory=list)
    step: list[float] = dataclasses.field(default_factory=list)
    step_meanwhile: list[float] = dataclasses.field(default_factory=list)
    restored: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Bench:
    """Saves of one state both ways, and steps before and meanwhile.

    Attributes:
      directory: where the asynchronous checkpoints go.
    """

    trainer: Trainer
    synchronous: Checkpointer
    asynchronous: Checkpointer
    directory: epath.Path
    abstract: TrainState

    def round(self, number: int, steps: int) -> Times:
        """The times of one round, each of one value; every second round has the other order."""
        times = Times()
        times.step.append(statistics.mean(seconds(self.trainer.step) for _ in range(steps)))
        turns = [self._save_synchronously, self._save_meanwhile]
        for turn in turns if number % 2 else turns[::-1]:
            turn(number, times)
        times.restored.append(seconds(lambda: self._restore(number)))
        return times

    def _save_synchronously(self, number: int, times: Times) -> None:
        state = self.trainer.state
        save = functools.partial(self.synchronous.save, number, state, {"position": number})
        times.synchronous.append(seconds(save))

    def _save_meanwhile(self, number: int, times: Times) -> None:
        appearance = Appearance(self.directory / "checkpoints" / str(number))
        appearance.start()
        state = self.trainer.state
        save = functools.partial(self.asynchronous.save, number, state, {"position": number})
        times.blocked.append(seconds(save))
        meanwhile = []
        while appearance.is_alive():
            meanwhile.append(seconds(self.trainer.step))
            self.asynchronous.poll()
            if self.asynchronous.failed:
                raise UserError(f"a checkpoint could not be written in {self.directory}")
        times.step_meanwhile.append(statistics.mean(meanwhile))
        self.asynchronous.finish(number)
        times.whole.append(appearance.seconds)

    def _restore(self, number: int) -> None:
        jax.block_until_ready(self.asynchronous.restore(self.abstract, number))


def measure(setup: Setup, rounds: int, steps: int, folder: epath.Path) -> Times:
    """The times of `rounds` rounds, after one of which the first save alone counts."""
    times = Times()
    with (
        Checkpointer(folder / "synchronous", asynchronous=False) as synchronous,
        Checkpointer(folder / "asynchronous", asynchronous=True) as asynchronous,
    ):
        bench = Bench(
            Trainer(setup), synchronous, asynchronous, folder / "asynchronous", setup.abstract
        )
        times.first += bench.round(0, steps).blocked
        for number in range(1, rounds + 1):
            for name, values in vars(bench.round(number, steps)).items():
                getattr(times, name).extend(values)
    return times


def summary(setup: Setup, times: Times) -> dict[str, Any]:
    """The figures: of every list of times the median, the shares of each round and their median."""
    shares = [a / b for a, b in zip(times.blocked, times.synchronous, strict=True)]
    slower = [a / b for a, b in zip(times.step_meanwhile, times.step, strict=True)]
    return {
        "megabytes": state_bytes(setup) / MEGABYTE,
        "arrays": len(jax.tree.leaves(setup.abstract)),
        "mesh": mesh_lib.describe(setup.mesh),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "median_seconds": {name: statistics.median(all) for name, all in vars(times).items()},
        "seconds": vars(times),
        "blocked_share": statistics.median(shares),
        "blocked_share_min": min(shares),
        "blocked_share_max": max(shares),
        "slowdown_of_steps": statistics.median(slower),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table, and a line on the share."""
    names = {
        "synchronous": "synchronous save (blocks all the while)",
        "blocked": "asynchronous save: blocks",
        "first": "the first of all saves: blocks",
        "whole": "asynchronous save: until the checkpoint is whole",
        "step": "a step",
        "step_meanwhile": "a step while a checkpoint is being written",
        "restored": "restore",
    }
    rows = ["| what | median s | least | most |", "| --- | ---: | ---: | ---: |"]
    for name, title in names.items():
        all = figures["seconds"][name]
        rows.append(f"| {title} | {statistics.median(all):.3f} | {min(all):.3f} | {max(all):.3f} |")
    low, high = figures["blocked_share_min"], figures["blocked_share_max"]
    return "\n".join(
        [
            *rows,
            "",
            f"an asynchronous save blocks for {figures['blocked_share']:.1%} of a synchronous one "
            f"(median of {len(figures['seconds']['blocked'])} rounds, {low:.1%} to {high:.1%}); "
            f"steps take {figures['slowdown_of_steps']:.2f} times as long meanwhile",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        for name in ("megabytes", "rounds", "steps"):
            if getattr(arguments, name) < 1:
                raise UserError(f"--{name} must be at least 1")
        startup.initialize()
        startup.use_compilation_cache()
        size = int(arguments.megabytes * MEGABYTE)
        setup = setup_of_size(size, arguments.batch_size, arguments.replicated)
        print(
            f"{mesh_lib.describe(setup.mesh)}; a state of {state_bytes(setup) / MEGABYTE:.0f} MB "
            f"in {len(jax.tree.leaves(setup.abstract)):,} arrays"
        )
        with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
            times = measure(setup, arguments.rounds, arguments.steps, absolute(folder))
        figures = summary(setup, times)
        print(table(figures))
        if arguments.json:
            epath.Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
