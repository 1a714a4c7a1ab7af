"""Hugging Face CLIPModel and SiglipModel, in both directions, against the library itself."""

import json

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
    clip,
    embed,
    images,
    pixels,
    random_params,
    randomize,
    siglip,
    some,
    token_ids,
)

from vlp_jax import interop
from vlp_jax.errors import UserError
from vlp_jax.interop.hf_two_towers import CLIP, SIGLIP
from vlp_jax.models.values import Pixels

CLIP_SIZES = {
    "32 px": dict(
        vision=dict(image_size=32, patch_size=8, hidden_size=32, num_attention_heads=4),
        text=dict(vocab_size=41, hidden_size=24, num_attention_heads=3, eos_token_id=5),
        projection_dim=20,
    ),
    "42 px, patch 14, pooled at the highest id": dict(
        vision=dict(image_size=42, patch_size=14, hidden_size=48, num_attention_heads=3),
        text=dict(vocab_size=50, hidden_size=32, num_attention_heads=8, eos_token_id=2),
        projection_dim=36,
    ),
    "44 px, patch 14, which leaves pixels over": dict(
        vision=dict(image_size=44, patch_size=14, hidden_size=24, num_attention_heads=2),
        text=dict(vocab_size=41, hidden_size=16, num_attention_heads=2, eos_token_id=40),
        projection_dim=8,
    ),
}


def hf_clip(vision, text, projection_dim):
    vision = dict(intermediate_size=72, num_hidden_layers=2, **vision)
    text = dict(intermediate_size=60, num_hidden_layers=3, max_position_embeddings=9, **text)
    config = transformers.CLIPConfig(
        vision_config=dict(vision, hidden_act="gelu", layer_norm_eps=1e-4),
        text_config=text,
        projection_dim=projection_dim,
    )
    return randomize(transformers.CLIPModel(config))


def hf_siglip(size, patch, width, heads, vocab):
    tower = dict(intermediate_size=72, hidden_size=width, num_attention_heads=heads)
    config = transformers.SiglipConfig(
        vision_config=dict(tower, image_size=size, patch_size=patch, num_hidden_layers=3),
        text_config=dict(
            dict(tower, hidden_size=24, num_attention_heads=3),
            vocab_size=vocab,
            max_position_embeddings=7,
            eos_token_id=6,
            num_hidden_layers=2,
            projection_size=width,
            layer_norm_eps=1e-3,
            hidden_act="gelu",
        ),
    )
    return randomize(transformers.SiglipModel(config))


def their_outputs(model, image, text, mean=MEAN, std=STD):
    x, ids = pixels(image, mean, std), torch.from_numpy(text).long()

    def pooled(out):  # transformers 4 gives the tensor itself
        return out if isinstance(out, torch.Tensor) else out.pooler_output

    out = model(input_ids=ids, pixel_values=x)
    return {
        "raw_image": pooled(model.get_image_features(x)),
        "raw_text": pooled(model.get_text_features(ids)),
        "image": out.image_embeds,
        "text": out.text_embeds,
        "logits": out.logits_per_image,
    }


def assert_computes_the_same(module, params, model, mean=MEAN, std=STD):
    text = module.text
    image = images(module.image.image_size)
    ids = token_ids(text.vocab_size, text.context_length, text.eos_id)
    theirs_image = image
    side = model.config.vision_config.image_size
    if side != module.image.image_size[0]:  # pixels that theirs drops
        theirs_image = np.full((len(image), side, side, 3), 255, np.uint8)
        theirs_image[:, : image.shape[1], : image.shape[2]] = image
    ours = embed(module, params, image, ids)
    theirs = their_outputs(model, theirs_image, ids, mean, std)
    for what in theirs:
        assert_close(ours[what], theirs[what], f"{type(model).__name__} {what}")


def load(model_class, directory):
    model, info = model_class.from_pretrained(directory, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[kind], info
    return model.eval()


def tensors_of(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


@pytest.mark.parametrize("size", some(CLIP_SIZES, *list(CLIP_SIZES)[1:]))
def test_reads_clip(size, tmp_path):
    model = hf_clip(**CLIP_SIZES[size])
    model.save_pretrained(tmp_path)
    imported = interop.read(f"hf_clip:{tmp_path}")
    module = imported.module
    assert module.text.pooling == ("argmax" if "highest" in size else "eos")
    layers = module.image.transformer, module.text.transformer
    assert tuple(tower.activation for tower in layers) == ("gelu", "quick_gelu")
    assert any("leave" in size and "42 x 42" in note for note in imported.notes) == (
        "leave" in size
    )
    mean, std = module.pixels.mean, module.pixels.std
    assert_computes_the_same(module, imported.params, model, mean, std)

    again = interop.write("hf", module, imported.params, tmp_path / "again")
    assert {file.name for file in again} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path))


OUR_CLIPS = {
    "32 px": clip(),
    "42 px, highest id": clip(
        image=dict(size=42, patch=14, width=48, heads=3, norm_after_pool=True),
        text=dict(pooling="argmax", activation="gelu_tanh"),
    ),
    "fixed positions": clip(image=dict(position="sincos", activation="gelu")),
    "no positions": clip(image=dict(position="none")),
    "class without position": clip(image=dict(class_position=False)),
}


@pytest.mark.parametrize("name", some(OUR_CLIPS, "42 px, highest id", "fixed positions"))
def test_writes_clip(name, tmp_path):
    module = OUR_CLIPS[name]
    params = random_params(module)
    interop.write("hf_clip", module, params, tmp_path, bos_id=1)
    model = load(transformers.CLIPModel, tmp_path)
    assert_computes_the_same(module, params, model)
    assert model.config.text_config.bos_token_id == 1

    imported = interop.read(f"hf:{tmp_path}", like=module)
    if module.image.position == "learned" and module.image.class_position:
        assert_same(imported.params, params)
        assert not interop.differences(imported.module, module)
        assert imported.module.pixels == Pixels(MEAN, STD)
    assert_computes_the_same(imported.module, imported.params, model)


def test_reads_siglip(tmp_path):
    model = hf_siglip(42, 14, 48, 3, 60)
    model.save_pretrained(tmp_path)
    imported = interop.read(f"hf_siglip:{tmp_path}")
    module = imported.module
    layers = module.image.transformer, module.text.transformer
    assert tuple(tower.activation for tower in layers) == ("gelu_tanh", "gelu")
    assert tuple(tower.norm_eps for tower in layers) == (1e-6, 1e-3)
    assert_computes_the_same(module, imported.params, model, (0.5,) * 3, (0.5,) * 3)

    interop.write("hf", module, imported.params, tmp_path / "again")
    assert_same(tensors_of(tmp_path / "again"), tensors_of(tmp_path))


OUR_SIGLIPS = {
    "42 px, patch 14": siglip(image=dict(size=42, patch=14, width=48, heads=6, activation="gelu")),
    "fixed positions": siglip(image=dict(position="sincos")),
    "without biases": siglip(text_head="linear", logit_bias_init=None),
}


@pytest.mark.parametrize("name", some(OUR_SIGLIPS, "42 px, patch 14", "without biases"))
def test_writes_siglip(name, tmp_path):
    module = OUR_SIGLIPS[name]
    params = random_params(module)
    interop.write("hf_siglip", module, params, tmp_path, pad_id=7)
    model = load(transformers.SiglipModel, tmp_path)
    assert_computes_the_same(module, params, model)
    assert model.config.text_config.pad_token_id == 7

    imported = interop.read(f"hf:{tmp_path}")
    if module.image.position == "learned" and module.logit_bias_init is not None:
        assert_same(imported.params, params)
        assert not interop.differences(imported.module, module)
    assert_computes_the_same(imported.module, imported.params, model)


def test_the_auto_classes_find_both(tmp_path):
    for name, module in (("CLIPModel", clip()), ("SiglipModel", siglip())):
        interop.write("hf", module, random_params(module), tmp_path / name)
        model = transformers.AutoModel.from_pretrained(tmp_path / name)
        assert type(model).__name__ == name


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_their_image_processor_does_the_same_to_pixels(resize, tmp_path):
    for name, module in (("clip", clip()), ("siglip", siglip())):
        folder = tmp_path / name
        interop.write(
            "hf", module, random_params(module), folder, resize=resize, interpolation="bilinear"
        )
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        image = images(32, batch=1)[0]
        got = processor(images=image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(got, pixels(image[None])[0].numpy(), atol=1e-5)
        wide = processor(images=np.repeat(image, 2, axis=1), return_tensors="np")["pixel_values"]
        assert wide.shape == (1, 3, 32, 32)
        middle = pixels(np.repeat(image, 2, axis=1)[None, :, 16:48])[0].numpy()
        assert np.allclose(wide[0], middle, atol=1e-5) == (resize == "crop")
        config = json.loads((folder / "preprocessor_config.json").read_text())
        assert config["resample"] == 2


def test_what_clip_cannot_express_is_all_said_at_once(tmp_path):
    module = clip(
        image=dict(registers=2, qk_norm=True, size=(32, 16)),
        text=dict(causal=False, eos_id=2),
        logit_bias_init=0.0,
        text_head="linear_bias",
    )
    with pytest.raises(UserError) as error:
        interop.write("hf_clip", module, random_params(module), tmp_path / "new")
    message = str(error.value)
    for reason in (
        "CLIPModel has image.registers 0, not 2",
        "CLIPModel has image.qk_norm False, not True",
        "CLIPModel takes square images, not 32 x 16 ones",
        "CLIPModel has text.causal True, not False",
        "cannot pool at the first id 2",
        "CLIPModel has logit_bias_init None, not 0.0",
        "CLIPModel has text_head 'linear', not 'linear_bias'",
    ):
        assert reason in message
    assert "\n" not in message
    assert not (tmp_path / "new").exists()


def test_what_neither_class_expresses_names_both(tmp_path):
    module = siglip(image=dict(pooling="mean"))
    with pytest.raises(UserError, match="SiglipModel has image.pooling 'map', not 'mean'") as error:
        interop.write("hf", module, random_params(module), tmp_path)
    assert "CLIPModel has image.pooling 'cls', not 'mean'" in str(error.value)


def test_parameters_of_another_model_are_not_written(tmp_path):
    module = clip()
    params = random_params(module)
    params["image/pre_norm/scale"] = np.ones(7, np.float32)
    with pytest.raises(UserError, match=r"image/pre_norm/scale \[7\] instead of \[32\]"):
        interop.write("hf_clip", module, params, tmp_path)


def test_old_configs_with_a_repeated_section_and_buffers(tmp_path):
    """As the first published checkpoints have them."""
    module = clip(text=dict(pooling="argmax"))
    params = random_params(module)
    interop.write("hf_clip", module, params, tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["text_config_dict"] = config["text_config"]
    config["text_config"] = {"hidden_size": 999}
    config["vision_config_dict"] = None
    file.write_text(json.dumps(config))
    tensors = tensors_of(tmp_path)
    tensors["text_model.embeddings.position_ids"] = np.arange(9)[None]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    imported = interop.read(f"hf_clip:{tmp_path}")
    assert_same(imported.params, params)


def test_defaults_of_configs_are_those_of_the_library():
    for defaults, config in (
        (CLIP.vision, transformers.CLIPVisionConfig()),
        (CLIP.text, transformers.CLIPTextConfig()),
        (CLIP.defaults, transformers.CLIPConfig()),
        (SIGLIP.vision, transformers.SiglipVisionConfig()),
        (SIGLIP.text, transformers.SiglipTextConfig()),
    ):
        assert defaults == {name: getattr(config, name, True) for name in defaults}
