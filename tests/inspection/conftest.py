"""The libraries that looking inside is compared with, offline and on one thread."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# For `foreign`: the models of tests/interop, with weights of which none hides a mistake.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "interop"))

import torch

torch.set_num_threads(1)

# As in tests/interop: a torchvision that was built against another PyTorch finds its operators.
_LIBRARY = torch.library.Library("torchvision", "DEF")
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    try:
        torch._C._get_schema(f"torchvision::{_schema.split('(')[0]}", "")
    except RuntimeError:
        _LIBRARY.define(_schema)
