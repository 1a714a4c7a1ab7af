"""The largest batch that fits, and the cheapest rematerialization, with few compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

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
      flops: of a step, by policy.
      attempt: compiles the step with a policy.
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
