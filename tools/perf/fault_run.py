"""A small run through launch/local.sh, as tools.perf.fault_drill watches it from outside.

As a command it is one process of that run: `vlp_jax.train`, slower, and with NaNs where it is told.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from tools.perf.harness import ROOT
from vlp_jax import train
from vlp_jax.errors import UserError
from vlp_jax.observe.jsonl import read_metrics
from vlp_jax.training.restore import metadata, read_on_host
from vlp_jax.training.setup import Setup
from vlp_jax.training.state import TrainState

STEP_SECONDS = 0.04  # added to each step, so that faults find a run and not its end
# Long enough for a start of all processes on few cores, short enough for a drill.
WATCHDOG = {"first_step_minutes": 8.0, "step_minutes": 0.3, "pause_minutes": 0.75}
PATIENCE_SECONDS = 900
WORKER = "tools.perf.fault_run"
CONTROL = "VLP_FAULT_DRILL"  # names the folder that may hold a file `nan_at`
CONFIG = """
from vlp_jax.config import duration, load
from vlp_jax.smoke import smoke

def get_config(arg=None):
    config = smoke(load("clip_shapes")).unlock()
    config.duration = duration(steps={steps})
    config.checkpoint.every = duration(steps=8)
    config.checkpoint.max_failed = 50
    config.optimizer.ema_decay = 0.9
    config.writers.tensorboard = True
    config.evaluators = {{}}
    config.watchdog.update({watchdog})
    return config
"""


class Run:
    """A small run of several processes through launch/local.sh, watched from outside.

    Args:
      home: where its config, logs and control files go.
    """

    def __init__(self, home: Path, workdir: Path, processes: int, steps: int):
        self.home, self.workdir, self.processes, self.steps = home, workdir, processes, steps
        home.mkdir(parents=True)
        (home / "drill.py").write_text(CONFIG.format(steps=steps, watchdog=WATCHDOG))
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
            "VLP_TRAIN_COMMAND": f"{sys.executable} -m {WORKER}",
            CONTROL: str(self.home),
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
        """Returns when the run is complete; raises UserError if the launcher gave up."""
        status = self._launcher.wait(timeout=PATIENCE_SECONDS * 2)
        if status:
            raise UserError(f"the run ended with status {status}; see {self.home}/launcher.log")

    def wait_for_step(self, step: int) -> None:
        """Returns when that step is logged; raises UserError if the run ends or hangs before."""
        until = time.monotonic() + PATIENCE_SECONDS
        while self.step() < step:
            status = self._launcher.poll()
            if status is not None or time.monotonic() > until:
                why = "no progress" if status is None else f"status {status}"
                raise UserError(
                    f"step {step} is not reached: {why} at step {self.step()}; see "
                    f"{self.home}/launcher.log"
                )
            time.sleep(0.05)

    def step(self) -> int:
        """Returns the newest step that is logged; -1 before the first."""
        file = self.workdir / "metrics.jsonl"
        if not file.exists():
            return -1
        steps = [r["step"] for r in read_metrics(epath.Path(file)) if "train/loss" in r]
        return steps[-1] if steps else -1

    def checkpoints(self) -> list[int]:
        """Returns the steps of all whole checkpoints."""
        names = [entry.name for entry in (self.workdir / "checkpoints").glob("*")]
        return sorted(int(name) for name in names if name.isdigit())

    def attempt(self) -> int:
        """Returns the number of the newest start."""
        names = [file.name for file in (self.home / "logs").glob("attempt-*.process-0.log")]
        return max((int(name.split("-")[1].split(".")[0]) for name in names), default=0)

    def wait_for_restart(self, attempt: int, seconds: float = 300) -> bool:
        """Returns whether the launcher has begun the attempt after this one within the time."""
        until = time.monotonic() + seconds
        while self.attempt() == attempt and time.monotonic() < until:
            time.sleep(0.05)
        return self.attempt() > attempt

    def output(self) -> str:
        """Returns the output of process 0 in the newest attempt."""
        file = self.home / "logs" / f"attempt-{self.attempt()}.process-0.log"
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
            ours = WORKER.encode() in words and str(self.workdir).encode() in words
            if ours and Path(words[0].decode()).name.startswith("python"):
                found[int(words[words.index(b"--process-id") + 1])] = int(entry.name)
        return [found[number] for number in sorted(found)]

    def losses(self) -> dict[tuple[int, str], float]:
        """Returns (step, name) -> every number that follows from state and data alone."""
        return {
            (record["step"], name): value
            for record in read_metrics(epath.Path(self.workdir / "metrics.jsonl"))
            for name, value in record.items()
            if name.startswith("train/")
        }

    def parameters(self) -> dict[str, np.ndarray]:
        """Reads all arrays of the last checkpoint by Orbax alone."""
        state = epath.Path(self.workdir / "checkpoints" / str(self.steps) / "state")
        return read_on_host(state, metadata(state))


def with_faults(step_function: Callable[..., Any], control: Path) -> Callable[..., Any]:
    """Wraps the step: it is slower, and parameters become NaN before the step `nan_at` names."""

    def step(state: TrainState, *batches: Any) -> Any:
        time.sleep(STEP_SECONDS * len(batches))
        first, asked = int(state.step), control / "nan_at"
        numbers = map(str, range(first, first + len(batches)))
        if asked.exists() and asked.read_text().strip() in numbers:
            # Keeps shapes and shardings, as a broken device would.
            state = state.replace(params=jax.tree.map(lambda x: x * float("nan"), state.params))
        return step_function(state, *batches)

    return step


def main() -> int:
    """Runs one process of the job; returns its exit status."""
    control, compile_steps = Path(os.environ[CONTROL]), Setup.compile
    Setup.compile = lambda *given: with_faults(compile_steps(*given), control)
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
