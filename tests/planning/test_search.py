"""The search for the largest batch, with a compiler that is a formula."""

import pytest

from vlp_jax.planning.search import MOST_COMPILES, Trial, cheapest_policy, largest_batch

AVAILABLE, FIXED = 16_000, 2_000


class Compiler:
    """Memory `fixed + slope * batch`; a refusal overstates it, as the TPU compiler's does."""

    def __init__(self, slope, fixed=FIXED, bend=0.0, overstated=3.0):
        self.sizes, self.slope, self.fixed = [], slope, fixed
        self.bend, self.overstated = bend, overstated

    def needed(self, size):
        return int(self.fixed + self.slope * size + self.bend * size**2)

    def __call__(self, size):
        self.sizes.append(size)
        needed = self.needed(size)
        fits = needed <= AVAILABLE
        return Trial(size, fits, needed if fits else int(needed * self.overstated))

    def largest(self, quantum):
        return max(s for s in range(0, 10**6, quantum) if self.needed(s) <= AVAILABLE)


def search(compiler, start, quantum=8, **more):
    return largest_batch(
        compiler, start=start, quantum=quantum, fixed=FIXED, available=AVAILABLE, **more
    )


@pytest.mark.parametrize("slope", [0.9, 7.3, 13.9, 61.0])
@pytest.mark.parametrize("start", [8, 256, 4096])
def test_it_finds_the_largest_and_is_sure_of_it(slope, start):
    compiler = Compiler(slope)
    found = search(compiler, start, most_compiles=12)
    assert found.batch_size == compiler.largest(8) and found.exact
    assert found.batch_size in compiler.sizes and found.batch_size + 8 in compiler.sizes
    assert len(compiler.sizes) == len(set(compiler.sizes)) == len(found.trials)


def test_from_a_batch_that_fits_few_compiles_are_enough():
    compiler = Compiler(slope=100.0, fixed=2_500)
    assert search(compiler, 64).exact and len(compiler.sizes) <= 5


def test_memory_that_is_not_quite_affine_costs_a_few_more():
    compiler = Compiler(slope=50.0, bend=0.05)
    found = search(compiler, 64, most_compiles=12)
    assert found.batch_size == compiler.largest(8) and found.exact


def test_what_is_known_is_not_compiled_again():
    compiler = Compiler(100.0)
    first = compiler(128)
    found = search(compiler, 128, known=[first])
    assert compiler.sizes.count(128) == 1 and found.trials[0] == first
    assert found.batch_size == compiler.largest(8)


def test_nothing_fits():
    compiler = Compiler(1.0, fixed=AVAILABLE + 1)
    found = search(compiler, 512, most_compiles=20)
    assert found.batch_size is None
    assert min(compiler.sizes) == 8


def test_it_stops_with_what_it_has():
    compiler = Compiler(slope=0.001, overstated=100.0)
    found = search(compiler, 8)
    assert len(compiler.sizes) == MOST_COMPILES and not found.exact
    assert found.batch_size == max(s for s in compiler.sizes if compiler.needed(s) <= AVAILABLE)


def test_policies_are_tried_from_the_cheapest_to_the_first_that_fits():
    needs = {"none": 30, "dots": 20, "names": 12, "full": 5}
    flops = {"full": 4.0, "none": 3.0, "dots": 3.1, "names": 3.5}
    asked = []

    def attempt(name):
        asked.append(name)
        return Trial(64, needs[name] <= 16, needs[name])

    known = {"full": Trial(64, True, 5)}
    found = cheapest_policy(flops, attempt, known)
    assert [policy.name for policy in found] == ["none", "dots", "names", "full"]
    assert asked == ["none", "dots", "names"]
    assert [p.trial and p.trial.fits for p in found] == [False, False, True, True]
    assert cheapest_policy(flops, attempt, {"none": Trial(64, True, 9)})[1].trial is None
