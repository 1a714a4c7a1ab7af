"""Looks inside a trained dual encoder: its attention, and the reasons why a pair is similar.

All functions take a module, its parameters and arrays; `vlp_jax.load` returns the first two. See
docs/inspection.md.
"""

from vlp_jax.inspection.attention import (
    Relevance,
    attention_maps,
    image_rollout,
    relevance,
    rollout,
    token_strings,
)
from vlp_jax.inspection.embeddings import nearest, project
from vlp_jax.inspection.heat_maps import heat_map, overlay, patch_embeddings

__all__ = [
    "Relevance",
    "attention_maps",
    "heat_map",
    "image_rollout",
    "nearest",
    "overlay",
    "patch_embeddings",
    "project",
    "relevance",
    "rollout",
    "token_strings",
]
