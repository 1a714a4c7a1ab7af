"""timm's VisionTransformer, in both directions, against the library itself."""

import json

import pytest
import safetensors.numpy
import timm
from foreign import (
    MEAN,
    STD,
    assert_close,
    assert_same,
    features,
    images,
    pixels,
    random_params,
    randomize,
    siglip,
    some,
    vit,
)
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from vlp_jax import interop
from vlp_jax.errors import UserError
from vlp_jax.interop.timm_config import SIGLIP, SIGLIP_GAP, fields_of, siglip_name
from vlp_jax.models.values import tower_fields

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2.5)

# Arguments of theirs that a name does not stand for, and what of ours they should become.
THEIRS = {
    "class token": (dict(), dict(pooling="cls", class_position=True)),
    "class token without position": (
        dict(no_embed_class=True, img_size=[28, 56], patch_size=14),
        dict(class_position=False, image_size=(28, 56)),
    ),
    "mean of patches": (
        dict(global_pool="avg", class_token=False, act_layer="gelu_tanh"),
        dict(pooling="mean", norm_after_pool=True, activation="gelu_tanh"),
    ),
    "mean of patches beside a class token, norm before": (
        dict(global_pool="avg", fc_norm=False),
        dict(pooling="mean", norm_after_pool=False, class_token=True),
    ),
    "attention pooling, norm after": (
        dict(global_pool="map", class_token=False, fc_norm=True),
        dict(pooling="map", norm_after_pool=True),
    ),
    "registers with positions": (
        dict(reg_tokens=3, init_values=0.1),
        dict(registers=3, class_position=True, layer_scale=1e-5),
    ),
    "registers without positions": (
        dict(reg_tokens=2, no_embed_class=True, global_pool="map", pool_include_prefix=True),
        dict(registers=2, class_position=False, pooling="map"),
    ),
    "registers with positions alone": (
        dict(reg_tokens=2, class_token=False, global_pool="avg", qk_norm=True),
        dict(registers=2, class_token=False, qk_norm=True),
    ),
    "all tokens, norm before the blocks": (
        dict(global_pool="", pre_norm=True, act_layer="quick_gelu"),
        dict(pooling="none", pre_norm=True, patch_bias=False, activation="quick_gelu"),
    ),
    "no positions": (
        dict(pos_embed="none", img_size=[16, 40], class_token=False, global_pool="avg"),
        dict(position="none", image_size=(16, 40)),
    ),
}

OURS = {
    "class token": vit(activation="gelu"),
    "42 px, patch 14, mean": vit(
        42, 14, width=48, heads=3, mlp_dim=100, pooling="mean", class_token=False
    ),
    "28 x 56 px, norm after the mean": vit(
        (28, 56), 14, pooling="mean", norm_after_pool=True, class_position=False
    ),
    "attention pooling of class token and registers": vit(pooling="map", registers=3),
    "attention pooling of patches": vit(pooling="map", class_token=False, norm_after_pool=True),
    "registers, class without position": vit(registers=2, class_position=False),
    "everything": vit(
        qk_norm=True, layer_scale=0.1, registers=1, class_token=False, pooling="mean"
    ),
    "as in CLIP": vit(pre_norm=True, patch_bias=False, norm_eps=1e-5, activation="quick_gelu"),
    "fixed positions, no bias of patches": vit(position="sincos", patch_bias=False),
    "no positions, all tokens": vit(position="none", pooling="none"),
}


def state(model):
    return {key: x.numpy() for key, x in model.state_dict().items()}


def assert_computes_the_same(module, params, model):
    image = images(module.image_size)
    assert_close(features(module, params, image), model(pixels(image)), "timm features")


@pytest.mark.parametrize(
    "name",
    some(
        THEIRS,
        "class token without position",
        "mean of patches",
        "registers with positions",
        "registers without positions",
        "all tokens, norm before the blocks",
        "no positions",
    ),
)
def test_reads_theirs(name, tmp_path):
    args, fields = THEIRS[name]
    model = timm.create_model("vit_base_patch16_224", num_classes=0, **{**SMALL, **args})
    randomize(model)
    save_for_hf(model, tmp_path, safe_serialization=True)
    imported = interop.read(f"timm:{tmp_path}")
    for field, value in fields.items():
        assert tower_fields(imported.module)[field] == value, field
    assert_computes_the_same(imported.module, imported.params, model)

    interop.write("timm", imported.module, imported.params, tmp_path / "again")
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    if not (imported.module.registers and imported.module.class_position):
        assert_same(state(again), state(model))
    assert_computes_the_same(imported.module, imported.params, again)


@pytest.mark.parametrize(
    "name",
    some(
        OURS,
        "28 x 56 px, norm after the mean",
        "attention pooling of class token and registers",
        "everything",
        "as in CLIP",
        "fixed positions, no bias of patches",
    ),
)
def test_writes_ours(name, tmp_path):
    module = OURS[name]
    params = random_params(module)
    interop.write("timm", module, params, tmp_path, image_mean=MEAN, image_std=STD)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert_same(state(model), tensors)
    assert_computes_the_same(module, params, model)

    imported = interop.read(f"timm:{tmp_path}")
    folded = module.registers and module.class_token and module.class_position
    if module.position == "learned" and not folded:
        assert_same(imported.params, params)
        assert not interop.differences(imported.module, module)
    assert_computes_the_same(imported.module, imported.params, model)
    assert any(str(list(MEAN)) in note for note in imported.notes)


def test_a_position_of_the_class_token_beside_registers_is_added_to_the_token(tmp_path):
    module = vit(registers=2)
    params = random_params(module)
    interop.write("timm", module, params, tmp_path)
    imported = interop.read(f"timm:{tmp_path}")
    assert not imported.module.class_position
    expected = dict(params)
    table = expected["image/position_embedding"]
    expected["image/class_token"] = params["image/class_token"] + table[:1]
    expected["image/position_embedding"] = table[1:]
    assert_same(imported.params, expected)


def test_their_preprocessing_is_what_was_asked_for(tmp_path):
    module = vit()
    for resize, mode in (("squash", "squash"), ("crop", "center")):
        interop.write(
            "timm",
            module,
            random_params(module),
            tmp_path,
            image_mean=MEAN,
            image_std=STD,
            resize=resize,
            interpolation="bilinear",
        )
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        data = timm.data.resolve_model_data_config(model)
        assert (tuple(data["mean"]), tuple(data["std"])) == (MEAN, STD)
        assert tuple(data["input_size"]) == (3, 32, 32) and data["interpolation"] == "bilinear"
        assert data["crop_mode"] == mode and data["crop_pct"] == 1.0


def test_a_file_without_config_needs_a_model(tmp_path):
    model = randomize(VisionTransformer(**SMALL, num_classes=5, act_layer="gelu_tanh"))
    file = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(state(model), file)
    with pytest.raises(UserError, match="nothing says what the heads of the image tower is"):
        interop.read(f"timm:{file}")
    like = vit(heads=4, depth=7, pooling="cls")
    imported = interop.read(f"timm:{file}", like=siglip().clone(image=like))
    assert imported.module == vit(mlp_dim=80, depth=2)
    assert any("head.weight" in note for note in imported.notes)
    image = images(32)
    theirs = model.forward_head(model.forward_features(pixels(image)), pre_logits=True)
    assert_close(features(imported.module, imported.params, image), theirs, "timm features")


def test_a_grid_that_cannot_be_told(tmp_path):
    model = VisionTransformer(**{**SMALL, "img_size": (24, 56)}, num_classes=0)
    file = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(state(model), file)
    with pytest.raises(UserError, match="21 positions are no square grid"):
        interop.read(f"timm:{file}", like=vit())
    imported = interop.read(f"timm:{file}", like=vit((56, 24)))
    assert imported.module.grid == (7, 3)  # as the model it goes into has it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_layer": "relu"}, "act_layer 'relu' cannot be expressed"),
        ({"qkv_bias": False}, "a model with qkv_bias False cannot be expressed"),
        ({"global_pool": "max"}, "global_pool 'max' cannot be expressed"),
        ({"norm_layer": "rmsnorm"}, "norm_layer 'rmsnorm' cannot be expressed"),
        ({"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix True cannot"),
        ({"img_size": [48, 32]}, r"pos_embed \[1, 17, 32\] instead of \[1, 24, 32\]"),
    ],
)
def test_configs_that_cannot_be_read(change, message, tmp_path):
    interop.write("timm", vit(), random_params(vit()), tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["model_args"].update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        interop.read(f"timm:{tmp_path}")


def test_what_timm_cannot_express_is_all_said(tmp_path):
    module = vit(norm_eps=1e-12, pre_norm=True)
    with pytest.raises(UserError) as error:
        interop.write("timm", module, random_params(module), tmp_path)
    assert "image.norm_eps 1e-06 or 1e-05, not 1e-12" in str(error.value)
    assert "with pre_norm has image.patch_bias False, not True" in str(error.value)


def test_names_mean_what_timm_builds(monkeypatch):
    """Every name that we know, against the arguments with which timm calls its class."""
    import inspect

    from timm.models import vision_transformer as library

    calls = {}
    defaults = {
        name: p.default for name, p in inspect.signature(VisionTransformer).parameters.items()
    }
    monkeypatch.setattr(
        library,
        "_create_vision_transformer",
        lambda name, pretrained=False, **args: calls.update({name: {**defaults, **args}}),
    )
    known = [name for name in timm.list_models("vit_*") if fields_of(name) is not None]
    members = sum(map(len, SIGLIP.values())) + sum(map(len, SIGLIP_GAP.values()))
    assert sum("siglip" in name for name in known) == members == 34
    assert {"vit_tiny_patch16_224", "vit_huge_patch14_clip_378"} < set(known)
    assert fields_of("vit_base_patch16_gap_224") is None  # it has 16 heads
    for name in known:
        getattr(library, name)()
        args, fields = calls[name], fields_of(name)
        assert args["num_heads"] == fields["heads"], name
        assert args["patch_size"] == fields["patch_size"], name
        assert (args["act_layer"] or "gelu") == fields["activation"], name
        pooling = {"token": "cls", "avg": "mean", "map": "map"}[args["global_pool"]]
        assert pooling == fields["pooling"], name
        eps = 1e-6 if args["norm_layer"] is None else args["norm_layer"].keywords["eps"]
        assert eps == fields["norm_eps"], name
        size = library.default_cfgs[name].default.input_size[1:]
        assert tuple(size) == fields["image_size"], name
        assert args["qkv_bias"] and not args["qk_norm"], name
        if "siglip" not in name or fields["image_size"][0] % fields["patch_size"]:
            continue
        ratio = args["mlp_ratio"]
        tower = vit(
            fields["image_size"],
            fields["patch_size"],
            args["embed_dim"],
            args["depth"],
            args["num_heads"],
            int(args["embed_dim"] * ratio),
            activation=fields["activation"],
            pooling=pooling,
            class_token=False,
        )
        assert siglip_name(tower) == name
    assert siglip_name(vit(pooling="map", class_token=False)) is None
