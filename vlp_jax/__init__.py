"""Vision-language pretraining in JAX.

Load a trained model and compare images with texts:

import vlp_jax
model = vlp_jax.load("runs/clip")
model.embed_image(["a.jpg"]) @ model.embed_text(["a red ring", "a blue star"]).T
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlp_jax import signals

if TYPE_CHECKING:
    from vlp_jax.encoders import load

# First of all: imports take seconds, and a signal must be heard meanwhile.
signals.listen_if_started(__name__)

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Imported on demand, because it takes a second and most commands do not need it.
    if name == "load":
        from vlp_jax.encoders import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
