"""The models that ours is measured beside do the same work: counted by PyTorch, not by us."""

import types

import jax
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tools.perf import peers as peers_lib
from tools.perf.jax_step import NOMINAL_EPOCH, fixed_batch
from tools.perf.peers import PLAIN, TORCH_PEERS, check_peers, plain_config
from tools.perf.peers.torch_step import TorchStep, patch_torchvision, to_tensors
from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.errors import UserError
from vlp_jax.parallel.mesh import make_mesh
from vlp_jax.training.abstract_setup import abstract_setup

CASES = {
    "clip_b16": ("open_clip", []),
    "siglip_b16": ("open_clip", []),
    "bench_small": ("open_clip", []),
    "siglip_shapes": ("open_clip", ["objective.image.pooling=mean"]),
    "mae_b16": ("transformers", []),
    "classify_shapes": ("timm", []),
}


def small_setup(name, overrides=()):
    config = config_lib.load(f"configs/{name}.py")
    config_lib.override(config, list(overrides))
    return abstract_setup(smoke_lib.smoke(config), make_mesh({}, jax.devices()[:1]), NOMINAL_EPOCH)


def torch_step(setup, peer):
    return TorchStep(
        "peer",
        peer.recipe(setup.objective),
        fixed_batch(setup),
        setup.config.optimizer,
        on_gpu=False,
        compile_model=None,
        mean=setup.objective.model.pixels.mean,
        std=setup.objective.model.pixels.std,
    )


@pytest.mark.parametrize("name", CASES)
def test_a_peer_multiplies_as_much_as_our_model(name):
    package, overrides = CASES[name]
    peer = TORCH_PEERS[package]
    setup = small_setup(name, overrides)
    patch_torchvision()
    recipe = peer.recipe(setup.objective)
    model = recipe.build()
    batch = to_tensors(fixed_batch(setup), (0.5,) * 3, (0.5,) * 3)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss = recipe.loss(model, batch)
    size = setup.config.batch_size
    ours = setup.forward_flops
    if getattr(setup.objective, "pairwise_loss", None) == "softmax":
        ours += 2 * size * size * setup.objective.model.embed_dim  # ClipLoss: logits, and again
    if name.startswith("mae"):  # as the notes of the recipe say: hidden patches, the class token
        image, decoder = setup.objective.model.image, setup.objective.model.decoder
        hidden = image.patches - setup.objective.kept
        pixels = 3 * image.patch_size**2
        ours += 2 * size * pixels * (hidden * image.width + decoder.transformer.width)
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-6)
    assert np.isfinite(loss.item())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(setup.abstract.params))
    theirs = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert theirs == pytest.approx(parameters, rel=0.02)


def test_a_step_of_pytorch_trains_and_is_timed():
    torch.set_num_threads(1)
    setup = small_setup("bench_small")
    step = torch_step(setup, TORCH_PEERS["open_clip"])
    before = [p.detach().clone() for p in step._model.parameters()]
    seconds = step.run(2)
    assert len(seconds) == 2 and all(second > 0 for second in seconds)
    assert all(not torch.equal(p, q) for p, q in zip(before, step._model.parameters(), strict=True))
    assert not step.facts["compiled"] and step.facts["parameters"] > 0


def test_the_scale_of_the_logits_stays_below_its_bound():
    setup = small_setup("clip_b16")
    recipe = TORCH_PEERS["open_clip"].recipe(setup.objective)
    model = recipe.build()
    with torch.no_grad():
        model.logit_scale.fill_(10.0)
        recipe.after_step(model)
    assert model.logit_scale.exp().item() == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("peers", "name", "words"),
    [
        (["open_clip"], "mae_b16", "take one of: plain, transformers"),
        (["transformers"], "siglip_b16", "take one of: plain, open_clip"),
        (["plain", "timm"], "clip_b16", "take one of: plain, open_clip"),
        (["open_clap"], "clip_b16", "open_clip"),
    ],
)
def test_a_peer_without_a_model_for_the_objective_is_refused(peers, name, words):
    with pytest.raises(UserError, match=words):
        check_peers(peers, small_setup(name).objective)


def test_what_a_peer_does_not_do_is_noted():
    config = config_lib.load("configs/demo.py")
    config_lib.override(config, ["objective.quantization=fp8", "microbatches=4"])
    remat, quantization, optimizer, parts = peers_lib.only_ours(config)
    assert "ours has remat=dots" in remat and "not in fp8" in quantization and "in 4 parts" in parts
    assert optimizer == "its optimizer is AdamW, ours muon"
    assert peers_lib.only_ours(plain_config(config_lib.load("configs/demo.py"))) == [optimizer]
    config_lib.override(config, ["optimizer.name=adamw", "optimizer.first_moment_dtype=bfloat16"])
    assert "its moments are float32, ours has bfloat16" in peers_lib.only_ours(config)


def test_a_peer_trains_everything():
    setup = small_setup("demo", ["optimizer.frozen=('image/.*',)"])
    with pytest.raises(UserError, match="--peer open_clip trains all parameters"):
        peers_lib.make_peer("open_clip", setup, {}, None)


def test_a_peer_on_one_accelerator_is_not_compared_with_several():
    devices = [types.SimpleNamespace(platform="gpu")] * 2
    with pytest.raises(UserError, match="--peer open_clip runs on one device, and ours on 2"):
        peers_lib.check_devices("open_clip", devices)
    peers_lib.check_devices("open_clip", devices[:1])
    peers_lib.check_devices("plain", devices)


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package torch.*requirements-test.txt"):
        check_peers(["open_clip"], small_setup("clip_b16").objective)


@pytest.mark.parametrize("name", ["siglip_b16", "mae_l16", "mae_then_clip"])
def test_plain_switches_off_what_the_objective_has_and_changes_no_shape(name):
    config = smoke_lib.smoke(config_lib.load(f"configs/{name}.py"))
    plain = plain_config(config)
    objective = plain.objective
    for section in objective.get("parts", {"": objective}).values():
        kept = {key: value for key, value in PLAIN.items() if section.get(key) == value}
        assert kept == ({k: v for k, v in PLAIN.items() if k in section}) and "remat" in kept
    mesh = make_mesh(plain.mesh, jax.devices()[:1])
    shapes = [
        jax.tree.map(lambda leaf: leaf.shape, abstract_setup(c, mesh, NOMINAL_EPOCH).abstract)
        for c in (config, plain)
    ]
    assert shapes[0] == shapes[1]
