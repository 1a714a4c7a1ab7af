"""The other projects' libraries, as the tests of interop set them up, and a run to evaluate."""

import pytest

from tests.interop.conftest import no_gradients

__all__ = ["no_gradients"]


@pytest.fixture(scope="session")
def workdir(finished_run):
    """A run of two steps on pictures, with a checkpoint after each; not to be written to."""
    return finished_run
