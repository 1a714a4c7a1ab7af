"""What Pallas kernels add to the cycles of a compiled program."""

import re
from pathlib import Path

import pytest

from vlp_jax.planning import hlo, kernels, loops
from vlp_jax.planning.kernels import pallas_calls
from vlp_jax.planning.target import TPUS

# A Pallas product of [512, 256] and [256, 256] in bfloat16, in a scan of five rounds, for v5e; its
# cost was given as below. test_tpu.py compiles it anew.
TEXT = (Path(__file__).parent / "pallas_v5e.hlo").read_text()
ROUNDS, FLOPS, BYTES = 5, 10**9, 12_345_678
V5E = TPUS["v5e"]


def found_in(text):
    module = hlo.parse(text)
    return pallas_calls(module, loops.count_runs(module), V5E, "bfloat16")


def test_a_call_takes_the_time_of_its_cost_estimate_in_each_round():
    found = found_in(TEXT)
    assert (found.runs, found.flops, found.bytes) == (ROUNDS, ROUNDS * FLOPS, ROUNDS * BYTES)
    assert not found.uncosted
    seconds = BYTES / 819e9  # v5e: 819 GB/s; 1e9 FLOPs at 197 TFLOP/s take a third of that
    assert found.seconds == pytest.approx(ROUNDS * seconds)
    assert found.cycles(V5E.clock) == pytest.approx(ROUNDS * seconds * 197e12 / (4 * 128 * 128 * 2))
    assert "5 runs of Pallas kernels" in found.notes(V5E.clock)[0]


def test_the_longer_of_products_and_bytes_counts():
    found = found_in(TEXT.replace('"bytes_accessed":"12345678"', '"bytes_accessed":"12"'))
    assert found.seconds == pytest.approx(ROUNDS * FLOPS / 197e12)


def test_without_a_cost_estimate_operands_and_results_are_moved():
    found = found_in(re.sub(r'"cost_estimate":\{[^}]*\},', "", TEXT))
    moved = (512 * 256 + 256 * 256 + 512 * 256) * 2
    assert (found.runs, found.flops, found.bytes) == (ROUNDS, 0, ROUNDS * moved)
    assert found.seconds == pytest.approx(ROUNDS * moved / 819e9)
    assert len(found.uncosted) == 1 and "no cost estimate" in found.notes(V5E.clock)[1]


def test_what_the_compiler_prices_itself_is_not_added_and_other_calls_are_none():
    own = TEXT.replace('"cost_estimate":', '"estimated_cycles":"7","cost_estimate":')
    assert found_in(own).runs == 0
    module = hlo.parse(own)
    priced, plain = (
        kernels.estimated_cycles(hlo.parse(t), loops.count_runs(module)) for t in (own, TEXT)
    )
    assert priced - plain == 7 * ROUNDS
    assert found_in(TEXT.replace("tpu_custom_call", "Sharding")).notes(V5E.clock) == ()


def test_without_a_clock_there_are_no_cycles_and_that_is_said():
    found = found_in(TEXT)
    assert found.cycles(None) == 0 and "not in the cycles" in found.notes(None)[0]
