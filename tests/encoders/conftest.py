"""The other projects' libraries, as the tests of interop set them up."""

from tests.interop.conftest import no_gradients

__all__ = ["no_gradients"]
