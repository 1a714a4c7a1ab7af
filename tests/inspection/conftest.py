"""The other projects' libraries, as the tests of interop set them up; here torch takes gradients."""

import tests.interop.conftest  # noqa: F401
