"""launch/env: every flag is one that the installed compilers know, and says where it comes from."""

import os
import subprocess
import sys

import pytest

from .conftest import LAUNCH

FILES = sorted((LAUNCH / "env").glob("*.sh"))
GPU = [file for file in FILES if file.stem.startswith("gpu")]
TPU = [file for file in FILES if file.stem.startswith("tpu")]
NAMES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_PLATFORMS")


def sourced(file, **environment):
    """The variables that a file leaves in an environment that had `environment`."""
    done = subprocess.run(
        [
            "bash",
            "-uc",
            'source "$1"; env -0; compgen -v | grep -xE "flags|xla_flags" >&2',
            "x",
            file,
        ],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], **environment},
    )
    assert done.stderr == "", "no variable of its own stays behind"
    found = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    return {name: found[name] for name in NAMES if name in found}


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_there_is_one_for_every_accelerator():
    names = {"cpu", "gpu_hopper", "gpu_ampere", "tpu_v4", "tpu_v5e", "tpu_v5p", "tpu_v6e"}
    assert {file.stem for file in FILES} == names


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_flags_have_comments_and_add_to_those_of_the_user(file):
    above = ""
    for line in file.read_text().splitlines():
        setting = line.strip().startswith(("--", "export "))
        if setting and not line.startswith(("export XLA_FLAGS", "export LIBTPU_INIT_ARGS")):
            assert above.startswith(("#", "--")), f"{file}: no comment above {line}"
        above = line.strip()
    assert "https://" in file.read_text() and "measured" in file.read_text()
    mine = {"XLA_FLAGS": "--mine=1", "LIBTPU_INIT_ARGS": "--mine=2"}
    mine["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.5"
    for name, value in sourced(file, **mine).items():
        assert value.startswith(mine.get(name, ""))


def together(files, name):
    """All flags of some files, each once."""
    return " ".join(dict.fromkeys(" ".join(sourced(file)[name] for file in files).split()))


def test_jaxlib_takes_the_flags_for_gpus():
    """It ends the process on a flag that it does not know, whatever the backend is."""
    code = "import jax; print(jax.devices())"
    flags = together(GPU, "XLA_FLAGS")
    done = python(code, JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    assert done.returncode == 0 and "CpuDevice" in done.stdout, done.stderr
    wrong = python(code, JAX_PLATFORMS="cpu", XLA_FLAGS=flags + " --xla_gpu_no_such_flag=1")
    assert wrong.returncode != 0 and "xla_gpu_no_such_flag" in wrong.stderr


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
devices = topologies.get_topology_desc(platform="tpu", topology_name="TOPOLOGY").devices
mesh = jax.sharding.Mesh(devices, ("x",))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
array = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16, sharding=split)
print(jax.jit(lambda a: (a @ a.T).sum()).lower(array).compile() is not None)
"""


def compile_for(topology, flags):
    pytest.importorskip("libtpu")
    return python(
        COMPILE.replace("TOPOLOGY", topology),
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        LIBTPU_INIT_ARGS=flags,
    )


def test_libtpu_takes_the_flags_for_tpus():
    flags = together(TPU, "LIBTPU_INIT_ARGS")
    done = compile_for("v5e:2x2", flags)
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stderr
    wrong = compile_for("v5e:2x2", flags + " --xla_tpu_no_such_flag=1")
    assert wrong.returncode != 0 and "xla_tpu_no_such_flag" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("file", TPU, ids=lambda f: f.stem)
def test_each_generation_compiles_with_its_flags(file):
    generation = file.stem.removeprefix("tpu_")
    topology = {"v4": "2x2x1", "v5p": "2x2x1"}.get(generation, "2x2")
    done = compile_for(f"{generation}:{topology}", sourced(file)["LIBTPU_INIT_ARGS"])
    assert done.returncode == 0, done.stderr
