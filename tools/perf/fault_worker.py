"""vlp_jax.train as tools.perf.fault_drill runs it: slower, and with NaNs where it asks for them.

The folder that the variable VLP_FAULT_DRILL names may hold a file `nan_at` with the number of a
step: before that one, the parameters of every process become NaN, as by a broken device.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from vlp_jax import train as train_command
from vlp_jax.training.setup import Setup
from vlp_jax.training.state import TrainState

STEP_SECONDS = 0.04  # added to each step, so that faults find a run and not its end


def with_faults(step_function: Callable[..., Any], control: Path) -> Callable[..., Any]:
    """Wraps `step_function`: it looks for `nan_at` before each program."""

    def poisoned(state: TrainState, numbers: range) -> TrainState:
        asked = control / "nan_at"
        if not asked.exists() or asked.read_text().strip() not in map(str, numbers):
            return state
        # Keeps shapes and shardings, as a broken device would.
        params = jax.tree.map(lambda x: x * float("nan"), state.params)
        return state.replace(params=params)

    def step(state: TrainState, *batches: Any) -> Any:
        time.sleep(STEP_SECONDS * len(batches))
        first = int(state.step)
        return step_function(poisoned(state, range(first, first + len(batches))), *batches)

    return step


def main() -> int:
    """The training command; returns its exit status."""
    control = Path(os.environ["VLP_FAULT_DRILL"])
    compile_steps = Setup.compile
    Setup.compile = lambda *given: with_faults(compile_steps(*given), control)
    return train_command.main()


if __name__ == "__main__":
    sys.exit(main())
