"""TensorFlow, imported when it is first needed and kept off the accelerators.

`from vlp_jax.data.lazy_tensorflow import tf` imports nothing: the first `tf.something` does.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

Example = dict[str, "tf.Tensor"]
Op = Callable[[Example, "tf.Tensor"], Example]  # of preprocessing: see `vlp_jax.data.ops`

_OF_KERAS = "keras.src.optimizers"


@cache
def import_tensorflow() -> ModuleType:
    """Imports TensorFlow for input work on the CPU, and hides all GPUs from it."""
    # Its start-up notices would otherwise come before the first line of every run.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # oneDNN has nothing to give to decoding and resizing, and reports so on stderr.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with _keras_left_for_later():
        import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


@contextlib.contextmanager
def _keras_left_for_later() -> Iterator[None]:
    """Keeps TensorFlow from importing Keras, which would take a third of the time.

    TensorFlow does so only to register optimizers for SavedModel, and goes on where Keras is not
    installed. `tf.keras` is imported when somebody uses it.
    """
    if _OF_KERAS in sys.modules or "tensorflow" in sys.modules:
        yield
        return
    sys.modules[_OF_KERAS] = None  # so that importing it fails
    try:
        yield
    finally:
        del sys.modules[_OF_KERAS]


class _LazyTensorFlow:
    def __getattr__(self, name: str) -> Any:
        return getattr(import_tensorflow(), name)


if TYPE_CHECKING:
    import tensorflow as tf
else:
    tf = _LazyTensorFlow()
