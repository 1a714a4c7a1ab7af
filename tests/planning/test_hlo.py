"""Reading compiled programs: instructions, loops, bytes in memory."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from vlp_jax.planning import hlo, kernels, loops

# A gradient step of three layers with sharded weights: see test_tpu.py, which compiles it anew.
TPU_TEXT = (Path(__file__).parent / "fsdp_v5e_2x4.hlo").read_text()


def compiled_text(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    with jax.disable_jit(False):
        return jax.jit(function).lower(*arguments).compile().as_text()


def rounds(text):
    """Trip counts of the loops of a program by the length of what its scans run over."""
    module = hlo.parse(text)
    return sorted(
        loops.trip_count(module, computation, instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions
        if instruction.opcode == "while"
    )


def test_an_instruction_is_taken_apart():
    line = (
        "  ROOT %all-gather.1 = (bf16[1,192,12,64]{1,3,2,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]) "
        "all-gather(%a, %b.2), channel_id=3, replica_groups={{0,1}}, to_apply=%add.1, "
        'backend_config={"x":"y(z)"}'
    )
    one = hlo.parse_instruction(line)
    assert (one.name, one.opcode, one.is_root) == ("all-gather.1", "all-gather", True)
    assert one.operands == ("a", "b.2") and one.called == {"to_apply": ("add.1",)}
    first, second = one.arrays
    assert first.dims == (1, 192, 12, 64) and first.memory == 1 and first.tile == (8, 128)
    assert first.bytes == 192 * 12 * 64 * 2
    assert (second.dims, second.bytes, second.memory) == ((), 4, 0)
    assert one.attribute(r"channel_id=(\d+)") == "3"


def test_tiles_count_with_their_padding():
    def array(text):
        return hlo.parse_instruction(f"  %x = {text} parameter(0)").arrays[0]

    assert array("bf16[8,64]{1,0:T(8,128)(2,1)}").padded_bytes == 8 * 128 * 2
    assert array("bf16[8,64]{0,1:T(8,128)(2,1)}").padded_bytes == 64 * 128 * 2
    assert array("f32[3,5,130]{2,1,0:T(8,128)}").padded_bytes == 3 * 8 * 256 * 4
    assert array("pred[7]{0:T(512)(128)(4,1)}").padded_bytes == 512
    assert array("s4[6]{0}").padded_bytes == 3


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule x\n")
    with pytest.raises(ValueError, match="not an instruction"):
        hlo.parse_instruction("  what is this")


def nested(x):
    def outer(x, _):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=7)[0], None

    return jax.lax.scan(outer, x, length=5)[0]


@pytest.mark.parametrize("said", [True, False])
def test_loops_run_as_often_as_they_say_or_as_their_counters_do(said):
    text = compiled_text(nested, (16, 16))
    assert "known_trip_count" in text
    if not said:
        text = re.sub(r',?"known_trip_count":\{[^}]*\}', "", text)
    assert rounds(text) == [5, 7]
    module = hlo.parse(text)
    runs = loops.count_runs(module)
    assert not runs.unknown
    products = [
        runs.times[name]
        for name, computation in module.computations.items()
        for instruction in computation.instructions
        if instruction.opcode in ("dot", "custom-call") and name in runs.times
    ]
    assert products == [35]


def test_a_loop_that_depends_on_data_is_unknown():
    text = compiled_text(
        lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), (4, 4)
    )
    runs = loops.count_runs(hlo.parse(text))
    assert len(runs.unknown) == 1


def test_a_tpu_program_says_nothing_of_its_loops_and_they_are_counted_all_the_same():
    assert "known_trip_count" not in TPU_TEXT
    assert rounds(TPU_TEXT) == [3, 3]


def test_memory_traffic_is_operands_and_results_of_kernels():
    text = compiled_text(lambda x, y: (x @ y, x), (64, 128), (128, 32))
    module = hlo.parse(text)
    moved = kernels.hbm_bytes(module, loops.count_runs(module))
    product = (64 * 128 + 128 * 32 + 64 * 32) * 4
    handed_on = 2 * 64 * 128 * 4  # x is copied into the result
    assert product <= moved <= product + handed_on


def test_of_an_array_that_a_loop_cuts_slices_from_only_these_are_read():
    def steps(x, weights):
        return jax.lax.scan(lambda x, w: (x + w, None), x, weights)[0]

    def moved(layers):
        module = hlo.parse(compiled_text(steps, (64, 64), (layers, 64, 64)))
        return kernels.hbm_bytes(module, loops.count_runs(module))

    layer = 64 * 64 * 4
    # Each round reads a layer and x and writes x, with a copy at most; never all layers.
    assert 3 * layer <= (moved(40) - moved(20)) / 20 <= 6 * layer


def test_what_stays_near_the_cores_of_a_tpu_is_no_traffic():
    module = hlo.parse(TPU_TEXT)
    runs = loops.count_runs(module)
    moved = kernels.hbm_bytes(module, runs)
    everywhere = hlo.parse(re.sub(r"S\(1\)", "", TPU_TEXT))
    weights = 3 * 256 * 1024 * 4  # of a device; read twice or more, and written
    assert 3 * weights <= moved < 8 * weights
    assert kernels.hbm_bytes(everywhere, loops.count_runs(everywhere)) > 3 * moved


def test_cycles_count_each_round():
    module = hlo.parse(TPU_TEXT)
    once = sum(int(c) for c in re.findall(r'"estimated_cycles":"(\d+)"', TPU_TEXT))
    counted = kernels.estimated_cycles(module, loops.count_runs(module))
    assert 1.5 * once < counted <= 3 * once  # most of them stand in loops of three rounds
