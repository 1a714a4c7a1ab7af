"""A plan of a tiny config: memory, advice, and what the command says."""

import dataclasses
import io
import json
import math
from pathlib import Path

import jax
import pytest
from rich.console import Console

from vlp_jax import config as config_lib
from vlp_jax.commands import plan as command
from vlp_jax.errors import UserError
from vlp_jax.planning import plan as plan_lib
from vlp_jax.planning import search as options
from vlp_jax.planning import target
from vlp_jax.planning.compile import OutOfMemory, Program, parse_out_of_memory
from vlp_jax.planning.kernels import PallasCalls
from vlp_jax.planning.memory import activation_bytes, state_bytes
from vlp_jax.planning.report import Findings, as_json, as_table, notes, reason

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = str(ROOT / "configs" / "debug_cpu.py")
GIB = 2**30


def setup_of(*overrides, topology="cpu:8", file=CONFIG):
    config = config_lib.load(file)
    config_lib.override(config, list(overrides))
    where = target.make_target(topology)
    return plan_lib.make_setup_for(config, where, None), where


@pytest.fixture(scope="module")
def plan():
    """Of 64 examples on each of eight devices that hold all of the state."""
    return plan_lib.make_plan(*setup_of("batch_size=512", "objective.remat=none"))


def run(capsys, *arguments, config=CONFIG):
    status = command.main(["--config", config, *arguments])
    return status, capsys.readouterr()


@pytest.mark.parametrize(
    "config", ["clip_l14.py", "mae_h14.py", "siglip_so400m14.py", "siglip_g.py"]
)
def test_sharded_state_is_within_5_percent_of_an_even_part(config):
    file = str(ROOT / "configs" / config)
    overrides = ["batch_size=64", "mesh.fsdp=8", "duration.epochs=None", "duration.examples=None"]
    overrides += ["duration.steps=100", "optimizer.warmup.epochs=None", "optimizer.warmup.steps=1"]
    config = config_lib.load(file)
    config_lib.override(config, [o for o in overrides])
    setup = plan_lib.make_setup_for(config, target.make_target("cpu:8"), None)
    state = state_bytes(setup.abstract, setup.mesh)
    assert state.device == pytest.approx(state.total / 8, rel=0.05)
    held = sum(
        leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(setup.abstract)
    )
    assert state.total == held


def test_activations_follow_the_examples_of_a_device_and_the_policy():
    def kept(*overrides):
        return activation_bytes(setup_of(*overrides)[0])

    base = kept("batch_size=64", "objective.remat=none")
    assert kept("batch_size=128", "objective.remat=none") == pytest.approx(2 * base, rel=0.01)
    in_parts = kept("batch_size=128", "objective.remat=none", "microbatches=2")
    assert in_parts == pytest.approx(base, rel=0.01)
    setup, _ = setup_of("batch_size=64", "objective.remat=full")
    image, text = setup.objective.model.image, setup.objective.model.text
    inputs = image.transformer.depth * image.tokens * image.width
    inputs += text.transformer.depth * text.context_length * text.width
    # Full rematerialization keeps the inputs of the layers, of 8 examples in float32, and the rest
    # outside of the layers.
    assert 8 * 4 * inputs < activation_bytes(setup) < base / 2


@pytest.mark.parametrize(
    "message, needed, available, preliminary",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (49.88G) exceeds available HBM (15.75G).",
            49.88 * GIB,
            15.75 * GIB,
            True,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 512.50M of 30.75G hbm. Exceeded hbm capacity by 33.05G.\n\nTotal",
            512.5 * 2**20,
            30.75 * GIB,
            False,
        ),
    ],
)
def test_refusals_of_the_compiler_are_understood(message, needed, available, preliminary):
    refused = parse_out_of_memory(message)
    assert refused.needed == pytest.approx(needed) and refused.preliminary == preliminary
    assert refused.available == pytest.approx(available)


def test_other_words_are_no_refusal_for_memory():
    assert parse_out_of_memory("INTERNAL: something else") is None
    with pytest.raises(ValueError, match="unknown words"):
        parse_out_of_memory("RESOURCE_EXHAUSTED: the machine is on fire")


def on_tpu(plan, memory):
    """`plan` as if a compiler had said `memory` for as many v5e."""
    chip = target.TPUS["v5e"]
    where = dataclasses.replace(plan.target, chip=chip, compiles=True, name="v5e:2x4")
    return dataclasses.replace(plan, target=where, memory=memory)


def test_what_does_not_fit_says_why_and_what_to_do(plan):
    plan = on_tpu(plan, OutOfMemory(20 * GIB, int(15.75 * GIB), False))
    assert plan.fits is False and plan.needed >= 20 * GIB
    said = reason(plan)
    assert "20.00 GiB" in said and "15.75 GiB" in said and "of state" in said
    lines = "\n".join(options.advice(plan))
    for way in ("mesh.fsdp=-1", "objective.remat=dots", "microbatches=2", "batch_size=384"):
        assert way in lines, way
    # Every way that is offered is one that the config takes.
    for line in options.advice(plan):
        keys = [word.strip(":;()") for word in line.split() if "--config." in word]
        config = config_lib.load(CONFIG)
        config_lib.override(config, [k.strip("(").removeprefix("--config.") for k in keys])


def test_a_state_that_is_too_large_for_all_devices_needs_more_of_them(plan):
    plan = on_tpu(plan, OutOfMemory(20 * GIB, 1000, False))
    chips = math.ceil(plan.state.total / 1000)
    shard, more = options.advice(plan)
    assert "mesh.fsdp=-1" in shard and more.endswith(f"needs at least {chips}")


def test_a_state_that_is_too_large_for_a_device_is_to_be_sharded_where_nothing_compiles(plan):
    chip = dataclasses.replace(target.TPUS["v5e"], hbm_bytes=plan.state.device - 1)
    where = dataclasses.replace(plan.target, chip=chip, compiles=False, name="gpu:x8")
    plan = dataclasses.replace(plan, target=where, memory=None)
    assert plan.fits is False and plan.needed is None
    [line] = options.advice(plan)
    assert "mesh.fsdp=-1" in line


def test_batches_that_wait_count_too(plan):
    batch = 512 * (64 * 64 * 3 + 4 * plan.setup.batch_spec["text"].shape[1]) // 8
    assert plan.waiting == 2 * batch
    program = Program(arguments=GIB, outputs=0, temporaries=14 * GIB, code=0, text="")
    room = int(15.75 * GIB) - 15 * GIB
    assert on_tpu(plan, program).fits is True
    assert on_tpu(dataclasses.replace(plan, waiting=room + 1), program).fits is False


def test_the_command_plans_for_cpu_and_gpu_without_a_compiler(capsys, tmp_path):
    file = tmp_path / "plan.json"
    more = ("--config.batch_size=128", "--json", str(file))
    status, said = run(capsys, "--topology", "cpu:8", *more)
    assert status == 0 and "not known whether it fits" in said.out
    found = json.loads(file.read_text())
    asked = "fits hbm_bytes params_bytes optimizer_bytes temp_bytes model_flops collective_bytes"
    assert {*asked.split(), "step_seconds", "bound_by"} <= set(found)
    assert found["fits"] is None and found["temp_bytes"] is None and found["step_seconds"] is None
    assert found["params_bytes"] == found["params_bytes_all_devices"] > 0
    assert found["batch_size"] == 128 and found["mesh"] == {"replica": 8, "fsdp": 1, "tensor": 1}

    gpu = ("--topology", "gpu:h100x8", "--mfu", "0.5", "--price-per-chip-hour", "3")
    status, said = run(capsys, *gpu, "--config.batch_size=128", "--json", "-")
    found = json.loads(said.out)
    assert status == 0 and found["bound_by"] == "compute"
    assert found["step_seconds"] == found["roofline_seconds"]["compute"]
    peak = 8 * 494.5e12  # in float32, as the config has it
    assert found["step_seconds"] == pytest.approx(found["hardware_flops"] / peak, rel=0.05)
    at_half = found["costs"]["at 50% MFU"]
    assert at_half["mfu"] == pytest.approx(0.5)
    assert at_half["price"] == pytest.approx(3 * at_half["chip_hours"])
    assert at_half["days"] * 24 * 8 == pytest.approx(at_half["chip_hours"])
    assert at_half["chip_hours"] == pytest.approx(
        found["steps"] * found["model_flops"] / (0.5 * peak) / 3600 * 8
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--topology", "v5e:3x3"), "does not exist; those of v5e: v5e:1x1"),
        (("--topology", "v9:2x2"), "not known; it is KIND:SHAPE"),
        (("--topology", "gpu:voodoox8"), "this GPU is not known (known: gpu:a100xN"),
        (("--topology", "cpu:0"), "1 to 4096 devices"),
        (("--topology", "cpu:8", "--slices", "2"), "--slices is for TPUs"),
        (("--topology", "cpu:8", "--search"), "no compiler here for cpu:8"),
        (("--topology", "cpu:8", "--mfu", "1.5"), "--mfu is a share"),
        (("--topology", "cpu:8", "--price-per-chip-hour", "-1"), "not negative"),
        (("--topology", "cpu:8", "--config.mesh.fsdp=3"), "8 devices"),
        (("--topology", "cpu:8", "--config.batch_size=100"), "not divisible by the 8 devices"),
        (("--topology", "cpu:8", "--config.objective.remat=some"), "unknown remat policy"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(capsys, arguments, words):
    status, said = run(capsys, *arguments)
    assert status == 2 and words in said.err
    assert said.err.strip().splitlines()[-1].startswith("error: ")


def test_epochs_need_to_know_the_examples(capsys):
    mae = str(ROOT / "configs" / "mae_b16.py")
    status, said = run(capsys, "--topology", "cpu:8", config=mae)
    assert status == 2 and "epoch" in said.err and "--epoch-examples" in said.err


def test_a_search_is_told_in_table_and_json(plan):
    plan = on_tpu(plan, Program(GIB, 0, 8 * GIB, 0, ""))

    class Formula(options.Options):
        def _try(self, *, batch_size=None, remat):
            size = batch_size or 512
            needed = GIB + size * GIB // 64
            return options.Trial(size, needed <= plan.available, needed)

    found = Formula(plan, None, print)
    policies = found.policies()
    assert [p.name for p in policies] == ["none", "dots", "names", "names_lean", "full"]
    chosen, largest = found.largest(policies)
    assert chosen == "none" and largest.exact and largest.batch_size == 14 * 64
    console = Console(width=100, file=io.StringIO())
    console.print(as_table(Findings(plan, search=(policies, chosen, largest))))
    said = "the largest batch with remat none, in steps of 64: 896 (112 a device)"
    assert said in console.file.getvalue()
    result = as_json(Findings(plan, search=(policies, chosen, largest)), {})
    assert result["search"]["largest"]["batch_size"] == largest.batch_size
    json.dumps(result)


def test_an_mfu_above_the_roofline_is_told_of(plan):
    program = Program(GIB, 0, GIB, 0, "")
    compiled = plan_lib.Compiled(
        100 * 819e9, [], 0.0, PallasCalls(), 0, ()
    )  # 100 s of memory traffic
    bound = dataclasses.replace(on_tpu(plan, program), compiled=compiled)
    assert bound.roofline.bound_by == "memory" and bound.roofline.step_seconds == 100
    assert any("cannot be reached" in note for note in notes(Findings(bound, mfu=0.4)))
    assert not any("cannot" in note for note in notes(Findings(bound, mfu=1e-9)))


def test_a_policy_that_does_not_exist_is_not_planned_for():
    with pytest.raises(UserError, match="remat"):
        setup_of("objective.remat=magic")
