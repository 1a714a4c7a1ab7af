"""The other projects' libraries, on CPU, offline and on one thread."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `foreign`

import pytest
import torch
from runs import clip_run, mae_run, siglip_run

from tools.perf.peers.torch_step import patch_torchvision

__all__ = ["clip_run", "mae_run", "no_gradients", "siglip_run"]

torch.set_num_threads(1)

# Before anything imports a torchvision that was built against another PyTorch.
patch_torchvision()


@pytest.fixture(autouse=True)
def no_gradients():
    """Nothing here is trained."""
    with torch.no_grad():
        yield
