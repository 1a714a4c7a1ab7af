"""The largest batch that fits, and the cheapest rematerialization, with few compiles; advice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from vlp_jax.models.layers import REMAT_POLICIES
from vlp_jax.parallel.mesh import batch_shards
from vlp_jax.planning.compile import OutOfMemory, compile_setup
from vlp_jax.planning.plan import Plan, make_setup_for, step_flops
from vlp_jax.training.setup import Setup

MOST_COMPILES = 8


@dataclasses.dataclass(frozen=True)
class Trial:
    """The answer of the compiler for one batch size.

    Attributes:
      batch_size: of the whole mesh.
      fits: whether the step fits.
      needed: bytes of a device; for a step that does not fit the compiler's estimate.
    """

    batch_size: int
    fits: bool
    needed: int


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest batch that fits, as far as the search came.

    Attributes:
      batch_size: it was compiled and fits; None if none was found.
      exact: the next larger multiple of `quantum` was compiled and does not fit.
      trials: all compiles, in order.
    """

    batch_size: int | None
    quantum: int
    exact: bool
    trials: tuple[Trial, ...]


def largest_batch(
    attempt: Callable[[int], Trial],
    *,
    start: int,
    quantum: int,
    fixed: int,
    available: int,
    known: Sequence[Trial] = (),
    most_compiles: int = MOST_COMPILES,
) -> Largest:
    """Searches the multiples of `quantum` for the largest that fits.

    Memory is nearly affine in the batch. The line goes through the two largest batches that fit,
    before there are two through one and the state; where it crosses what is available is tried
    next, and with its neighbour the answer is sure. An estimate of a compiler that refused serves
    only as long as nothing has fitted.

    Args:
      attempt: compiles for a batch size.
      start: the first to try.
      fixed: bytes that do not follow the batch, at least: the state's.
      available: bytes of a device.
      known: trials made before, which are not made again.
    """
    trials = {trial.batch_size: trial for trial in known}
    made: list[Trial] = []

    def fitting() -> list[Trial]:
        return sorted((t for t in trials.values() if t.fits), key=lambda t: t.batch_size)

    def ceiling() -> int | None:
        refused = [t.batch_size for t in trials.values() if not t.fits]
        return min(refused, default=None)

    # Batches that the mesh does not divide are refused before a compile.
    size = max(quantum, start - start % quantum)
    for _ in range(most_compiles):
        if size not in trials:
            trials[size] = attempt(size)
            made.append(trials[size])
        size = _next(fitting(), ceiling(), trials, quantum, fixed, available)
        if size is None:
            break
    best = fitting()
    largest = best[-1].batch_size if best else None
    above = ceiling()
    # `best` and the refused size are neighbours: nothing is left between them.
    exact = above is not None and above - (largest or 0) == quantum
    return Largest(largest, quantum, exact, (*known, *made))


def _next(
    fitting: list[Trial],
    ceiling: int | None,
    trials: dict[int, Trial],
    quantum: int,
    fixed: int,
    available: int,
) -> int | None:
    """Returns the batch to try next; None if the answer is there."""
    low = fitting[-1].batch_size if fitting else 0
    if ceiling is not None and ceiling - low <= quantum:
        return None
    if not fitting:
        refused = trials[ceiling]
        x0, y0, x1, y1 = 0, fixed, refused.batch_size, refused.needed
    elif len(fitting) == 1:
        x0, y0, x1, y1 = 0, fixed, low, fitting[0].needed
    else:
        x0, y0 = fitting[-2].batch_size, fitting[-2].needed
        x1, y1 = low, fitting[-1].needed
    slope = (y1 - y0) / (x1 - x0)
    guess = x1 + (available - y1) / slope if slope > 0 else 2 * x1
    # A line through two close points leaps: more than four times as much is never tried at once.
    guess = int(min(guess, 4 * low if low else guess)) // quantum * quantum
    # Between what fits and what does not; nearest to the guess.
    guess = max(guess, low + quantum)
    return guess if ceiling is None else min(guess, ceiling - quantum)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A rematerialization policy at the config's batch.

    Attributes:
      hardware_flops: of a step on all devices.
      trial: None if it was not compiled, since a cheaper one fits.
    """

    name: str
    hardware_flops: float
    trial: Trial | None


def cheapest_policy(
    flops: dict[str, float], attempt: Callable[[str], Trial], known: dict[str, Trial]
) -> list[Policy]:
    """Returns the policies in the order of their FLOPs, compiled up to the first that fits.

    Args:
      known: trials made before.
    """
    policies, found = [], False
    # The first that fits is the cheapest: the others need no compile of minutes.
    for name in sorted(flops, key=lambda name: flops[name]):
        trial = known.get(name)
        if trial is None and not found:
            trial = attempt(name)
        found = found or (trial is not None and trial.fits)
        policies.append(Policy(name, flops[name], trial))
    return policies


ROWS = 8  # a TPU's vector unit has 8 rows: batches of a device in multiples of it waste none
NO_REMAT = "none"
# Policies whose price is FLOPs computed again. Offloading pays in transfers to the host instead.
COMPARABLE = tuple(name for name in REMAT_POLICIES if name != "offload")

Announce = Callable[[str], None]


def with_options(
    config: ConfigDict, *, batch_size: int | None = None, remat: str | None = None
) -> ConfigDict:
    """A copy of `config` with another batch or policy."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if batch_size is not None:
            config.batch_size = batch_size
        if remat is not None:
            for section in sections(config):
                section.remat = remat
    return config


def sections(config: ConfigDict) -> list[ConfigDict]:
    """The sections of the objective that say how it is computed."""
    parts = config.objective.get("parts")
    return [config.objective] if parts is None else list(parts.values())


def remat_of(config: ConfigDict) -> str:
    """Returns the policy of the config; the policies of several parts are joined."""
    return "+".join(dict.fromkeys(s.get("remat") or NO_REMAT for s in sections(config)))


def quantum_of(setup: Setup) -> int:
    """The step between batch sizes: whole rows of each device, or one example if it has fewer."""
    share = batch_shards(setup.mesh) * setup.config.microbatches
    rows = ROWS if setup.config.batch_size >= ROWS * share else 1
    return share * rows


class Options:
    """Tries other batches and policies of the config of a plan.

    Args:
      plan: as the config says.
      epoch_examples: see `abstract_setup`.
      announce: is told what is about to be compiled.
    """

    def __init__(self, plan: Plan, epoch_examples: int | None, announce: Announce):
        self._plan, self._config = plan, plan.setup.config
        self._epoch_examples, self._announce = epoch_examples, announce

    def policies(self) -> list[Policy]:
        """Compiles the remat policies from the fewest FLOPs on, up to the first that fits."""
        own = remat_of(self._config)
        flops = {own: self._plan.hardware.total}
        for name in (NO_REMAT, *COMPARABLE):
            # FLOPs come from the jaxpr, in seconds; only memory needs a compile, in minutes.
            if name not in flops:
                flops[name] = step_flops(self._setup(with_options(self._config, remat=name))).total
        trial = Trial(self._config.batch_size, bool(self._plan.fits), self._plan.needed)
        return cheapest_policy(flops, lambda name: self._try(remat=name), {own: trial})

    def largest(self, policies: list[Policy]) -> tuple[str, Largest]:
        """Finds the largest batch with the cheapest policy that fits, else with the leanest.

        Returns:
          The name of the policy, and the result of the search.
        """
        tried = [policy for policy in policies if policy.trial is not None]
        # If none fits, a smaller batch is sought with the policy that keeps least.
        chosen = next((policy for policy in tried if policy.trial.fits), tried[-1])
        found = largest_batch(
            lambda size: self._try(batch_size=size, remat=chosen.name),
            start=self._config.batch_size,
            quantum=quantum_of(self._plan.setup),
            fixed=self._plan.state.device,
            available=self._plan.available,
            known=[chosen.trial],
        )
        return chosen.name, found

    def _setup(self, config: ConfigDict) -> Setup:
        return make_setup_for(config, self._plan.target, self._epoch_examples)

    def _try(self, *, batch_size: int | None = None, remat: str) -> Trial:
        setup = self._setup(with_options(self._config, batch_size=batch_size, remat=remat))
        self._announce(f"batch {setup.config.batch_size:,}, remat {remat}")
        memory = compile_setup(setup)
        # Waiting batches are no part of the program, and grow with the batch.
        waiting = self._plan.waiting * setup.config.batch_size // self._config.batch_size
        if isinstance(memory, OutOfMemory):
            return Trial(setup.config.batch_size, False, memory.needed + waiting)
        needed = memory.bytes + waiting
        return Trial(setup.config.batch_size, needed <= self._plan.available, needed)


def advice(plan: Plan) -> list[str]:
    """Returns the ways to make a step fit that does not, the cheapest first."""
    config, mesh, lines = plan.setup.config, plan.setup.mesh, []
    state, available = plan.state.device, plan.available
    spread = plan.state.total / mesh.size
    # Below a tenth it would be advice for nothing: most of the state is spread already.
    if mesh.shape["fsdp"] < mesh.size and spread < 0.9 * state:
        lines.append(
            f"shard the state: --config.mesh.replica=1 --config.mesh.fsdp=-1 leaves about "
            f"{spread / 2**30:.2f} GiB of its {state / 2**30:.2f} on a device"
        )
    if spread > available:
        chips = math.ceil(plan.state.total / available)
        lines.append(f"take more devices: the state alone needs at least {chips}")
        return lines
    if plan.memory is None:  # nothing was compiled: it is the state that does not fit
        return lines
    own = remat_of(config)
    order = [NO_REMAT, *sorted(COMPARABLE, key=lambda name: name == "full")]
    # Policies keep less and less in this order.
    after = order[order.index(own) + 1 :] if own in order else []
    if after:
        lines.append(f"compute more again: --config.objective.remat={' or '.join(after)}")
    part = config.batch_size // batch_shards(mesh) // config.microbatches
    if part > 1:
        # The fewest parts that divide the examples of a device: parts cost time.
        times = next(n for n in range(2, part + 1) if part % n == 0)
        lines.append(
            f"compute the batch in {times} times as many parts, which changes no loss: "
            f"--config.microbatches={config.microbatches * times}"
        )
    # Memory is nearly affine in the batch: what is above the state shrinks with it.
    share = (available - state) / (plan.needed - state) if plan.needed > state else 0
    if 0 < share < 1:
        quantum = quantum_of(plan.setup)
        size = max(quantum, int(config.batch_size * share) // quantum * quantum)
        lines.append(
            f"make the batch smaller: about {size:,} (--config.batch_size={size}); --search finds "
            "the largest"
        )
    return lines
