"""The devices that `--topology` names, which need not be here."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any

import jax

from vlp_jax.errors import UserError
from vlp_jax.parallel.topologies import known_topologies, tpu_devices
from vlp_jax.planning.chips import GPUS, TPUS, Chip

MOST_DEVICES = 4096  # of a CPU that plays others


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to plan for.

    Attributes:
      devices: of a TPU, which can be compiled for; else as many CPU devices that stand in and
        take part in shardings alone.
      chip: None for a CPU, of which nothing is known.
      compiles: whether there is a compiler for the devices.
      dtype: of the computation where the config leaves it open.
    """

    name: str
    devices: list[Any]
    chip: Chip | None
    compiles: bool
    dtype: str

    @property
    def chips(self) -> float:
        """Number of chips, which is the unit of prices."""
        return len(self.devices) / (self.chip.devices_per_chip if self.chip else 1)


def make_target(name: str, slices: int = 1) -> Target:
    """Makes the target of "v5e:16x16", "gpu:h100x8" or "cpu:8".

    Args:
      slices: of a TPU, joined by a slower network.

    Raises:
      UserError: there is no such topology, or libtpu is missing.
    """
    kind, _, rest = name.partition(":")
    if kind in TPUS:
        return Target(name, tpu_devices(name, slices), TPUS[kind], True, "bfloat16")
    if slices != 1:
        raise UserError(f"--slices is for TPUs; {name} has none")
    if kind == "cpu" and rest.isdigit():
        # Nothing is known of a CPU's peak and memory; it computes in float32.
        return Target(name, _stand_ins(int(rest)), None, False, "float32")
    gpu = re.fullmatch(r"(\w+)x(\d+)", rest)
    if kind == "gpu" and gpu:
        if gpu.group(1) not in GPUS:
            known = ", ".join(f"gpu:{one}xN" for one in GPUS)
            raise UserError(f"--topology {name}: this GPU is not known (known: {known})")
        devices = _stand_ins(int(gpu.group(2)))
        return Target(name, devices, GPUS[gpu.group(1)], False, "bfloat16")
    # The last of each generation is the largest: the message shows the range.
    largest = {topology.partition(":")[0]: topology for topology in known_topologies()}
    raise UserError(
        f"--topology {name}: not known; it is KIND:SHAPE of a TPU, up to "
        f"{', '.join(largest.values())}, or cpu:N, or gpu:KINDxN with KIND one of {', '.join(GPUS)}"
    )


def _stand_ins(count: int) -> list[Any]:
    """CPU devices. JAX makes them when it is first asked for one, and then no more."""
    if not 1 <= count <= MOST_DEVICES:
        raise UserError(f"--topology: 1 to {MOST_DEVICES} devices can be planned for, not {count}")
    if count > jax.config.jax_num_cpu_devices:
        # It raises if JAX has its devices already; there are too few of them, as is said below.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(
            f"this process has {len(found)} CPU devices already and cannot make {count}: "
            f"start it with JAX_NUM_CPU_DEVICES={count}"
        )
    return found[:count]
