"""Runs that start from files of other projects, as `config.init_from` names them."""

import helpers
import jax
import numpy as np
import pytest
import torch
from foreign import masked_decoder, random_params, vit
from ml_collections import ConfigDict

from vlp_jax import interop
from vlp_jax.errors import UserError
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.training import param_groups
from vlp_jax.training.init_from import make_start

POSITIONS = "image/position_embedding"
TOWER = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2}
EXACT = {"activation": "gelu", "norm_eps": 1e-5}
CLIP = dict(
    image={**TOWER, **EXACT, "variant": "mu/8", "image_size": 16, "pooling": "cls"}
    | {"patch_bias": False, "pre_norm": True},
    text={**TOWER, **EXACT, "variant": "mu"},
)
SIGLIP = dict(
    loss="sigmoid",
    embed_dim=32,
    image_head="none",
    text_head="linear_bias",
    image={**TOWER, "variant": "mu/8", "image_size": 16, "pooling": "map"},
    text={**TOWER, "variant": "mu", "pooling": "last", "causal": False},
)
ALL = ((".*", "load"),)
IMAGE_ALONE = (("image/.*", "load"), (".*", "fresh"))


def start_from(source, rules, tmp_path, **objective):
    """(start, setup, its model's parameters by path)."""
    config = helpers.tiny_config(**objective)
    config.init_from.update({"source": source, "rules": rules})
    setup = helpers.setup_on(config, {"replica": 1}, 1)
    start = make_start(setup, tmp_path / "new", helpers.TOKENIZER)
    flat = param_groups.flatten(jax.device_get(start.state(setup).params))
    return start, setup, flat


@pytest.mark.parametrize(
    ("format", "source", "objective", "rules"),
    [
        pytest.param("hf_clip", "hf:{}", CLIP, ALL, marks=pytest.mark.slow),
        ("open_clip", "open_clip:{}/open_clip_model.safetensors", CLIP, ALL),
        ("hf_siglip", "hf:{}", SIGLIP, ALL),
        pytest.param("big_vision", "big_vision:{}/model.npz", SIGLIP, ALL, marks=pytest.mark.slow),
        ("timm", "timm:{}/model.safetensors", SIGLIP, IMAGE_ALONE),
    ],
)
def test_every_number_arrives(format, source, objective, rules, tmp_path):
    config = helpers.tiny_config(**objective)
    module = helpers.setup_on(config, {"replica": 1}, 1).objective.model
    if format == "hf_clip":  # an eos of 2 is not its, as the tokenizer of these tests has
        module = module.clone(text=module.text.clone(eos_id=5))
    if format == "timm":
        module = module.image
    params = random_params(module)
    interop.write(format, module, params, tmp_path / "files")
    start, _, flat = start_from(source.format(tmp_path / "files"), rules, tmp_path, **objective)
    for path, value in params.items():
        np.testing.assert_array_equal(flat[path], value, err_msg=path)
    loaded = {fate.path for fate in start.fates if fate.kind == "loaded"}
    assert loaded == set(params)


def test_the_encoder_of_a_masked_autoencoder_at_another_size(tmp_path):
    image = vit(32, 8, 32, 2, 2, 64, pooling="none", activation="gelu")
    decoder = masked_decoder(16, 1, 32, 2, position="learned")
    module = MaskedAutoencoder(image, decoder)
    params = random_params(module)
    interop.write("hf_vit_mae", module, params, tmp_path / "files")
    tower = {**TOWER, "variant": "mu/8", "image_size": 16, "pooling": "cls", "activation": "gelu"}
    rules = (("decoder/.*", "skip"), *IMAGE_ALONE)
    start, setup, flat = start_from(f"hf:{tmp_path}/files", rules, tmp_path, image=tower)
    for path, value in params.items():
        if path.startswith("image/") and path != POSITIONS:
            np.testing.assert_array_equal(flat[path], value, err_msg=path)
    (fate,) = (fate for fate in start.fates if fate.path == POSITIONS)
    assert str(fate) == "resampled 4x4 -> 2x2"
    table = torch.from_numpy(params[POSITIONS][1:].reshape(1, 4, 4, 32)).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(
        table, size=(2, 2), mode="bicubic", antialias=True, align_corners=False
    )
    np.testing.assert_allclose(
        flat[POSITIONS][1:], small.permute(0, 2, 3, 1).reshape(4, 32).numpy(), atol=1e-5
    )
    np.testing.assert_array_equal(flat[POSITIONS][0], params[POSITIONS][0])
    skipped = {fate.path for fate in start.fates if fate.kind == "skipped"}
    assert skipped == {path for path in params if path.startswith("decoder/")}
    text = start.report()
    assert "resampled 4x4 -> 2x2" in text and "decoder/mask_token" in text


def test_what_computes_something_else_is_noted(tmp_path):
    module = vit(16, 8, 32, 2, 2, 64, pooling="map", class_token=False, activation="gelu")
    interop.write("timm", module, random_params(module), tmp_path / "files")
    start, _, _ = start_from(
        f"timm:{tmp_path}/files", IMAGE_ALONE, tmp_path,
        image={**TOWER, "variant": "mu/8", "image_size": 16, "pooling": "map"},
    )  # fmt: skip
    assert "image.activation is 'gelu' in the source and 'gelu_tanh' here" in start.report()


def test_a_composite_starts_as_its_first_part_does(tmp_path):
    objective = helpers.tiny_config(**SIGLIP).objective.to_dict()
    painting = {"name": "masked_autoencoding", "decoder": TOWER}
    image = {k: v for k, v in SIGLIP["image"].items() if k != "pooling"}
    painting["image"] = {**image, "class_token": False, "position": "learned"}
    painting["image"]["activation"] = "gelu_tanh"
    module = helpers.setup_on(helpers.tiny_config(**SIGLIP), {"replica": 1}, 1).objective.model
    params = random_params(module)
    interop.write("hf_siglip", module, params, tmp_path / "files")
    config = helpers.tiny_config()
    parts = {"pairs": objective, "painting": painting}
    config.objective = ConfigDict({"name": "composite", "parts": parts})
    config.init_from.source = f"hf:{tmp_path}/files"
    config.init_from.rules = (("decoder/.*", "fresh"), (".*", "load"))
    setup = helpers.setup_on(config, {"replica": 1}, 1)
    start = make_start(setup, tmp_path / "new", helpers.TOKENIZER)
    flat = param_groups.flatten(jax.device_get(start.state(setup).params))
    for path, value in params.items():
        np.testing.assert_array_equal(flat[path], value, err_msg=path)


def test_positions_without_a_grid_are_refused(tmp_path):
    module = vit((16, 32), 8, 32, 2, 2, 64, pooling="map", class_token=False)
    interop.write("big_vision", module, random_params(module), tmp_path)
    with pytest.raises(UserError, match="8"):
        start_from(f"big_vision:{tmp_path}/model.npz", IMAGE_ALONE, tmp_path, **SIGLIP)
