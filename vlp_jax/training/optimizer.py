"""Optimizers and learning-rate schedules from Optax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.training.when import Units

SCHEDULES = ("cosine", "rsqrt", "linear", "constant")
OPTIMIZERS = ("adamw",)


def make_schedule(config: Mapping[str, Any], units: Units) -> optax.Schedule:
    """step -> learning rate: a linear warm-up, the named decay, a linear cool-down to zero.

    `rsqrt` is peak * sqrt(warmup / step) (Zhai et al. 2022, 3.5), continuous where warm-up ends.

    Raises:
      UserError: an unknown schedule, or a warm-up and cool-down longer than the run.
    """
    peak, name, total = config["learning_rate"], config["schedule"], units.total_steps
    warmup = units.steps(config["warmup"], "config.optimizer.warmup")
    cooldown = units.steps(config["cooldown"], "config.optimizer.cooldown")
    if name not in SCHEDULES:
        raise UserError(unknown_key_message(name, SCHEDULES, "config.optimizer.schedule"))
    if warmup + cooldown > total:
        raise UserError(
            f"config.optimizer: warm-up ({warmup}) and cool-down ({cooldown}) are longer than the "
            f"run ({total} steps)"
        )

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(total - warmup, 1), 0, 1)
        decay = {
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
            "linear": 1 - progress,
            "rsqrt": jnp.sqrt(max(warmup, 1) / jnp.maximum(step, max(warmup, 1))),
            "constant": jnp.ones_like(progress),
        }[name]
        rise = jnp.minimum(1.0, (step + 1) / warmup) if warmup else 1.0
        fall = jnp.clip((total - step) / cooldown, 0, 1) if cooldown else 1.0
        return peak * rise * decay * fall

    return schedule


def decay_mask(params: Any, no_decay: Sequence[str]) -> Any:
    """True for each parameter that weight decay pulls: all whose own name is not in `no_decay`."""

    def decays(path: tuple, leaf: Any) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True) not in no_decay

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: Mapping[str, Any], units: Units) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with decoupled decay (Loshchilov & Hutter 2019).

    Raises:
      UserError: an unknown optimizer, or a number out of range.
    """
    if config["name"] not in OPTIMIZERS:
        raise UserError(unknown_key_message(config["name"], OPTIMIZERS, "config.optimizer.name"))
    for key in ("learning_rate", "weight_decay", "clip_norm"):
        if config[key] < 0:
            raise UserError(f"config.optimizer.{key} is negative: {config[key]}")
    for key in ("b1", "b2", "ema_decay"):
        if not 0 <= config[key] < 1:
            raise UserError(f"config.optimizer.{key} must be in [0, 1), not {config[key]}")
    clip = [optax.clip_by_global_norm(config["clip_norm"])] if config["clip_norm"] else []
    return optax.chain(
        *clip,
        optax.adamw(
            make_schedule(config, units),
            b1=config["b1"],
            b2=config["b2"],
            eps=config["eps"],
            weight_decay=config["weight_decay"],
            mask=lambda params: decay_mask(params, config["no_decay"]),
        ),
    )
