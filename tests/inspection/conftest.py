"""The other projects' libraries, as the tests of interop set them up; torch takes gradients here."""

import tests.interop.conftest  # noqa: F401
