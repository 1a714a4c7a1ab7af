"""The other projects' libraries, as the tests of interop set them up, and a run to evaluate."""

import pytest

from tests.interop.conftest import clip_run, mae_run, no_gradients, siglip_run

__all__ = ["clip_run", "mae_run", "no_gradients", "siglip_run"]


@pytest.fixture(scope="session")
def workdir(finished_run):
    """A run of two steps on pictures, with a checkpoint after each; not to be written to."""
    return finished_run
