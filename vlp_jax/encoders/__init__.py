"""Trained models as a library: `load` one, then embed images and texts."""

from vlp_jax.encoders.encoder import Encoder, load
from vlp_jax.encoders.images import ImageProcessor
from vlp_jax.encoders.texts import TextProcessor

__all__ = ["Encoder", "ImageProcessor", "TextProcessor", "load"]
