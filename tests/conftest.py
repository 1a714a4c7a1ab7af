"""Eight CPU devices for every test, and compiled programs kept between runs."""

import importlib.metadata
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Eight devices share few cores: on a busy machine one may be so late that XLA, which takes 40 s for
# a hang, would end the process.
# The tests' models are tiny: compiling them takes most of the time, running them none. XLA makes
# kernels with LLVM alone and in one piece then, in half of the time that its emitters on MLIR take.
# It ends the process over a flag that it does not know: later versions are not told.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    + (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        if importlib.metadata.version("jaxlib").startswith("0.10.")
        else ""
    ),
)

import annotations
import jax
import pytest

annotations.check_from_now_on()

ROOT = Path(__file__).resolve().parent.parent

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
os.environ.setdefault("PJRT_NPROC", "16")  # see vlp_jax.parallel.startup.widen_cpu_thread_pool
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory):
    """Where the embedded dataset is built for the tests: once for all, kept between runs."""
    os.environ["TFDS_DATA_DIR"] = str(ROOT / ".cache" / "tfds")
    return os.environ["TFDS_DATA_DIR"]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, shapes_dir):
    """A run of the demo's config in two steps, with a checkpoint of each; not to be written to."""
    from vlp_jax import config as config_lib
    from vlp_jax import smoke as smoke_lib
    from vlp_jax.observe.throughput import StartupClock
    from vlp_jax.train import train

    folder = tmp_path_factory.mktemp("finished") / "runs" / "first"
    config = smoke_lib.smoke(config_lib.load(str(ROOT / "configs" / "demo.py")))
    config_lib.override(config, ["checkpoint.every.percent=None", "checkpoint.every.steps=1"])
    train(config, folder, StartupClock())
    return folder
