"""The other projects' libraries, and the small models and runs of tests/interop."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "interop"))

import pytest
import torch

from vlp_jax.handover.foreign.check import patch_torchvision

torch.set_num_threads(1)
patch_torchvision()


@pytest.fixture(autouse=True)
def no_gradients():
    """Nothing here is trained."""
    with torch.no_grad():
        yield
