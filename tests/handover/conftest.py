"""The other projects' libraries, and the small models and runs of tests/interop."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "interop"))

from tests.interop.conftest import no_gradients

__all__ = ["no_gradients"]
