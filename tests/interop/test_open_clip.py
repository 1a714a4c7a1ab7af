"""open_clip, in both directions, against the library itself."""

import json

import numpy as np
import open_clip
import PIL.Image
import pytest
import safetensors.numpy
import timm
import torch
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
    vit,
)

from vlp_jax import interop
from vlp_jax.errors import UserError
from vlp_jax.interop import timm_config
from vlp_jax.models.values import TransformerConfig

IMAGE = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=8, mlp_ratio=2.5)
TEXT = dict(context_length=9, vocab_size=41, width=24, heads=3, layers=3, mlp_ratio=2.25)

THEIRS = {
    "as CLIP": dict(),
    "quick GELU, no norms before, 42 px": dict(
        quick_gelu=True,
        vision_cfg=dict(
            image_size=42,
            patch_size=14,
            width=48,
            head_width=16,
            no_ln_pre=True,
            pool_type="avg",
            norm_kwargs=dict(eps=1e-3),
        ),
        text_cfg=dict(pool_type="last", no_causal_mask=True, proj_bias=True),
    ),
    "LayerScale, query-key norm, not square, pooled at eos": dict(
        vision_cfg=dict(
            image_size=[16, 40],
            ls_init_value=0.1,
            qk_norm=True,
            final_ln_after_pool=True,
            pool_type="avg",
            act_kwargs=dict(approximate="tanh"),
        ),
        text_cfg=dict(
            pool_type="eos", eos_id=7, ls_init_value=0.1, norm_kwargs=dict(eps=1e-3), qk_norm=True
        ),
        init_logit_bias=-3.0,
    ),
    "text tower of its own class, no text head": dict(
        embed_dim=24, custom_text=True, text_cfg=dict(proj_type="none"), init_logit_bias=1.0
    ),
}

OURS = {
    "as CLIP": clip(image=dict(activation="gelu")),
    "quick GELU, 42 px, patch 14, highest id": clip(
        image=dict(size=42, patch=14, width=48, heads=3),
        text=dict(activation="quick_gelu", pooling="argmax"),
    ),
    "all that can be": clip(
        image=dict(
            size=(16, 40),
            pooling="mean",
            norm_after_pool=True,
            qk_norm=True,
            layer_scale=0.1,
            activation="gelu_tanh",
            norm_eps=1e-6,
        ),
        text=dict(pooling="last", causal=False, qk_norm=True, layer_scale=0.1),
        text_head="linear_bias",
        logit_bias_init=-10.0,
    ),
    "fixed positions, no text head": clip(
        image=dict(position="sincos", activation="gelu"), embed_dim=24, text_head="none"
    ),
}


def their_model(config):
    """One of theirs with random weights, from a config as in its JSON files."""
    config = json.loads(json.dumps(config))
    custom_text = config.pop("custom_text", False)
    model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**config)
    return randomize(model)


def save(model, config, folder):
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: x.contiguous() for key, x in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    content = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))


def load(folder):
    return open_clip.create_model(f"local-dir:{folder}").eval()


def state(model):
    return {key: x.numpy() for key, x in model.state_dict().items()}


def assert_computes_the_same(module, params, model):
    image = images(module.image.image_size)
    ids = token_ids(module.text.vocab_size, module.text.context_length, module.text.eos_id)
    ours = embed(module, params, image, ids)
    x, tokens = pixels(image), torch.from_numpy(ids).long()
    theirs = {
        "raw_image": model.encode_image(x),
        "raw_text": model.encode_text(tokens),
        "image": model.encode_image(x, normalize=True),
        "text": model.encode_text(tokens, normalize=True),
        "logits": model.get_logits(x, tokens)[0],
    }
    for what in theirs:
        assert_close(ours[what], theirs[what], f"open_clip {what}")


@pytest.mark.parametrize("name", some(THEIRS, *list(THEIRS)[1:]))
def test_reads_theirs(name, tmp_path):
    changes = THEIRS[name]
    config = {
        "embed_dim": 20,
        **changes,
        "vision_cfg": {**IMAGE, **changes.get("vision_cfg", {})},
        "text_cfg": {**TEXT, **changes.get("text_cfg", {})},
    }
    model = their_model(config)
    save(model, config, tmp_path)
    imported = interop.read(f"open_clip:{tmp_path}")
    assert_computes_the_same(imported.module, imported.params, model)

    interop.write("open_clip", imported.module, imported.params, tmp_path / "again")
    again = load(tmp_path / "again")
    prefix = "text." if config.get("custom_text") else ""
    assert_same(
        state(again), {key.removeprefix(prefix): value for key, value in state(model).items()}
    )
    assert_computes_the_same(imported.module, imported.params, again)


@pytest.mark.parametrize("name", some(OURS, "all that can be", "fixed positions, no text head"))
def test_writes_ours(name, tmp_path):
    module = OURS[name]
    params = random_params(module)
    written = interop.write("open_clip", module, params, tmp_path, eos_id=5, pad_id=3)
    assert {file.name for file in written} == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
    }
    model = load(tmp_path)
    assert_same(state(model), safetensors.numpy.load_file(tmp_path / "open_clip_model.safetensors"))
    assert_computes_the_same(module, params, model)

    imported = interop.read(f"open_clip:{tmp_path}", like=module)
    assert (imported.module.text.eos_id, imported.module.text.pad_id) == (5, 3)
    if module.image.position == "learned":
        assert_same(imported.params, params)
        assert not interop.differences(imported.module, module)
    assert_computes_the_same(imported.module, imported.params, model)


@pytest.fixture
def small_siglip(monkeypatch):
    """Names of small towers, which timm does not have, in its table and in ours."""
    for family, pooling in (("siglip", {}), ("siglip_gap", {"global_pool": "avg"})):
        fields = {"global_pool": "map", "class_token": False, **pooling}
        if family == "siglip_gap":
            fields["fc_norm"] = False
        for side in (32, 44):
            name = f"vit_tiny_patch{'8' if side == 32 else '14'}_{family}_{side}"
            args = dict(embed_dim=32, depth=2, num_heads=4, mlp_ratio=2.5, img_size=side, **fields)
            args["patch_size"] = 8 if side == 32 else 14

            def build(pretrained=False, _args=args, _name=name, **kwargs):
                create = timm.models.vision_transformer._create_vision_transformer
                return create(_name, pretrained=pretrained, **{**_args, **kwargs})

            monkeypatch.setitem(timm.models._registry._model_entrypoints, name, build)
    monkeypatch.setitem(timm_config.SIZES, "tiny", TransformerConfig(32, 2, 80, 4))
    for table in (timm_config.SIGLIP, timm_config.SIGLIP_GAP):
        monkeypatch.setitem(table, ("tiny", 8), (32,))
        monkeypatch.setitem(table, ("tiny", 14), (44,))


def trunk_config(name, text=None, **vision):
    return {
        "embed_dim": 32,
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {"timm_model_name": name, "timm_pool": "map", "timm_proj": "none", **vision},
        "text_cfg": {
            **TEXT,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            **(text or {}),
        },
    }


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            trunk_config("vit_tiny_patch8_siglip_32", image_size=32), marks=pytest.mark.slow
        ),
        trunk_config(
            "vit_tiny_patch14_siglip_44",
            text={"act_kwargs": {"approximate": "tanh"}},
            image_size=44,
            timm_proj="linear",
        ),
        trunk_config(
            "vit_tiny_patch8_siglip_gap_32",
            image_size=32,
            timm_pool="avg",
            timm_proj="linear",
            timm_proj_bias=True,
        ),
        trunk_config("vit_tiny_patch8_siglip_32", image_size=32, timm_proj=""),
    ],
    ids=["32 px", "44 px, patch 14, head", "mean", "head inside of the tower"],
)
def test_reads_theirs_with_a_tower_of_timm(config, tmp_path, small_siglip):
    model = their_model(config)
    save(model, config, tmp_path)
    imported = interop.read(f"open_clip:{tmp_path}")
    module = imported.module
    side = config["vision_cfg"]["image_size"]
    if side != module.image.image_size[0]:
        assert any("42 x 42" in note for note in imported.notes)
        model.visual.trunk.set_input_size((42, 42))  # the same patches
    assert_computes_the_same(module, imported.params, model)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(siglip(image=dict(activation="gelu")), marks=pytest.mark.slow),
        siglip(
            image=dict(activation="gelu", position="sincos"),
            image_head="linear",
            text=dict(causal=True, pooling="argmax", activation="quick_gelu"),
            text_head="linear",
        ),
        siglip(image=dict(activation="gelu", pooling="mean"), image_head="linear_bias"),
    ],
    ids=["as SigLIP", "heads", "mean"],
)
def test_writes_ours_with_a_tower_of_timm(module, tmp_path, small_siglip):
    params = random_params(module)
    interop.write("open_clip", module, params, tmp_path)
    model = load(tmp_path)
    assert isinstance(model, open_clip.CustomTextCLIP)
    assert_computes_the_same(module, params, model)
    imported = interop.read(f"open_clip:{tmp_path}")
    if module.image.position == "learned":
        assert_same(imported.params, params)
        assert not interop.differences(imported.module, module)
    assert_computes_the_same(imported.module, imported.params, model)


@pytest.mark.slow
def test_a_name_that_timm_has_is_found_by_open_clip(tmp_path):
    tower = vit(256, 32, 768, 12, 12, 3072, pooling="map", class_token=False)
    module = siglip().clone(image=tower, embed_dim=768)
    params = random_params(module)
    for path, x in params.items():  # of this width, features would be too large to compare
        params[path] = x / 8 if path.endswith("kernel") else x
    interop.write("open_clip", module, params, tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    name = config["model_cfg"]["vision_cfg"]["timm_model_name"]
    assert name == "vit_base_patch32_siglip_256"
    assert_computes_the_same(module, params, load(tmp_path))


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_their_preprocessing_does_the_same_to_pixels(resize, tmp_path):
    module = clip(image=dict(activation="gelu"))
    interop.write("open_clip", module, random_params(module), tmp_path, resize=resize)
    _, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    image = images(32, batch=1)[0]
    got = transform(PIL.Image.fromarray(image)).numpy()
    np.testing.assert_allclose(got, pixels(image[None])[0].numpy(), atol=1e-5)
    wide = transform(PIL.Image.fromarray(np.repeat(image, 2, axis=1))).numpy()
    middle = pixels(np.repeat(image, 2, axis=1)[None, :, 16:48])[0].numpy()
    assert np.allclose(wide, middle, atol=1e-5) == (resize == "crop")


def test_a_file_without_config_takes_the_rest_from_the_model(tmp_path):
    module = clip(image=dict(norm_eps=1e-3, activation="gelu"), text=dict(pooling="last"))
    params = random_params(module)
    interop.write("open_clip", module, params, tmp_path / "with")
    file = tmp_path / "alone.safetensors"
    tensors = safetensors.numpy.load_file(tmp_path / "with" / "open_clip_model.safetensors")
    prefixed = {f"module.{key}": x for key, x in tensors.items()}
    safetensors.numpy.save_file(prefixed, file)
    with pytest.raises(UserError, match="needs its open_clip_config.json beside it"):
        interop.read(f"open_clip:{file}")
    imported = interop.read(f"open_clip:{file}", like=module)
    assert_same(imported.params, params)
    assert not interop.differences(imported.module, module)

    odd = clip(image=dict(size=(24, 40), activation="gelu"))
    interop.write("open_clip", odd, random_params(odd), tmp_path / "odd")
    (tmp_path / "odd" / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match="15 positions are no square grid"):
        interop.read(f"open_clip:{tmp_path / 'odd'}", like=module)


def test_what_cannot_be_expressed_is_all_said(tmp_path):
    module = clip(
        image=dict(registers=1),
        text=dict(pooling="mean", padding_mask=True),
        image_head="linear_bias",
    )
    with pytest.raises(UserError) as error:
        interop.write("open_clip", module, random_params(module), tmp_path)
    for reason in (
        "image.registers 0, not 1",
        "text.pooling 'eos' or 'argmax' or 'last', not 'mean'",
        "text.padding_mask False, not True",
        "image_head 'linear', not 'linear_bias'",
        "quick_gelu in both towers or in none, not 'quick_gelu' (image) and 'gelu' (text)",
    ):
        assert reason in str(error.value)
    other = siglip(image=dict(qk_norm=True))
    with pytest.raises(UserError) as error:
        interop.write("open_clip", other, random_params(other), tmp_path)
    assert "image.qk_norm False, not True" in str(error.value)
    assert "timm has none of width 32, depth 2, 4 heads" in str(error.value)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vision_cfg", {"attentional_pool": True}, "vision_cfg.attentional_pool True cannot"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "text_cfg.hf_model_name 'roberta-base'"),
        ("text_cfg", {"pool_type": "first"}, "pool_type 'first' cannot be expressed"),
        ("vision_cfg", {"image_size": 48}, r"visual.positional_embedding \[17, 32\] instead of"),
        (None, {"multimodal_cfg": {}}, "multimodal_cfg"),
        (None, {"text_cfg": None}, "has no text_cfg"),
    ],
)
def test_configs_that_cannot_be_read(section, change, message, tmp_path):
    module = clip(image=dict(activation="gelu"))
    interop.write("open_clip", module, random_params(module), tmp_path)
    file = tmp_path / "open_clip_config.json"
    config = json.loads(file.read_text())
    target = config["model_cfg"] if section is None else config["model_cfg"][section]
    target.update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        interop.read(f"open_clip:{tmp_path}")


def test_a_tower_of_timm_whose_name_is_not_known(tmp_path, small_siglip):
    config = trunk_config("vit_tiny_patch8_siglip_32", image_size=32)
    save(their_model(config), config, tmp_path)
    config["vision_cfg"]["timm_model_name"] = "convnext_base"
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(UserError, match="timm_model_name 'convnext_base' is not one that we know"):
        interop.read(f"open_clip:{tmp_path}")
