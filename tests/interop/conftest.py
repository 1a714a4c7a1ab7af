"""The other projects' libraries, on CPU, offline and on one thread."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `foreign`

import pytest
import torch

torch.set_num_threads(1)

# A torchvision that was built against another PyTorch cannot register its operators, and then the
# import fails: it looks two of them up. Nothing here runs them.
_LIBRARY = torch.library.Library("torchvision", "DEF")
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    try:
        torch._C._get_schema(f"torchvision::{_schema.split('(')[0]}", "")
    except RuntimeError:
        _LIBRARY.define(_schema)


@pytest.fixture(autouse=True)
def no_gradients():
    """Nothing here is trained."""
    with torch.no_grad():
        yield
