"""TensorFlow, imported when it is first needed and kept off the accelerators."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tensorflow as tf

    Example = dict[str, tf.Tensor]
    Op = Callable[[Example, tf.Tensor], Example]  # of preprocessing: see `vlp_jax.data.ops`


@cache
def import_tensorflow() -> ModuleType:
    """Imports TensorFlow for input work on the CPU, and hides all GPUs from it.

    Raises:
      ImportError: where TensorFlow is not installed.
      RuntimeError: if the process has already used a GPU through TensorFlow.
    """
    # Its start-up notices would otherwise come before the first line of every run.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # oneDNN has nothing to give to decoding and resizing, and reports so on stderr.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf
