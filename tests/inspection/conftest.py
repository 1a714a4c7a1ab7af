"""The other projects' libraries, as the tests of interop set them up."""

import tests.interop.conftest  # noqa: F401
