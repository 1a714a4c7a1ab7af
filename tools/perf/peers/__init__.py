"""The peers that our step can be measured beside, and which of them fit an objective."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from tools.perf.jax_step import JaxStep
from tools.perf.peers.torch_models import TORCH_PEERS
from tools.perf.peers.torch_step import TorchStep
from tools.perf.result import Contender
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.objectives import OBJECTIVES, Objective
from vlp_jax.planning.search import sections
from vlp_jax.training.setup import Setup

# Keys of `config.objective`, and of its parts, that say how a step is computed and not what (but
# for rounding): each at the value that does nothing. A new one is a line here. Parts of the batch
# (`config.microbatches`) stay: without them it may not fit.
PLAIN = {
    "attention": "xla",
    "remat": "none",
    "loss_form": "plain",
    "scan_layers": True,
    "quantization": "none",
}
PLAIN_NOTES = (
    "one device; " + ", ".join(f"{key}={value}" for key, value in PLAIN.items()),
    "with one device XLA still has the threads of all cores",
)


# Peer -> why it has no model for an objective; None if it has one, as `plain` always does.
REFUSALS = {
    "plain": lambda objective: None,
    **{name: peer.refusal for name, peer in TORCH_PEERS.items()},
}
PEERS = tuple(REFUSALS)


def check_peers(names: list[str], objective: Objective) -> None:
    """Checks the peers before anything is compiled.

    Raises:
      UserError: an unknown peer, one without a model for the objective, or one that is not
        installed.
    """
    for name in names:
        if name not in PEERS:
            raise UserError(unknown_key_message(name, PEERS, "--peer"))
        refused = REFUSALS[name](objective)
        if refused:
            fitting = [other for other, refuses in REFUSALS.items() if refuses(objective) is None]
            raise UserError(f"--peer {name}: {refused}; take one of: {', '.join(fitting)}")
        for package in ("torch", TORCH_PEERS[name].package) if name in TORCH_PEERS else ():
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"--peer {name} needs the package {package}: install what is in "
                    "requirements-test.txt, or leave the peer out"
                )


def make_peer(
    name: str,
    setup: Setup,
    batch: Mapping[str, np.ndarray],
    compile_torch: bool | None,
) -> Contender:
    """Makes the peer `name` of the step of `setup`, ready to run.

    Args:
      batch: a global one of `setup`.
      compile_torch: whether PyTorch models go through `torch.compile`; None for where there is a
        GPU.

    Raises:
      UserError: the config does not fit one device.
    """
    # Plain takes the first of ours: the others stay idle in its turn.
    devices = list(setup.mesh.devices.flat)
    if name == "plain":
        return JaxStep(name, plain_config(setup.config), devices[:1], notes=PLAIN_NOTES)
    check_devices(name, devices)
    # A peer that trains more would look slower for the wrong reason.
    if setup.config.optimizer.frozen:
        raise UserError(f"--peer {name} trains all parameters, and optimizer.frozen holds some")
    differences = only_ours(setup.config)
    recipe = TORCH_PEERS[name].recipe(setup.objective)
    recipe = dataclasses.replace(recipe, notes=(*recipe.notes, *differences))
    return TorchStep(
        name,
        recipe,
        batch,
        setup.config.optimizer,
        on_gpu=devices[0].platform == "gpu",
        compile_model=compile_torch,
        mean=setup.objective.model.pixels.mean,
        std=setup.objective.model.pixels.std,
    )


def check_devices(name: str, devices: Sequence[jax.Device]) -> None:
    """Raises UserError if ours has several accelerators; `plain` is made for that comparison."""
    if name != "plain" and devices[0].platform != "cpu" and len(devices) > 1:
        raise UserError(
            f"--peer {name} runs on one device, and ours on {len(devices)}: give --devices 1"
        )


def only_ours(config: ConfigDict) -> list[str]:
    """Returns the parts of our step that no peer of PyTorch has, in words."""
    found = []
    for section in sections(config):
        if section.get("remat", "none") != "none":
            found.append(f"it keeps all activations, ours has remat={section.remat}")
        if section.get("quantization", "none") != "none":
            found.append(f"its products are not in {section.quantization}, ours are")
    optimizer = config.optimizer
    if optimizer.name != "adamw":
        found.append(f"its optimizer is AdamW, ours {optimizer.name}")
    if optimizer.first_moment_dtype not in (None, "float32"):
        found.append(f"its moments are float32, ours has {optimizer.first_moment_dtype}")
    if config.microbatches > 1:
        found.append(f"it computes the batch at once, ours in {config.microbatches} parts")
    if config.optimizer.ema_decay:
        found.append("it keeps no average of its parameters, ours does")
    return list(dict.fromkeys(found))


def uses_torch(names: list[str]) -> bool:
    """Returns whether PyTorch runs in the process."""
    return any(name in TORCH_PEERS for name in names)


def plain_config(config: ConfigDict) -> ConfigDict:
    """Returns a copy of `config` with the values of `PLAIN`, for a mesh of one device."""
    config = one_device(config).unlock()
    _make_plain(config.objective)
    return config.lock()


def one_device(config: ConfigDict) -> ConfigDict:
    """Returns a copy of `config` for a mesh of one device."""
    config = config.copy_and_resolve_references().unlock()
    for axis in config.mesh:
        # None: the axis takes what is left, which is one device.
        config.mesh[axis] = None
    return config.lock()


def _make_plain(section: ConfigDict) -> None:
    for part in (section.get("parts") or {}).values():
        _make_plain(part)
    known = inspect.signature(OBJECTIVES[section.name]).parameters
    section.update({key: value for key, value in PLAIN.items() if key in known})
