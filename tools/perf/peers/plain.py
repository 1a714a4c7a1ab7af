"""Our own step with every optimization off."""

from __future__ import annotations

import inspect

from ml_collections import ConfigDict

from vlp_jax.objectives import OBJECTIVES

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
NOTES = (
    "one device; " + ", ".join(f"{key}={value}" for key, value in PLAIN.items()),
    "with one device XLA still has the threads of all cores",
)


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
