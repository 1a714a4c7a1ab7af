"""Checks what annotations say of types and shapes, while the tests run."""

from collections.abc import Mapping

import jax
import jaxtyping
import ml_collections
import numpy as np
from beartype import BeartypeConf, beartype

ROOMS = ("models", "objectives", "evaluators")

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float to Python's typing


def check_from_now_on() -> None:
    """Checks every call of functions of `ROOMS` that are imported from now on."""
    jaxtyping.Array = jax.Array | np.ndarray  # JAX takes NumPy's arrays wherever it takes its own
    Mapping.register(ml_collections.ConfigDict)  # it has all methods of one, and does not say so
    jaxtyping.install_import_hook([f"vlp_jax.{room}" for room in ROOMS], "annotations.check")
