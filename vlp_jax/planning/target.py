"""The devices that `--topology` names, which need not be here, and the table of their kinds.

`vlp_jax.observe.accelerators` has the peaks of matrix products. Prices are nowhere here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any

import jax

from vlp_jax.errors import UserError
from vlp_jax.observe.accelerators import table_flops
from vlp_jax.parallel.topologies import largest_topologies, tpu_devices

GIB, GB, GBIT = 2**30, 10**9, 10**9 / 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a kind. Bandwidths are bytes a second.

    Attributes:
      device_kind: as JAX names it, and the table of peaks.
      hbm_bytes: main memory; on TPU what the compiler grants a program.
      link_bandwidth: of one link of the fast network, in one direction. A TPU has two links along
        each axis of its torus; a GPU has one to all others of its node.
      slow_bandwidth: of the network beyond (DCN, InfiniBand), in one direction; None if unknown.
      torus_axes: axes of the physical network; 0 for a switch.
      wraps_at: an axis of the torus closes to a ring if its length is a multiple of this.
      devices_per_chip: JAX devices on one chip, which share its links.
      node_devices: devices that the fast network joins; None for as many as a slice has.
      clock: of the cores, Hz; None if unknown. It follows from the peak and the number of matrix
        units: peak / (units x 128 x 128 x 2).
    """

    device_kind: str
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    slow_bandwidth: float | None
    torus_axes: int = 0
    wraps_at: int = 1
    devices_per_chip: int = 1
    node_devices: int | None = None
    clock: float | None = None

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s of matrix products in `dtype`."""
        return table_flops(self.device_kind, dtype)


# The memory of a TPU is what its compiler says it grants (libtpu 0.0.42.1),
# below the chip's 16, 32, 96, 32 and 192 GiB. A network bandwidth "per chip" of the pages counts
# all links in both directions: v5e 400 GB/s = 4 links x 2 x 50.
TPUS: dict[str, Chip] = {
    # https://docs.cloud.google.com/tpu/docs/v4 (2 cores of 4 units); links: Jouppi et al. 2023,
    # "TPU v4", table 4, 6 links of 50 GB/s. A torus has axes of multiples of 4.
    "v4": Chip(
        "TPU v4", int(30.75 * GIB), 1200 * GB, 50 * GB, None, 3, 4, clock=275e12 / (8 * 2**15)
    ),
    # https://docs.cloud.google.com/tpu/docs/v5e: 819 GB/s, 400 GB/s, DCN 6.4 Tbit/s for 256 chips,
    # one core of 4 units. A ring needs the full 16 chips.
    "v5e": Chip(
        *("TPU v5 lite", int(15.75 * GIB), 819 * GB, 50 * GB, 25 * GBIT, 2, 16),
        clock=197e12 / (4 * 2**15),
    ),
    # https://docs.cloud.google.com/tpu/docs/v5p: 2765 GB/s, 1200 GB/s on 6 links, DCN 50 Gbit/s a
    # chip, 2 cores of 4 units.
    "v5p": Chip(
        *("TPU v5p", int(95.74 * GIB), 2765 * GB, 100 * GB, 50 * GBIT, 3, 4),
        clock=459e12 / (8 * 2**15),
    ),
    # https://docs.cloud.google.com/tpu/docs/v6e: 1600 GB/s, 3200 Gbit/s on 4 ports in one
    # direction, DCN 25.6 Tbit/s for 256 chips. Its units are larger; their clock is not published.
    "v6e": Chip("TPU v6 lite", int(31.25 * GIB), 1600 * GB, 100 * GB, 100 * GBIT, 2, 16),
    # https://docs.cloud.google.com/tpu/docs/tpu7x: 7380 GB/s, 1200 GB/s on 6 links, DCN 100 Gbit/s
    # a chip. A chip is two devices, each with half of its memory, bandwidth and links.
    "tpu7x": Chip(
        "TPU7x", int(94.75 * GIB), 3690 * GB, 50 * GB, 50 * GBIT, 3, 4, devices_per_chip=2
    ),
}

# SXM boards in HGX nodes of 8. NVLink "bandwidth" of the data sheets counts both directions. The
# network beyond is the DGX systems': one port a GPU.
GPUS: dict[str, Chip] = {
    # NVIDIA A100 80GB data sheet: 2039 GB/s, NVLink 600 GB/s; DGX A100: HDR, 200 Gbit/s
    "a100": Chip("NVIDIA A100", 80 * GB, 2039 * GB, 300 * GB, 200 * GBIT, node_devices=8),
    # NVIDIA H100 data sheet: 3.35 TB/s, NVLink 900 GB/s; DGX H100: NDR, 400 Gbit/s
    "h100": Chip("NVIDIA H100", 80 * GB, 3350 * GB, 450 * GB, 400 * GBIT, node_devices=8),
    # NVIDIA H200 data sheet: 141 GB, 4.8 TB/s, NVLink 900 GB/s
    "h200": Chip("NVIDIA H200", 141 * GB, 4800 * GB, 450 * GB, 400 * GBIT, node_devices=8),
    # NVIDIA HGX B200 data sheet: 180 GB, 8 TB/s, NVLink 1.8 TB/s
    "b200": Chip("NVIDIA B200", 180 * GB, 8000 * GB, 900 * GB, 400 * GBIT, node_devices=8),
}


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
    raise UserError(
        f"--topology {name}: not known; it is KIND:SHAPE of a TPU, up to {largest_topologies()}, "
        f"or cpu:N, or gpu:KINDxN with KIND one of {', '.join(GPUS)}"
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
