"""What the TPU compiler gives now, against what its text in this folder was read to mean."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import rules
from vlp_jax.parallel.topologies import tpu_devices
from vlp_jax.planning import hlo, kernels, loops, traffic
from vlp_jax.planning.kernels import pallas_calls
from vlp_jax.planning.target import TPUS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]
ROOT = Path(__file__).resolve().parent.parent.parent
LAYERS, WIDTH, BATCH = 3, 1024, 2048


def sharded_step(mesh):
    """A gradient step of a few layers whose weights are sharded, and its abstract arguments."""
    spread = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=spread)
    batch = mesh_lib.batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.bfloat16, sharding=batch)

    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ w.astype(x.dtype)), None

        return jnp.square(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32)).mean()

    def step(weights, x):
        return weights - jax.grad(loss)(weights, x)

    return jax.jit(step, donate_argnums=0, out_shardings=spread), (weights, x)


def test_a_program_of_this_compiler_reads_as_the_one_that_is_kept(monkeypatch):
    monkeypatch.setattr(jax.config, "jax_disable_most_optimizations", False, raising=False)
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = mesh_lib.make_mesh({"replica": 2, "fsdp": 4}, tpu_devices("v5e:2x4"))
    step, arguments = sharded_step(mesh)
    with rules.use_mesh(mesh):
        module = hlo.parse(step.lower(*arguments).compile().as_text())
    runs = loops.count_runs(module)
    assert not runs.unknown
    found = traffic.by_kind_and_axis(traffic.collectives(module, runs, dict(mesh.shape)))
    weights = LAYERS * WIDTH * WIDTH * 2  # bfloat16
    assert found["all-gather"]["fsdp"] == 2 * weights * 3 / 4
    scattered = found["reduce-scatter"]["fsdp"] + found.get("all-reduce", {}).get("fsdp", 0) / 2
    assert scattered == weights * 3 / 4
    assert found["all-reduce"]["replica"] == weights / 4
    assert kernels.hbm_bytes(module, runs) > 0 and kernels.estimated_cycles(module, runs) > 0


def pallas_product(x, w):
    """x @ w in a Pallas kernel, whose cost is said to be another: that of pallas_v5e.hlo."""

    def kernel(x, w, out):
        product = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)
        out[...] = product.astype(out.dtype)

    rows = pl.BlockSpec((128, 256), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[rows, pl.BlockSpec((256, 256), lambda i: (0, 0))],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct((512, 256), x.dtype),
        cost_estimate=pl.CostEstimate(flops=10**9, transcendentals=7, bytes_accessed=12_345_678),
    )(x, w)


def test_a_pallas_kernel_in_a_scan_is_added_once_a_round():
    mesh = Mesh(np.array(tpu_devices("v5e:2x2")[:1]), ("one",))
    whole = NamedSharding(mesh, PartitionSpec())

    def rounds(x, w):
        return jax.lax.scan(lambda x, _: (pallas_product(x, w) * 0.5, None), x, length=5)[0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((512, 256), (256, 256))]
    jitted = jax.jit(rounds, in_shardings=(whole, whole), out_shardings=whole)
    module = hlo.parse(jitted.lower(*shapes).compile().as_text())
    runs = loops.count_runs(module)
    found = pallas_calls(module, runs, TPUS["v5e"], "bfloat16")
    assert (found.runs, found.flops, found.bytes, found.uncosted) == (5, 5e9, 5 * 12_345_678, ())
    assert found.seconds == pytest.approx(5 * 12_345_678 / 819e9)
    assert kernels.estimated_cycles(module, runs) > 0  # of the compiler's own kernels


def plan(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tools.plan", "--config", "configs/debug_cpu.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_compiles_the_step_of_a_config():
    options = ("--topology", "v5e:2x2", "--config.mesh.fsdp=4", "--config.batch_size=512")
    status, out, err = plan(*options, "--json", "-")
    assert status == 0, err
    found = json.loads(out)
    assert found["fits"] is True and found["bound_by"] in ("compute", "memory", "network")
    assert found["hbm_bytes"] < found["hbm_available_bytes"] == int(15.75 * 2**30)
    assert found["params_bytes"] == pytest.approx(found["params_bytes_all_devices"] / 4, rel=0.05)
    assert "fsdp" in found["collective_bytes"]["all-gather"]
    assert found["step_seconds"] == max(v for v in found["roofline_seconds"].values() if v)


def test_the_command_says_what_to_do_where_it_does_not_fit():
    big = ("--topology", "v5e:1x1", "--config.batch_size=65536", "--config.objective.remat=none")
    status, out, err = plan(*big)
    assert status == 1, err
    assert "does not fit: the step takes" in out and "of a device's 15.75 GiB" in out
    assert "--config.objective.remat=dots or full" in out and "--config.microbatches=2" in out
