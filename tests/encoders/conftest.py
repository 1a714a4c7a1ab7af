"""The other projects' libraries, as the tests of interop set them up, and a run to evaluate."""

import pytest

from tests.interop.conftest import no_gradients
from vlp_jax import config as config_lib
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.train import train

__all__ = ["no_gradients"]


@pytest.fixture(scope="session")
def workdir(tmp_path_factory, shapes_dir):
    """A run of two steps on pictures, with a checkpoint after each; not to be written to."""
    folder = tmp_path_factory.mktemp("run")
    config = config_lib.smoke(config_lib.load("configs/demo.py"))
    config_lib.override(config, ["checkpoint.every.percent=None", "checkpoint.every.steps=1"])
    train(config, folder, StartupClock())
    return folder
