"""Makes optimizers and learning-rate schedules from `config.optimizer`, with Optax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.objectives.compute import DTYPES
from vlp_jax.training import param_groups
from vlp_jax.training.when import Units

SCHEDULES = ("cosine", "rsqrt", "linear", "constant")

# Largest ratio between the learning rates before and after a restart that needs no warning.
LARGEST_JUMP = 1.2

# Muon orthogonalizes the update of a matrix. A kernel may have more than two axes, so this table
# says which of its axes are the matrix's input and which its output, by the name of the layer.
# Other layers are Dense: input is the last axis but one, output the last. Axes in front of these
# (stacked layers) count as separate matrices.
MATRIX_AXES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "query": ((-3,), (-2, -1)),
    "key": ((-3,), (-2, -1)),
    "value": ((-3,), (-2, -1)),
    "out": ((-3, -2), (-1,)),
    "patch_embedding/projection": ((-4, -3, -2), (-1,)),
}
DENSE_AXES = ((-2,), (-1,))
# Root mean square of every matrix's update: Adam's in practice, so that one learning rate and one
# weight decay fit both (Liu et al. 2025, "Muon is Scalable for LLM Training", 2.2).
MUON_RMS = 0.2


def make_schedule(config: Mapping[str, Any], units: Units) -> optax.Schedule:
    """Makes the schedule: a linear warm-up, the named decay, and a linear cool-down to zero.

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
            # The maximum keeps this factor at 1 through the warm-up, whose shape is `rise`.
            "rsqrt": jnp.sqrt(max(warmup, 1) / jnp.maximum(step, max(warmup, 1))),
            "constant": jnp.ones_like(progress),
        }[name]
        # (step + 1): with a rate of 0 the first step would be wasted.
        rise = jnp.minimum(1.0, (step + 1) / warmup) if warmup else 1.0
        fall = jnp.clip((total - step) / cooldown, 0, 1) if cooldown else 1.0
        return peak * rise * decay * fall

    return schedule


def learning_rates(config: Mapping[str, Any], units: Units, step: int, params: Any) -> dict:
    """Returns key -> the learning rate at `step`, also of the lowest layer of a decayed tower."""
    peaks = {"learning_rate": config["learning_rate"]}
    if config["name"] == "muon":
        peaks["muon.learning_rate"] = config["muon"]["learning_rate"]
    rates = {
        key: float(make_schedule({**config, "learning_rate": peak}, units)(step))
        for key, peak in peaks.items()
    }
    lowest: dict[str, float] = {}
    for path, factor in param_groups.layer_factors(params, config["layer_decay"]).items():
        tower = f"layer_decay.{path.partition('/')[0]}"
        lowest[tower] = min(lowest.get(tower, 1.0), float(np.min(factor)))
    return rates | {tower: rates["learning_rate"] * factor for tower, factor in lowest.items()}


def learning_rate_jumps(
    before: Mapping[str, Any], now: Mapping[str, Any], units: Units, step: int, params: Any
) -> Iterator[str]:
    """Yields a warning for each learning rate that jumps by more than a fifth when a run resumes.

    Schedules depend on the length of the run, so a run that is prolonged has another rate at
    `step`.

    Args:
      before, now: the config of the run so far, and the config it resumes with at `step`.
      units: the durations of the resumed run.
      params: the parameters, or their shapes.
    """
    old_units = dataclasses.replace(units, total_steps=None)
    try:
        total = old_units.steps(before["duration"], "config.duration")
        old_units = dataclasses.replace(old_units, total_steps=total)
        # Not after its last step, where most schedules have reached 0.
        old = learning_rates(before["optimizer"], old_units, min(step, total - 1), params)
    except UserError:
        return  # the old duration is in epochs, and the present data has no known size
    new = learning_rates(now["optimizer"], units, step, params)
    for key in sorted(old.keys() | new.keys()):
        was, is_now = (rates.get(key, rates["learning_rate"]) for rates in (old, new))
        if max(was, is_now) <= LARGEST_JUMP * min(was, is_now):
            continue
        times = f"{is_now / was:.3g} times as high" if was else "no longer 0"
        ways = ""
        if key in now["optimizer"] and was and is_now:
            rate = now["optimizer"][key] * was / is_now
            ways = f" (--config.optimizer.{key}={rate:.3g} begins where it was)"
        length = f", of {total:,} steps and now of {units.total_steps:,}"
        yield (
            f"warning: at step {step:,} the learning rate of config.optimizer.{key} leaps from "
            f"{was:.3g} to {is_now:.3g}, {times}: the schedule follows from config.duration"
            f"{length if total != units.total_steps else ''} and config.optimizer{ways}"
        )


def decay_mask(params: Any, no_decay: Sequence[str]) -> Any:
    """True for each parameter with weight decay: all whose last name is not in `no_decay`."""

    def decays(path: tuple, leaf: Any) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True) not in no_decay

    return jax.tree_util.tree_map_with_path(decays, params)


def first_moment_dtype(config: Mapping[str, Any], default: str = "float32") -> Any:
    """Reads the first moment's dtype; the second is float32: b2 near 1 is too fine for bfloat16."""
    name = config["first_moment_dtype"] or default
    if name not in DTYPES:
        where = "config.optimizer.first_moment_dtype"
        raise UserError(unknown_key_message(name, DTYPES, where))
    return DTYPES[name]


def adamw(config: Mapping[str, Any], units: Units) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay (Loshchilov & Hutter 2019)."""
    return optax.adamw(make_schedule(config, units), eps=config["eps"], **_moments(config))


def _moments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that AdamW and Lion share."""
    return {
        **{name: config[name] for name in ("b1", "b2", "weight_decay")},
        "mask": lambda params: decay_mask(params, config["no_decay"]),
        "mu_dtype": first_moment_dtype(config),
    }


def matrix_axes(path: str) -> optax.contrib.MuonDimensionNumbers | None:
    """Returns the axes that Muon orthogonalizes; None for what is not the kernel of a layer."""
    layer, _, leaf = path.rpartition("/")
    if leaf != "kernel":
        return None
    # With slashes, so that only whole names match: "readout" is not "out".
    axes = (a for name, a in MATRIX_AXES.items() if f"/{layer}".endswith(f"/{name}"))
    return optax.contrib.MuonDimensionNumbers(*next(axes, DENSE_AXES))


def muon(config: Mapping[str, Any], units: Units) -> optax.GradientTransformation:
    """Muon for the kernels of layers, AdamW for the rest, on one schedule (Jordan et al. 2024)."""

    def by_path(function: Callable[[str], Any], params: Any) -> Any:
        return param_groups.map_with_path(lambda path, _: function(path), params)

    matrices = optax.contrib.muon(
        make_schedule({**config, "learning_rate": config["muon"]["learning_rate"]}, units),
        beta=config["muon"]["momentum"],
        mu_dtype=first_moment_dtype(config),
        weight_decay=config["weight_decay"],
        weight_decay_mask=lambda params: decay_mask(params, config["no_decay"]),
        muon_weight_dimension_numbers=lambda params: by_path(matrix_axes, params),
        consistent_rms=MUON_RMS,
    )
    return optax.partition(
        {"matrices": matrices, "others": adamw(config, units)},
        lambda params: by_path(lambda path: "matrices" if matrix_axes(path) else "others", params),
    )


def adafactor(config: Mapping[str, Any], units: Units) -> optax.GradientTransformation:
    """Adafactor as changed by Zhai et al. 2022, "Scaling Vision Transformers", 3.3.

    The constants come from google-research/big_vision, optax.py, `scale_by_adafactor`:

    - The second moment of a parameter is factored over its two largest dimensions if both have at
      least 32 numbers. It decays by min(b2, 1 - t ** -0.8) at step t = 1, 2, ...; big_vision's
      default `b2` is 0.999, and SigLIP takes 0.95. 1e-30 is added to the squared gradient; `eps` is
      not used.
    - The first moment averages the scaled gradient with b1 = 0.9, is not debiased, and is bfloat16
      unless `first_moment_dtype` is set.
    - Updates are not clipped by their root mean square, and learning rates are not relative to the
      size of a parameter. The global norm of the gradient is clipped first, to 1.
    - Weight decay is decoupled. In big_vision it is multiplied by the schedule alone, here by the
      learning rate: their `wd` of 1e-4 with an `lr` of 1e-3 is a `weight_decay` of 0.1 here.

    Each layer of a stack is factored by itself, as separate layers are.
    """

    def decay(step: jax.Array, exponent: float) -> jax.Array:
        # optax counts steps from 0, and the formula from 1.
        return jnp.minimum(config["b2"], 1.0 - (step + 1.0) ** -exponent)

    second_moment = optax.scale_by_factored_rms(
        decay_rate=0.8, min_dim_size_to_factor=32, epsilon=1e-30, decay_rate_fn=decay
    )
    dtype = first_moment_dtype(config, default="bfloat16")
    first_moment = optax.ema(config["b1"], debias=False, accumulator_dtype=dtype)
    return optax.chain(
        param_groups.layer_by_layer(second_moment),
        *([first_moment] if config["b1"] else []),
        optax.add_decayed_weights(
            config["weight_decay"], lambda params: decay_mask(params, config["no_decay"])
        ),
        optax.scale_by_learning_rate(make_schedule(config, units)),
    )


def lion(config: Mapping[str, Any], units: Units) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", program 1).

    Section 5 recommends a learning rate 3 to 10 times smaller than AdamW's, and a weight decay
    larger by the same factor. The paper's default is b1 = 0.9 and b2 = 0.99. `eps` is not used.
    """
    return optax.lion(make_schedule(config, units), **_moments(config))


OPTIMIZERS = {"adamw": adamw, "muon": muon, "adafactor": adafactor, "lion": lion}


def make_optimizer(config: Mapping[str, Any], units: Units) -> optax.GradientTransformation:
    """Makes the optimizer: clipping by the global norm, the named rule, layer-wise decay.

    `init` and `update` take all parameters. Frozen parameters have no state and no update, and need
    no gradient; they do not count in the norm (see `param_groups`).

    Raises:
      UserError: an unknown optimizer, or a number out of range.
    """
    where = "config.optimizer"
    if config["name"] not in OPTIMIZERS:
        raise UserError(unknown_key_message(config["name"], OPTIMIZERS, f"{where}.name"))
    flat = {**config, **{f"muon.{key}": value for key, value in config["muon"].items()}}
    for key in ("learning_rate", "weight_decay", "clip_norm", "muon.learning_rate"):
        if flat[key] < 0:
            raise UserError(f"{where}.{key} is negative: {flat[key]}")
    for key in ("b1", "b2", "muon.momentum"):
        if not 0 <= flat[key] < 1:
            raise UserError(f"{where}.{key} must be in [0, 1), not {flat[key]}")
    for tower, decay in config["layer_decay"].items():
        if not 0 < decay <= 1:
            raise UserError(f"{where}.layer_decay.{tower} must be in (0, 1], not {decay}")
    param_groups.check_patterns(config["frozen"], f"{where}.frozen")
    clip = [optax.clip_by_global_norm(config["clip_norm"])] if config["clip_norm"] else []
    # Clipping comes first, so that the moments are made of clipped gradients.
    optimizer = optax.chain(*clip, OPTIMIZERS[config["name"]](config, units))
    optimizer = param_groups.without_frozen(optimizer, config["frozen"])
    return param_groups.with_layer_decay(optimizer, config["layer_decay"])
