"""Hugging Face ViTModel and ViTMAEForPreTraining, in both directions, against the library."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from foreign import (
    MEAN,
    STD,
    assert_close,
    assert_same,
    features,
    images,
    masked_decoder,
    pixels,
    random_params,
    randomize,
    siglip,
    vit,
)
from modules import changed

from vlp_jax import interop
from vlp_jax.errors import UserError
from vlp_jax.interop import hf_vit
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.masking import mask_from_noise
from vlp_jax.models.positions import sincos_2d
from vlp_jax.models.values import Pixels


def tensors_of(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def load(model_class, directory, **fields):
    model, info = model_class.from_pretrained(directory, output_loading_info=True, **fields)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], info
    return model.eval()


def vit_config(size=32, patch=8, **fields):
    return transformers.ViTConfig(
        **{
            "image_size": size,
            "patch_size": patch,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 72,
            **fields,
        }
    )


def assert_vit_computes_the_same(module, params, model):
    image = images(module.image_size)
    theirs = model(pixels(image)).last_hidden_state
    assert_close(features(module, params, image), theirs[:, 0], "ViTModel class token")
    tokens = module.clone(pooling="none", norm_after_pool=False)
    if not module.norm_after_pool:
        assert_close(features(tokens, params, image), theirs, "ViTModel tokens")


@pytest.mark.parametrize(
    "config",
    [
        vit_config(42, 14, hidden_size=48, num_attention_heads=3, layer_norm_eps=1e-4),
        vit_config([16, 40], 8, hidden_act="quick_gelu"),
    ],
    ids=["42 px, patch 14", "16 x 40 px"],
)
def test_reads_vit(config, tmp_path):
    model = randomize(transformers.ViTModel(config, add_pooling_layer=False))
    model.save_pretrained(tmp_path)
    imported = interop.read(f"hf_vit:{tmp_path}")
    assert imported.module.transformer.norm_eps == config.layer_norm_eps
    assert_vit_computes_the_same(imported.module, imported.params, model)
    interop.write("hf", imported.module, imported.params, tmp_path / "again")
    again = load(transformers.ViTModel, tmp_path / "again", add_pooling_layer=False)
    assert_same(
        {key: x.numpy() for key, x in again.state_dict().items()},
        {key: x.numpy() for key, x in model.state_dict().items()},
    )


def test_reads_the_tower_of_a_classifier_under_the_names_of_both_versions(tmp_path):
    model = randomize(transformers.ViTForImageClassification(vit_config()))
    model.save_pretrained(tmp_path)
    imported = interop.read(f"hf_vit:{tmp_path}")
    assert any("classifier.weight" in note for note in imported.notes)
    assert_vit_computes_the_same(imported.module, imported.params, model.vit)

    in_memory = {key: x.numpy() for key, x in model.state_dict().items()}
    safetensors.numpy.save_file(in_memory, tmp_path / "model.safetensors")
    assert_same(interop.read(f"hf_vit:{tmp_path}").params, imported.params)


@pytest.mark.parametrize(
    "module",
    [
        vit((28, 56), 14, width=48, heads=3, norm_after_pool=True, norm_eps=1e-5),
        pytest.param(vit(position="sincos"), marks=pytest.mark.slow),
        vit(class_position=False, pooling="none"),
    ],
    ids=["28 x 56 px, patch 14", "fixed positions", "all tokens"],
)
def test_writes_vit(module, tmp_path):
    params = random_params(module)
    interop.write("hf_vit", module, params, tmp_path, image_mean=MEAN, image_std=STD)
    assert type(transformers.AutoModel.from_pretrained(tmp_path)).__name__ == "ViTModel"
    model = load(transformers.ViTModel, tmp_path, add_pooling_layer=False)
    assert_vit_computes_the_same(module.clone(pooling="cls"), params, model)
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (tuple(processor["image_mean"]), tuple(processor["image_std"])) == (MEAN, STD)

    imported = interop.read(f"hf:{tmp_path}", like=module)
    if module.position == "learned" and module.class_position:
        assert_same(imported.params, params)
        assert not interop.differences(imported.module, module)
    assert_vit_computes_the_same(imported.module, imported.params, model)


def mae_config(size=32, patch=8, **fields):
    return transformers.ViTMAEConfig(
        **{
            **vit_config(size, patch).to_diff_dict(),
            "model_type": "vit_mae",
            "decoder_hidden_size": 24,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 3,
            "decoder_intermediate_size": 40,
            "layer_norm_eps": 1e-6,
            **fields,
        }
    )


def mae(size=32, patch=8, position="sincos", **fields):
    encoder = vit(size, patch, pooling="none", position=position, activation="gelu", **fields)
    decoder = masked_decoder(
        *(24, 2, 40, 3), encoder.grid, 3 * patch**2, position=position,
        norm_eps=encoder.transformer.norm_eps,
    )  # fmt: skip
    return MaskedAutoencoder(encoder, decoder, Pixels(MEAN, STD))


def reconstruct(module, params, image, noise, kept):
    """Ours: predictions of all patches, targets, and which patches are hidden."""
    mask = mask_from_noise(noise, kept)
    tree = {"params": interop.to_tree(module, params)}
    prediction = jax.jit(module.apply)(tree, image, mask)
    return np.asarray(prediction), np.asarray(module.targets(image)), np.asarray(mask.hidden)


def assert_mae_computes_the_same(module, params, model, mean=MEAN, std=STD):
    image, patches = images(module.image.image_size), module.image.patches
    noise = np.random.default_rng(3).uniform(size=(len(image), patches)).astype(np.float32)
    kept = int(patches * (1 - model.config.mask_ratio))
    prediction, target, hidden = reconstruct(module, params, image, noise, kept)
    for norm_pix_loss in (False, True):
        model.config.norm_pix_loss = norm_pix_loss
        theirs = model(pixels(image, mean, std), noise=torch.from_numpy(noise))
        np.testing.assert_array_equal(hidden, theirs.mask.numpy())
        assert_close(prediction, theirs.logits, "ViTMAE reconstruction")
        goal = target
        if norm_pix_loss:
            variance = target.var(-1, ddof=1, keepdims=True)
            goal = (target - target.mean(-1, keepdims=True)) / (variance + 1e-6) ** 0.5
        loss = (((prediction - goal) ** 2).mean(-1) * hidden).sum() / hidden.sum()
        deviation = abs(float(loss) - theirs.loss.item())
        print(f"deviation ViTMAE loss {deviation:.2e}")
        assert deviation <= 1e-4 and theirs.loss.item() > 0.1


@pytest.mark.parametrize(
    ("config", "fixed"),
    [
        (mae_config(), True),
        (
            mae_config(
                42, 14, decoder_hidden_size=32, decoder_num_attention_heads=8, mask_ratio=0.5
            ),
            False,
        ),
    ],
    ids=["32 px, fixed positions", "42 px, patch 14, other positions"],
)
def test_reads_mae(config, fixed, tmp_path):
    model = randomize(transformers.ViTMAEForPreTraining(config))
    if fixed:
        grid = (config.image_size // config.patch_size,) * 2
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            sines = np.pad(sincos_2d(grid, table.shape[-1]), ((1, 0), (0, 0)))
            table.copy_(torch.from_numpy(sines[None] + np.float32(1e-6)))
    model.save_pretrained(tmp_path)
    imported = interop.read(f"hf_vit_mae:{tmp_path}")
    module = imported.module
    expected = "sincos" if fixed else "learned"
    assert (module.image.position, module.decoder.position) == (expected, expected)
    eps = {tower.transformer.norm_eps for tower in (module.image, module.decoder)}
    assert eps == {config.layer_norm_eps}
    assert any(f"mask_ratio {config.mask_ratio}" in note for note in imported.notes)
    assert_mae_computes_the_same(
        module, imported.params, model, module.pixels.mean, module.pixels.std
    )
    if not fixed:
        interop.write("hf", module, imported.params, tmp_path / "again")
        again = load(transformers.ViTMAEForPreTraining, tmp_path / "again")
        assert_same(
            {key: x.numpy() for key, x in again.state_dict().items()},
            {key: x.numpy() for key, x in model.state_dict().items()},
        )


@pytest.mark.parametrize(
    "module",
    [
        mae(),
        pytest.param(mae(42, 14, position="learned", width=48, heads=3), marks=pytest.mark.slow),
        mae(position="learned", class_position=False),
    ],
    ids=["32 px", "42 px, patch 14, learned positions", "class without position"],
)
def test_writes_mae(module, tmp_path):
    params = random_params(module)
    interop.write("hf_vit_mae", module, params, tmp_path, norm_pix_loss=True, mask_ratio=0.5)
    model = load(transformers.ViTMAEForPreTraining, tmp_path)
    assert model.config.norm_pix_loss and model.config.mask_ratio == 0.5
    assert_mae_computes_the_same(module, params, model)

    imported = interop.read(f"hf:{tmp_path}")
    assert any("norm_pix_loss True" in note for note in imported.notes)
    if module.image.class_position:
        assert_same(imported.params, params)
        assert not interop.differences(imported.module, module)


def test_files_have_the_names_of_transformers_4_and_both_tables(tmp_path):
    module = mae()
    interop.write("hf_vit_mae", module, random_params(module), tmp_path)
    tensors = tensors_of(tmp_path)
    assert "vit.encoder.layer.1.attention.attention.query.weight" in tensors
    assert "decoder.decoder_layers.1.output.dense.bias" in tensors
    for name, tower in (
        ("vit.embeddings.position_embeddings", module.image),
        ("decoder.decoder_pos_embed", module.decoder),
    ):
        np.testing.assert_array_equal(tensors[name][0, 0], 0)
        table = sincos_2d(tower.grid, tower.transformer.width)
        np.testing.assert_array_equal(tensors[name][0, 1:], table)


def test_what_cannot_be_expressed_is_all_said(tmp_path):
    module = vit(pooling="mean", registers=1, patch_bias=False, layer_scale=0.1)
    with pytest.raises(UserError) as error:
        interop.write("hf_vit", module, random_params(module), tmp_path)
    for reason in (
        "ViTModel has image.pooling 'cls' or 'none', not 'mean'",
        "image.registers 0, not 1",
        "image.patch_bias True, not False",
        "image.layer_scale None, not 0.1",
    ):
        assert reason in str(error.value)
    odd = mae((32, 16))
    odd = odd.clone(decoder=changed(odd.decoder, norm_eps=1e-3, activation="gelu_tanh"))
    with pytest.raises(UserError) as error:
        interop.write("hf", odd, random_params(odd), tmp_path)
    for reason in (
        "takes square images, not 32 x 16",
        "has one activation, not 'gelu' (image) and 'gelu_tanh' (decoder)",
        "has one norm_eps, not 1e-06 (image) and 0.001 (decoder)",
    ):
        assert reason in str(error.value)


@pytest.mark.parametrize("name", ["hf_clip", "hf_siglip", "hf_vit", "hf_vit_mae"])
def test_a_format_refuses_models_and_folders_of_another(name, tmp_path):
    module = vit() if name != "hf_vit" else siglip()
    with pytest.raises(UserError, match=f"not a {type(module).__name__}"):
        interop.write(name, module, random_params(module), tmp_path)
    interop.write("hf", module, random_params(module), tmp_path)
    with pytest.raises(UserError, match="has model_type '.*', and this format is"):
        interop.read(f"{name}:{tmp_path}")


def test_defaults_of_configs_are_those_of_the_library():
    for defaults, config in (
        (hf_vit.VIT_DEFAULTS, transformers.ViTConfig()),
        (hf_vit.MAE_DEFAULTS, transformers.ViTMAEConfig()),
    ):
        assert defaults == {name: getattr(config, name) for name in defaults}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not known"),
        ({"num_channels": 1}, "num_channels is 1"),
        ({"qkv_bias": False}, "qkv_bias is false"),
        ({"num_attention_heads": 5}, "5 heads do not divide the width 32"),
        ({"hidden_size": "32"}, "hidden_size is '32', not a positive whole number"),
        ({"image_size": "big"}, "image_size is 'big', neither a number nor two"),
        ({"model_type": "dinov2"}, "model_type 'dinov2', which cannot be read"),
    ],
)
def test_configs_that_cannot_be_read(change, message, tmp_path):
    interop.write("hf", vit(), random_params(vit()), tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        interop.read(f"hf:{tmp_path}")
