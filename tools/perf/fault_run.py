"""A small run through launch/local.sh, as tools.perf.fault_drill watches it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tools.perf.harness import ROOT
from vlp_jax.errors import UserError
from vlp_jax.observe.jsonl import read_metrics

DISK_MIB = 48
CHECKPOINT_EVERY = 8
# Long enough for a start of all processes on few cores, short enough for a drill.
WATCHDOG = {"first_step_minutes": 8.0, "step_minutes": 0.3, "pause_minutes": 0.75}
PATIENCE_SECONDS = 900
CONFIG = """
from vlp_jax.config import duration, load
from vlp_jax.smoke import smoke

def get_config(arg=None):
    config = smoke(load({file!r})).unlock()
    config.duration = duration(steps={steps})
    config.checkpoint.every = duration(steps={every})
    config.checkpoint.max_failed = 50
    config.optimizer.ema_decay = 0.9
    config.writers.tensorboard = True
    config.evaluators = {{}}
    config.watchdog.update({watchdog})
    return config
"""


class Run:
    """A run of several processes, its launcher, and its traces on disk.

    Args:
      home: where its config, logs and control files go.
      workdir: of the run.
      processes: of the job.
      steps: its length.
    """

    def __init__(self, home: Path, workdir: Path, processes: int, steps: int):
        self.home, self.workdir, self.processes, self.steps = home, workdir, processes, steps
        home.mkdir(parents=True)
        text = CONFIG.format(
            file=str(ROOT / "configs" / "clip_shapes.py"),
            steps=steps,
            every=CHECKPOINT_EVERY,
            watchdog=WATCHDOG,
        )
        (home / "drill.py").write_text(text)
        self._launcher: subprocess.Popen | None = None

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """Starts the launcher; ends it on the way out if it is still there."""
        command = [str(ROOT / "launch" / "local.sh"), "--processes", str(self.processes)]
        command += ["--devices-per-process", "1", "--grace", "3", "--save-grace", "60"]
        command += ["--backoff", "1", "--log", str(self.home / "restarts.jsonl")]
        command += ["--logs", str(self.home / "logs"), "--"]
        command += ["--config", str(self.home / "drill.py"), "--workdir", str(self.workdir)]
        environment = {
            **os.environ,
            "VLP_TRAIN_COMMAND": f"{sys.executable} -m tools.perf.fault_worker",
            "VLP_FAULT_DRILL": str(self.home),
            "JAX_PLATFORMS": "cpu",
            "PYTHONUNBUFFERED": "1",
        }
        with open(self.home / "launcher.log", "w") as log:
            self._launcher = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            yield
        finally:
            if self._launcher.poll() is None:
                for _ in range(2):  # the second one kills at once
                    self._launcher.send_signal(signal.SIGTERM)
                    time.sleep(1)
                self._launcher.wait()

    def wait_for_end(self) -> None:
        """Returns when the run is complete.

        Raises:
          UserError: the launcher gave up.
        """
        status = self._launcher.wait(timeout=PATIENCE_SECONDS * 2)
        if status:
            raise UserError(f"the run ended with status {status}; see {self.home}/launcher.log")

    def wait_for_step(self, step: int) -> None:
        """Returns when that step is logged.

        Raises:
          UserError: the run ends before, or does not come there in a long time.
        """
        until = time.monotonic() + PATIENCE_SECONDS
        while self.step() < step:
            if self._launcher.poll() is not None:
                raise UserError(
                    f"the run ended at step {self.step()} with status {self._launcher.returncode} "
                    f"before step {step}; see {self.home}/launcher.log"
                )
            if time.monotonic() > until:
                raise UserError(f"step {step} is not reached; see {self.home}/launcher.log")
            time.sleep(0.05)

    def step(self) -> int:
        """Returns the newest step that is logged; -1 before the first."""
        file = self.workdir / "metrics.jsonl"
        if not file.exists():
            return -1
        lines = [line for line in file.read_bytes().splitlines() if b'"train/loss"' in line]
        try:
            return int(json.loads(lines[-1])["step"]) if lines else -1
        except ValueError:  # the line is being written
            return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else -1

    def checkpoints(self) -> list[int]:
        """Returns the steps of all whole checkpoints."""
        folder = self.workdir / "checkpoints"
        names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
        return sorted(int(name) for name in names if name.isdigit())

    def attempt(self) -> int:
        """Returns the number of the newest start."""
        names = [file.name for file in (self.home / "logs").glob("attempt-*.process-0.log")]
        return max((int(name.split("-")[1].split(".")[0]) for name in names), default=0)

    def output(self, attempt: int | None = None) -> str:
        """Returns the output of process 0 in an attempt; the newest by default."""
        number = self.attempt() if attempt is None else attempt
        file = self.home / "logs" / f"attempt-{number}.process-0.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def resumed_at(self) -> int | None:
        """Returns the step from which the newest attempt went on."""
        match = re.search(r"steps ([\d,]+) to", self.output())
        return int(match[1].replace(",", "")) if match else None

    def statuses(self, attempt: int) -> list[int]:
        """Returns the exit statuses of an attempt's processes; empty if they run."""
        file = self.home / "restarts.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return next((row["statuses"] for row in rows if row["attempt"] == attempt), [])

    def pids(self) -> list[int]:
        """Finds the processes of the job, in order of their numbers."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:  # gone, or nobody's
                continue
            ours = b"tools.perf.fault_worker" in words and str(self.workdir).encode() in words
            if ours and Path(words[0].decode()).name.startswith("python"):
                found[int(words[words.index(b"--process-id") + 1])] = int(entry.name)
        return [found[number] for number in sorted(found)]

    def losses(self) -> dict[tuple[int, str], float]:
        """Returns (step, name) -> every number that follows from state and data alone."""
        return {
            (record["step"], name): value
            for record in read_metrics(self.workdir / "metrics.jsonl")
            for name, value in record.items()
            if name.startswith("train/")
        }

    def parameters(self) -> dict[str, np.ndarray]:
        """Reads all arrays of the last checkpoint by Orbax, with none of our code."""
        import jax
        import orbax.checkpoint as ocp

        folder = self.workdir / "checkpoints" / str(self.steps) / "state"
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            tree = handler.metadata(folder).tree

            def each(function: Callable[[Any], Any]) -> Any:
                return jax.tree.map(function, tree, is_leaf=lambda x: hasattr(x, "shape"))

            state = handler.restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    item=each(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)),
                    restore_args=each(lambda x: ocp.RestoreArgs(restore_type=np.ndarray)),
                ),
            )
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        }


def steps_of(losses: Mapping[tuple[int, str], float]) -> int:
    """Counts the steps that have a loss."""
    return len({step for step, name in losses if name == "train/loss"})
