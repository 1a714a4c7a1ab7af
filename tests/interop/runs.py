"""Runs with random parameters, as training leaves them, without training."""

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax.data.tokenizers import build_tokenizer
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.training import workdir as workdir_lib
from vlp_jax.training.build import make_checkpointer
from vlp_jax.training.setup import make_setup
from vlp_jax.training.state import TrainState

SIZES = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2}
CAPTIONS = [f"A {c} {s} on the {p}" for c in ("red", "Blue") for s in ("circle", "box") for p in
            ("left", "Right", "floor")] * 3  # fmt: skip
CLIP = {
    "name": "contrastive",
    "embed_dim": 16,
    "image": {
        **{"variant": "Ti/8", "image_size": 24, "pooling": "cls", "patch_bias": False, **SIZES},
        **{"pre_norm": True, "activation": "quick_gelu", "norm_eps": 1e-5},
    },
    "text": {
        **{"variant": "Ti", "pooling": "eos", "causal": True, "activation": "quick_gelu"},
        **{"norm_eps": 1e-5, **SIZES},
    },
    "image_mean": (0.48, 0.45, 0.4),
}
SIGLIP = {
    "name": "contrastive",
    "loss": "sigmoid",
    "embed_dim": 32,
    "image_head": "none",
    "text_head": "linear_bias",
    "scan_layers": False,
    "image": {"variant": "Ti/8", "image_size": 24, "pooling": "map", **SIZES},
    "text": {"variant": "Ti", "pooling": "last", "causal": False, **SIZES},
}
MAE = {
    "name": "masked_autoencoding",
    "mask_ratio": 0.6,
    "image": {
        **{"variant": "Ti/8", "image_size": 24, "class_token": True, "position": "sincos", **SIZES},
        "activation": "gelu",
    },
    "decoder": SIZES,
}
SUBWORD = {"name": "subword", "vocab_size": 280, "context_length": 12}
BYTES = {"name": "bytes", "context_length": 20}


def run_config(objective, tokenizer, preprocess, ema=False):
    """A config of which export needs no more than this."""
    config = config_lib.base()
    config.batch_size = 8
    config.objective = ConfigDict(objective)
    config.tokenizer = ConfigDict(tokenizer)
    config.data = ConfigDict({"source": "folder", "preprocess": preprocess})
    config.mesh.replica = 1
    config.optimizer.ema_decay = 0.9 if ema else 0.0
    return config.lock()


def write_run(config, workdir, steps=(3,)):
    """Writes a workdir with a checkpoint at each of `steps`; returns (objective, step -> tree)."""
    workdir, tokenizer = epath.Path(workdir), None
    if config.tokenizer:
        tokenizer = build_tokenizer(config.tokenizer, lambda: CAPTIONS, None)
    spec = {"image": ((8, 24, 24, 3), np.uint8)}
    if tokenizer is not None:
        spec["text"] = ((8, tokenizer.context_length), np.int32)
    mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:1])
    setup = make_setup(config, mesh, tokenizer, spec, None)
    state = setup.fresh_state()
    workdir_lib.prepare(workdir, config, tokenizer)
    trees = {}
    with make_checkpointer(config, workdir) as checkpointer:
        for step in steps:
            trees[step] = perturbed(state.eval_params, step)
            kept = {"ema" if config.optimizer.ema_decay else "params": trees[step]}
            checkpointer.save(
                step, state.replace(step=jax.numpy.int32(step), **kept), {"position": step * 8}
            )
    return setup.objective, trees


def perturbed(tree: TrainState, seed: int):
    """Parameters of which none has a value, such as zero or one, that hides a mistake."""
    rng = np.random.default_rng(seed)

    def noisy(leaf):
        noise = 0.1 * rng.normal(size=leaf.shape)
        return jax.device_put(np.asarray(leaf + noise, np.float32), leaf.sharding)

    return jax.tree.map(noisy, tree)


CROP = {"resize_shortest_and_center_crop": {"size": 24, "method": "bilinear"}}
SQUASH = {"decode_image": {}, "resize": {"size": 24}}


def session_run(name, config, steps=(3,)):
    """A fixture: (workdir, objective, step -> tree) of a run; not to be written to."""

    @pytest.fixture(scope="session", name=name)
    def run(tmp_path_factory):
        workdir = tmp_path_factory.mktemp(name)
        return workdir, *write_run(config(), workdir, steps)

    return run


clip_run = session_run(
    "clip_run",
    lambda: run_config(CLIP, SUBWORD, {"lowercase": {}, "decode_image": {}, **CROP}, ema=True),
    steps=(3, 7),
)
siglip_run = session_run("siglip_run", lambda: run_config(SIGLIP, BYTES, SQUASH))
mae_run = session_run("mae_run", lambda: run_config(MAE, {}, SQUASH))
