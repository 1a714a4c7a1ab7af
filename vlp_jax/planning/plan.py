"""Makes the plan of a config on a target: memory, traffic, FLOPs, the least time of a step."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from vlp_jax.objectives.flops import Flops, count_flops
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import rules
from vlp_jax.planning import hlo, kernels, loops, traffic
from vlp_jax.planning.compile import OutOfMemory, Program, compile_setup
from vlp_jax.planning.kernels import PallasCalls, pallas_calls
from vlp_jax.planning.memory import StateBytes, activation_bytes, state_bytes
from vlp_jax.planning.target import Chip, Target
from vlp_jax.training.abstract_setup import abstract_setup, set_dtypes
from vlp_jax.training.setup import Setup
from vlp_jax.training.step import abstract_batch


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Figures of a device in a step, read from the text of the compiled step.

    Attributes:
      hbm_traffic: bytes to and from its main memory.
      collectives: the collectives that send from it.
      cycles: the TPU compiler's estimate of its kernels, without the network, and `pallas` at its
        roofline.
      pallas: the kernels that the compiler does not estimate.
      repeated: instructions that the compiler computes again to save memory, besides `remat`.
      notes: parts of the program that could not be read, in words.
    """

    hbm_traffic: float
    collectives: list[traffic.Collective]
    cycles: float
    pallas: PallasCalls
    repeated: int
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each resource of a device is busy in a step, at its full rate; None if unknown.

    Attributes:
      compute: the matrix units.
      memory: the main memory.
      network: the links to other devices.
    """

    compute: float | None
    memory: float | None
    network: float | None

    def _known(self) -> dict[str, float]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @property
    def step_seconds(self) -> float | None:
        """Seconds if all resources work at the same time: no step is faster."""
        # Overlap is never perfect: real steps lie between this and `serial_seconds`, or above.
        return max(self._known().values(), default=None)

    @property
    def serial_seconds(self) -> float | None:
        """Seconds if each resource waits for the others, at its full rate."""
        # No known resource gives 0, which is no time.
        return sum(self._known().values()) or None

    @property
    def bound_by(self) -> str | None:
        """The resource that takes longest."""
        known = self._known()
        return max(known, key=known.__getitem__, default=None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All figures of a training step. Bytes are of a device, FLOPs of all devices.

    Attributes:
      waiting: of the batches that wait on the devices while a step runs (`waiting_bytes`).
      activations: an estimate of the bytes kept between forward and backward pass.
      memory: of the compiled program; its refusal; None where nothing compiles.
      compiled: None where there is no compiled program.
    """

    setup: Setup
    target: Target
    state: StateBytes
    waiting: int
    activations: int
    model_flops: float
    hardware: Flops
    memory: Program | OutOfMemory | None
    compiled: Compiled | None

    @property
    def available(self) -> int | None:
        """Main memory of a device; None if not known."""
        # The compiler's own figure: it may grant less than the table of chips says.
        if isinstance(self.memory, OutOfMemory):
            return self.memory.available
        return self.target.chip.hbm_bytes if self.target.chip else None

    @property
    def preliminary(self) -> bool:
        """True if the compiler refused by its first, high estimate of `needed`."""
        return isinstance(self.memory, OutOfMemory) and self.memory.preliminary

    @property
    def needed(self) -> int | None:
        """Main memory that the step needs, with waiting batches; None without a compiler."""
        if self.memory is None:
            return None
        if isinstance(self.memory, OutOfMemory):
            return self.memory.needed + self.waiting
        return self.memory.bytes + self.waiting

    @property
    def fits(self) -> bool | None:
        """True if the step fits; None without a compiler, if the state alone would fit."""
        if isinstance(self.memory, OutOfMemory):
            return False
        if self.memory is not None:
            return self.needed <= self.available
        if self.available is not None and self.state.device > self.available:
            return False
        return None

    @property
    def roofline(self) -> Roofline:
        """The least time of a step."""
        chip, devices = self.target.chip, self.setup.mesh.devices
        if chip is None:
            return Roofline(None, None, None)
        dtype = self.setup.objective.compute_dtype
        # `passes`: a float32 product takes several passes of the bfloat16 units.
        compute = self.hardware.passes / devices.size / chip.peak_flops(dtype)
        if self.compiled is None:
            return Roofline(compute, None, None)
        return Roofline(
            compute,
            self.compiled.hbm_traffic / chip.hbm_bandwidth,
            traffic.network_seconds(self.compiled.collectives, list(devices.flat), chip),
        )

    @property
    def cycle_seconds(self) -> float | None:
        """The compiler's own estimate of its kernels in seconds; None without one, or a clock."""
        clock = self.target.chip.clock if self.target.chip else None
        return self.compiled.cycles / clock if self.compiled and clock else None


def make_setup_for(config: ConfigDict, target: Target, epoch_examples: int | None) -> Setup:
    """The setup of `config` on the devices of `target`.

    Raises:
      UserError: the config does not fit the devices or itself.
    """
    config = config.copy_and_resolve_references()
    # "auto" would look at this machine, which is not the target.
    set_dtypes(config, target.dtype)
    if not target.compiles:
        _set_everywhere(config.objective, "attention", "xla")  # the FLOPs are the same
    # Devices of a topology have coordinates, by which the mesh is laid out as on the real slice.
    mesh = mesh_lib.make_mesh(config.mesh, target.devices)
    return abstract_setup(config, mesh, epoch_examples)


def _set_everywhere(section: ConfigDict, key: str, value: Any) -> None:
    with section.unlocked():
        for name, inner in section.items():
            if isinstance(inner, ConfigDict):
                _set_everywhere(inner, key, value)
            elif name == key:
                section[key] = value


def step_flops(setup: Setup) -> Flops:
    """Counts the FLOPs of a step on all devices together, recomputation included."""
    with rules.use_mesh(setup.mesh):
        return count_flops(setup.step, setup.abstract, setup.batch_spec)


def waiting_bytes(setup: Setup) -> int:
    """Returns the bytes, on a device, of the batches that wait there while a step runs.

    Where several steps are one program, these are also the batches of the program that runs, but
    for one, all of them stacked, and the batches of the next program.
    """
    batch = abstract_batch(setup.batch_spec, setup.mesh)
    several = setup.config.steps_per_dispatch
    of_programs = 3 * several - 1 if several > 1 else 0
    return (setup.config.prefetch + of_programs) * rules.spread(batch, setup.mesh).per_device


def make_plan(setup: Setup, target: Target) -> Plan:
    """Compiles the step if the target has a compiler, and reads the program."""
    memory = compile_setup(setup) if target.compiles else None
    return Plan(
        setup=setup,
        target=target,
        state=state_bytes(setup.abstract, setup.mesh),
        waiting=waiting_bytes(setup),
        activations=activation_bytes(setup),
        # The backward pass has two products for each product of the forward pass.
        model_flops=3 * setup.forward_flops,
        hardware=step_flops(setup),
        memory=memory,
        compiled=read_program(memory, setup, target.chip) if isinstance(memory, Program) else None,
    )


def read_program(program: Program, setup: Setup, chip: Chip) -> Compiled:
    """Reads the text of a step that was compiled for devices of the kind `chip`."""
    module = hlo.parse(program.text)
    runs = loops.count_runs(module)
    notes = tuple(
        f"the rounds of the loop {name} are not known: counted once" for name in runs.unknown
    )
    repeated = (".remat" in i.name for one, _ in runs.running(module) for i in one.instructions)
    pallas = pallas_calls(module, runs, chip, setup.objective.compute_dtype)
    return Compiled(
        hbm_traffic=kernels.hbm_bytes(module, runs),
        collectives=traffic.collectives(module, runs, dict(setup.mesh.shape)),
        cycles=kernels.estimated_cycles(module, runs) + pallas.cycles(chip.clock),
        pallas=pallas,
        repeated=sum(repeated),
        notes=(*notes, *pallas.notes(chip.clock)),
    )
