"""Our training step on one batch in memory, and the peak of the devices. Needs no TensorFlow."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from tools.perf.harness import StepTimer
from vlp_jax.defaults import duration
from vlp_jax.errors import UserError
from vlp_jax.objectives import Objective
from vlp_jax.objectives.base import PIXELS, TOKENS
from vlp_jax.observe.accelerators import table_flops
from vlp_jax.observe.compilation import CompileWatch
from vlp_jax.parallel.batch import put_batch
from vlp_jax.parallel.mesh import make_mesh
from vlp_jax.training.abstract_setup import abstract_setup, tokenizer_sizes
from vlp_jax.training.setup import Setup
from vlp_jax.training.step import compile_step

# Examples of an epoch, for a config whose durations are in epochs, and steps of the run. They set
# the learning rate, and nothing about the speed; a published run in small batches would have more
# steps than an int32 holds.
NOMINAL_EPOCH = 1_281_167
NOMINAL_STEPS = 1_000_000_000


# A product takes under 0.2 s, and more than the time that it takes to start it by far.
_SIZES = {"cpu": (2048,), "other": (8192, 16384)}
_REPEATS, _IN_A_ROW = 5, 4


class JaxStep:
    """A `Contender`: the step of `config` on `devices`, with state and batch.

    Args:
      twice: whether it is also compiled a second time, from the persistent cache.
      check: is given the objective before anything is compiled.

    Raises:
      UserError: the config does not fit the devices or itself.
    """

    notes: tuple[str, ...]

    def __init__(
        self,
        name: str,
        config: ConfigDict,
        devices: Sequence[jax.Device],
        *,
        notes: Sequence[str] = (),
        twice: bool = False,
        check: Callable[[Objective], None] = lambda objective: None,
    ):
        self.name, self.notes = name, tuple(notes)
        self.setup = make_bench_setup(config, devices)
        check(self.setup.objective)
        setup = self.setup
        self.program, compile_facts = (compile_twice if twice else _compile)(setup)
        # A real state, not zeros: with products of zeros a GPU draws less power and clocks higher.
        self._state = setup.fresh_state()
        self.batch = fixed_batch(setup)
        self._on_device = put_batch(self.batch, setup.mesh)
        jax.block_until_ready((self._state, self._on_device))
        self.facts: dict[str, Any] = {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(setup.abstract.params)),
            "devices": setup.mesh.size,
            "compile_seconds": compile_facts,
            "program_bytes": _program_bytes(self.program.program),
        }

    def run(self, steps: int) -> list[float]:
        """Trains `steps` steps; the seconds of each."""
        timer = StepTimer(jax.block_until_ready)
        for _ in range(steps):
            self._state, told = self.program(self._state, self._on_device)
            timer.started(told)
        seconds = timer.seconds()
        jax.block_until_ready(self._state)
        return seconds

    def read_peak_memory(self) -> None:
        """Puts the most memory that JAX has had in use on a device of this process into `facts`,
        where the device tells. To be called before other programs of JAX run."""
        stats = [device.memory_stats() or {} for device in self.setup.mesh.devices.flat]
        peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
        if peaks:
            self.facts["peak_bytes_in_use"] = max(peaks)

    @property
    def step_flops(self) -> float:
        """FLOPs of the model in one step: forward, and twice as many backward."""
        return 3.0 * self.setup.forward_flops


def make_bench_setup(config: ConfigDict, devices: Sequence[jax.Device]) -> Setup:
    """Makes the setup of `config` on `devices`, without its data.

    Raises:
      UserError: the config does not fit the devices or itself.
    """
    config = config.copy_and_resolve_references().unlock()
    config.duration = duration(steps=NOMINAL_STEPS)
    return abstract_setup(config, make_mesh(config.mesh, devices), NOMINAL_EPOCH)


def _program_bytes(program: Any) -> dict[str, int]:
    """Returns the bytes that a program needs of one device; empty if the compiler does not tell."""
    memory = program.memory_analysis()
    if memory is None:
        return {}
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }


def compile_twice(setup: Setup) -> tuple[Any, dict[str, Any]]:
    """Compiles the step with an empty persistent cache and again with a full one.

    The settings of the cache are as before when it ends.

    Returns:
      The program, and seconds with tracing: `cold`, `warm`, and `from_cache`, whether the second
      program came from the cache; XLA cannot keep every program.
    """
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    with tempfile.TemporaryDirectory(prefix="vlp_jax_cache_") as folder:
        try:
            for name, value in zip(names, (folder, True, 0.0), strict=True):
                jax.config.update(name, value)
            # The cache is opened once, at the first compilation: a new folder needs a new start.
            compilation_cache.reset_cache()
            # JAX's own cache in memory would answer before the persistent one is asked.
            jax.clear_caches()
            program, facts = _compile(setup)
            jax.clear_caches()
            with CompileWatch() as watch:
                facts["warm"] = _compile(setup)[1]["cold"]
            facts["from_cache"] = watch.so_far().hits > 0
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
    return program, facts


def _compile(setup: Setup) -> tuple[Any, dict[str, Any]]:
    begin = time.perf_counter()
    program = compile_step(setup.step, setup.abstract, setup.batch_spec, setup.mesh)
    return program, {"cold": time.perf_counter() - begin}


def fixed_batch(setup: Setup) -> dict[str, np.ndarray]:
    """Makes a global batch of random pixels, token ids and labels.

    Texts end with the end of text, and no other token has its id or the padding's: every tower
    sees the full length. Labels are 0 or 1, which all objectives have.

    Raises:
      UserError: the objective reads a field of another kind.
    """
    rng = np.random.default_rng(0)
    batch = {}
    for name, spec in setup.batch_spec.items():
        field = setup.objective.reads.get(name)
        kind = None if field is None else field.kind
        if kind == PIXELS:
            batch[name] = rng.integers(0, 256, spec.shape, np.uint8)
        elif kind == TOKENS:
            tokenizer = tokenizer_sizes(setup.config.tokenizer)
            vocab_size = tokenizer.vocab_size
            # From 3 on: lower ids are padding, end and beginning of text.
            batch[name] = rng.integers(min(3, vocab_size - 1), vocab_size, spec.shape, np.int32)
            # Towers that pool at the end of text look for it.
            batch[name][:, -1] = tokenizer.eos_id
        elif spec.dtype == np.int32:
            batch[name] = rng.integers(0, 2, spec.shape, np.int32)
        else:
            raise UserError(
                f"the step benchmark has no values for the field {name!r} ({spec.dtype}) of "
                f"{type(setup.objective).__name__}; measure a config without it"
            )
    return batch


@dataclasses.dataclass(frozen=True)
class Peak:
    """FLOP/s of all devices together, a multiply-add counting 2.

    Attributes:
      measured: the best rate of a large matrix product in this process.
      data_sheet: of the table of accelerators; None if it has no such device.
      dtype: of the product.
      size: rows and columns of the best one.
    """

    measured: float
    data_sheet: float | None
    dtype: str
    size: int


def measure_peak(devices: Sequence[jax.Device], compute_dtype: Any) -> Peak:
    """Measures `devices`: in bfloat16 on accelerators, in the dtype of the computation on CPU.

    CPU devices of one process share its cores: there one of them, which has all threads, and all
    of them at once are tried.
    """
    on_cpu = devices[0].platform == "cpu"
    dtype = jnp.dtype(compute_dtype if on_cpu else jnp.bfloat16)
    # XLA gives each CPU device a pool: one device with all threads may win, or two side by side.
    groups = [devices[:1], devices] if on_cpu and len(devices) > 1 else [devices]
    sizes = _SIZES["cpu" if on_cpu else "other"]
    rate, size = max((_rate(group, n, dtype), n) for group in groups for n in sizes)
    try:
        sheet = table_flops(devices[0].device_kind, dtype) * len(devices)
    except KeyError:
        sheet = None
    return Peak(rate, sheet, dtype.name, size)


def _rate(devices: Sequence[jax.Device], n: int, dtype: Any) -> float:
    """Returns FLOP/s of n x n products, one on each of `devices` at a time."""
    host = jax.random.normal(jax.random.key(0), (n, n), jnp.float32).astype(dtype)
    matrices = [jax.device_put(host, device) for device in devices]
    product = jax.jit(jnp.matmul)
    # Compiles, and lets clocks rise, outside of the timed products.
    jax.block_until_ready([product(x, x) for x in matrices])
    best = float("inf")
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready([product(x, x) for _ in range(_IN_A_ROW) for x in matrices])
        # The best and not the median: a peak is what the machine can do.
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 * _IN_A_ROW * len(devices) / best
