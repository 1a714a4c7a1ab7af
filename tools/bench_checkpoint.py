"""How long saving a checkpoint keeps training waiting, asynchronously and synchronously.

python -m tools.bench_checkpoint [--megabytes 300] [--rounds 5] [--json FILE]

The state is that of a contrastive model with AdamW, made as deep as the size wants; it lies on all
devices of this machine, parameters sharded. Each round trains a few steps, saves once each way with
the checkpoints of a run (vlp_jax.training.checkpoint.Checkpointer), and restores once; so a change
in the speed of the machine meets all. While an asynchronous save is being written, steps go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import threading
import time
import types
from collections.abc import Callable, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as the demo

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.batch import put_batch
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.setup import Setup, make_setup
from vlp_jax.training.state import init_state
from vlp_jax.training.step import compile_step

MEGABYTE = 1_000_000
WIDTH, IMAGE_SIZE, WORDS, VOCABULARY = 384, 32, 16, 512
POLL_SECONDS = 0.002
VERSIONS = ("jax", "orbax-checkpoint", "tensorstore")


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
        "--steps", type=int, default=10, help="steps of a round with no save (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, help="examples of a step (default: %(default)s)"
    )
    parser.add_argument(
        "--directory", metavar="DIR", help="where the checkpoints go (default: a temporary folder)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    return parser.parse_args(argv)


def bench_config(depth: int, batch_size: int) -> ConfigDict:
    """A contrastive model whose towers have `depth` layers; parameters sharded over all devices."""
    config = config_lib.base()
    config.batch_size = batch_size
    config.duration = config_lib.duration(steps=1_000_000)
    config.mesh.update(replica=1, fsdp=-1)
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


def setup_of_size(size: int, batch_size: int) -> Setup:
    """The shallowest model whose state has `size` bytes.

    Raises:
      UserError: the devices do not divide the batch.
    """
    tokenizer = types.SimpleNamespace(
        vocab_size=VOCABULARY, context_length=WORDS, pad_id=0, eos_id=2
    )
    spec = {name: (x.shape, x.dtype) for name, x in make_batch(batch_size).items()}

    def setup(depth: int) -> Setup:
        config = bench_config(depth, batch_size)
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
        self.state = init_state(
            setup.objective, setup.optimizer, setup.batch_spec, setup.abstract, seed=0
        )

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
    """Seconds of each round.

    Attributes:
      step: of a step with no save under way.
      synchronous: of a synchronous save, which blocks all the while.
      blocked: for which an asynchronous save blocks.
      step_meanwhile: of a step while an asynchronous save is being written.
      whole: from the call of an asynchronous save until its checkpoint is whole.
      restored: of a restore.
    """

    step: list[float] = dataclasses.field(default_factory=list)
    synchronous: list[float] = dataclasses.field(default_factory=list)
    blocked: list[float] = dataclasses.field(default_factory=list)
    step_meanwhile: list[float] = dataclasses.field(default_factory=list)
    whole: list[float] = dataclasses.field(default_factory=list)
    restored: list[float] = dataclasses.field(default_factory=list)


def save_synchronously(trainer: Trainer, checkpointer: Checkpointer, step: int) -> float:
    """Seconds of the save."""
    return seconds(lambda: checkpointer.save(step, trainer.state, {"position": step}))


def save_meanwhile(
    trainer: Trainer, checkpointer: Checkpointer, folder: epath.Path, step: int, times: Times
) -> None:
    """Saves and trains on until the checkpoint is whole."""
    appearance = Appearance(folder / "checkpoints" / str(step))
    appearance.start()
    times.blocked.append(
        seconds(lambda: checkpointer.save(step, trainer.state, {"position": step}))
    )
    steps = []
    while appearance.is_alive():
        steps.append(seconds(trainer.step))
    times.step_meanwhile.append(statistics.mean(steps))
    checkpointer.wait()
    times.whole.append(appearance.seconds)


def measure(setup: Setup, rounds: int, steps: int, folder: epath.Path) -> Times:
    """The times of `rounds` rounds, after one that does not count."""
    trainer, times = Trainer(setup), Times()
    with (
        Checkpointer(folder / "synchronous", asynchronous=False) as synchronous,
        Checkpointer(folder / "asynchronous", asynchronous=True) as asynchronous,
    ):
        for number in range(1, rounds + 2):
            if number == 2:
                times = Times()
            times.step.append(statistics.mean(seconds(trainer.step) for _ in range(steps)))

            def run_synchronous(number: int = number) -> None:
                times.synchronous.append(save_synchronously(trainer, synchronous, number))

            def run_asynchronous(number: int = number) -> None:
                save_meanwhile(trainer, asynchronous, folder / "asynchronous", number, times)

            turns = [run_synchronous, run_asynchronous]
            for turn in turns if number % 2 else turns[::-1]:
                turn()
            times.restored.append(
                seconds(
                    lambda number=number: jax.block_until_ready(
                        asynchronous.restore(setup.abstract, number)
                    )
                )
            )
    return times
