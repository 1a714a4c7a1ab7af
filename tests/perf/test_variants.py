"""Variants of a step: what they change, how they are told apart, and who gathers embeddings."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from tools.perf import compile_variants
from tools.perf.compile_variants import SETS, Measured, Variant
from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.errors import UserError
from vlp_jax.parallel.mesh import make_mesh
from vlp_jax.planning import hlo, target, traffic
from vlp_jax.planning.kernels import PallasCalls
from vlp_jax.planning.plan import Compiled
from vlp_jax.planning.target import TPUS
from vlp_jax.training.abstract_setup import abstract_setup

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "debug_cpu.py")
GIB = 2**30


def measured(name="base", per_chip=64, cycles=64e6, pallas_runs=0.0):
    compiled = Compiled(128e9, [], cycles, PallasCalls(runs=pallas_runs), 0, ())
    setup = SimpleNamespace(mesh=SimpleNamespace(size=1))
    flops = SimpleNamespace(total=1e12)
    plan = SimpleNamespace(setup=setup, compiled=compiled, needed=8 * GIB, fits=True)
    plan.preliminary, plan.hardware = False, flops
    return Measured(Variant(name), per_chip, plan, 1.0)


def test_a_variant_is_a_name_and_what_it_replaces():
    one = compile_variants.parse_variant("a:config.mesh.fsdp=2,optimizer.no_decay=('x','y'),seed=1")
    assert one == Variant("a", ("mesh.fsdp=2", "optimizer.no_decay=('x','y')", "seed=1"))
    assert compile_variants.parse_variant("plain") == Variant("plain")
    for text in (":seed=1", "a:seed", "a:"):
        with pytest.raises(UserError, match="NAME:KEY=VALUE"):
            compile_variants.parse_variant(text)


def test_a_mistake_in_a_variant_is_told_with_its_name_before_anything_is_compiled():
    where = target.make_target("cpu:8")
    config = config_lib.load(CONFIG)
    for override in ("objective.remat=half", "objective.atention=xla", "mesh.fsdp=3"):
        with pytest.raises(UserError, match="variant odd: "):
            compile_variants.make_setups(config, where, [Variant("odd", (override,))], [8], None)


def setups(*chosen, per_chip=(6,)):
    config = smoke_lib.smoke(config_lib.load(CONFIG))
    where = target.make_target("cpu:8")
    return compile_variants.make_setups(config, where, chosen, per_chip, None), where


def test_each_variant_gets_the_examples_of_a_device():
    found, _ = setups(Variant("a"), Variant("b", ("seed=1",)), per_chip=(6, 12))
    told = [(v.name, size, setup.config.batch_size) for v, size, setup in found]
    assert told == [("a", 6, 48), ("b", 6, 48), ("a", 12, 96), ("b", 12, 96)]


@pytest.fixture(scope="module")
def losses():
    """The plain and the blocked loss on eight CPU devices, read as if these were chips."""
    # Without a backward pass through the towers there is less to compile.
    cheap = ("optimizer.frozen=('(image|text)/.*',)",)
    forms = [Variant(f, (f"objective.loss_form={f}", *cheap)) for f in ("plain", "blocked")]
    found, where = setups(*forms)
    where = dataclasses.replace(where, chip=TPUS["v5e"], compiles=True)
    return {one.name: compile_variants.measure(one, size, s, where) for one, size, s in found}


def test_the_plain_loss_gathers_embeddings_and_the_ring_does_not(losses):
    assert losses["plain"].gathers and "embeddings" not in losses["plain"].gathers[0]
    assert losses["blocked"].gathers == []
    kinds = [one.kind for one in losses["blocked"].plan.compiled.collectives]
    assert "collective-permute" in kinds
    table = compile_variants.table(list(losses.values()), losses["plain"])
    assert "- blocked at 6 a chip: no all-gather of embeddings" in table
    refused = compile_variants.refused_gathers(["plain", "blocked"], list(losses.values()))
    assert len(refused) == 1 and refused[0].startswith("plain at 6 a chip: all-")


def test_what_was_measured_is_that_of_the_program(losses, monkeypatch):
    plan = losses["blocked"].plan
    assert plan.fits and plan.compiled.hbm_traffic > 0 and plan.hardware.total > 0
    assert plan.compiled.cycles == 0  # XLA estimates none for a CPU
    # The devices are no TPU's: there is no network to tell of.
    monkeypatch.setattr(compile_variants.report, "as_json", lambda *plan: {"fits": True})
    told = json.loads(json.dumps(compile_variants.as_json(losses["blocked"], losses["plain"])))
    assert told["fits"] and told["gathers"] == [] and told["variant"]["name"] == "blocked"
    assert 0 < told["traffic_of_base"] < 2 and told["cycles_of_base"] is None


def test_ratios_are_of_an_example():
    base, larger = measured(), measured("larger", per_chip=128, cycles=160e6)
    assert compile_variants.ratios(larger, base) == (1.25, 0.5)
    cells = dict(zip(compile_variants.HEADS, compile_variants.row(larger, base), strict=True))
    assert cells["k cycles an example"] == "1,250.0" and cells["fits"] == "yes"
    marked = compile_variants.row(measured(pallas_runs=3.0), base)
    assert "64.0+" in marked and "64.0" in compile_variants.row(base, base)


def test_a_refusal_has_its_memory_and_no_ratio():
    refused = measured("big")
    vars(refused.plan).update(compiled=None, needed=20 * GIB, fits=False, preliminary=True)
    made = compile_variants.row(refused, measured())
    cells = dict(zip(compile_variants.HEADS, made, strict=True))
    assert cells["fits"] == "no, first estimate" and cells["needed GiB"] == "20.00"
    assert cells["of base"] == ""
    assert compile_variants.refused_gathers(["big"], [refused]) == [
        "big at 64 a chip: it was not compiled"
    ]


def test_the_lists_have_names_and_a_base(capsys):
    assert compile_variants.main(["--list"]) == 0
    out = capsys.readouterr().out
    for name in SETS:
        assert f"{name}" in out
    for chosen in SETS.values():
        assert len({compile_variants.parse_variant(text).name for text in chosen}) > 1
    arguments, _ = compile_variants.parse(["--set", "remat", "--variant", "x:seed=1"])
    names = [one.name for one in compile_variants.chosen_variants(arguments)]
    assert names == [*(text.partition(":")[0] for text in SETS["remat"]), "x"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "remat"], "--topology is missing"),
        (["--topology", "cpu:8", "--set", "remat"], "no compiler here"),
        (["--topology", "v5e:2x2", "--set", "remat", "--batch-per-chip", "0"], "at least 1"),
        (["--topology", "v5e:2x2", "--set", "remat", "--json", "no/dir/x"], "does not exist"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_do(capsys, arguments, words):
    assert compile_variants.main(["--config", CONFIG, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_gather_that_may_be_of_parameters_is_told_as_such():
    config = config_lib.load(CONFIG)
    setup = abstract_setup(config, make_mesh({"replica": 8}))
    width = config.objective.embed_dim
    rows = config.batch_size // 8
    array = hlo.Array("f32", (2 * rows, width), 0, (1, 0), ())
    gather = traffic.Collective("all-gather", "x", ("replica",), 1, 1.0, (), (array,))

    def told(setup):
        plan = SimpleNamespace(setup=setup, compiled=SimpleNamespace(collectives=[gather]))
        (line,) = Measured(Variant("x"), rows, plan, 1.0).gathers
        return line

    assert told(setup) == f"all-gather f32[{2 * rows},{width}] x 1"
    leaf = jax.ShapeDtypeStruct((2 * rows, width), "float32")
    setup = dataclasses.replace(setup, abstract=(setup.abstract, leaf))
    assert told(setup).endswith("(or of parameters: another --batch-per-chip tells)")


def test_variants_that_are_not_there_are_named():
    for arguments, words in (
        ([], "nothing to compile"),
        (["--variant", "a:seed=1", "--variant", "a:seed=2"], "same name"),
        (["--variant", "a:seed=1", "--no-embedding-gathers", "b"], "no variant 'b'"),
    ):
        with pytest.raises(UserError, match=words):
            compile_variants.chosen_variants(compile_variants.parse(arguments)[0])
