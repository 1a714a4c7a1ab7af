"""Our own format, which holds every model."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from foreign import assert_same, autoencoder, clip, random_params, siglip, vit

from vlp_jax import interop
from vlp_jax.errors import UserError
from vlp_jax.interop import precision
from vlp_jax.interop.trees import plain

MODELS = {
    "clip": clip(),
    "siglip": siglip(),
    "mean": clip({"pooling": "mean", "class_token": False}, {"pooling": "mean", "causal": False}),
    "registers": vit((24, 32), registers=2, qk_norm=True, layer_scale=0.1, norm_after_pool=True),
    "mae": autoencoder(),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", precision.WEIGHTS)
def test_what_is_written_comes_back(name, weights, tmp_path):
    module, params = MODELS[name], random_params(MODELS[name])
    extras = {"resize": "crop", "interpolation": "bilinear", "image_mean": (0.1, 0.2, 0.3)}
    interop.write("safetensors", module, params, tmp_path, weights=weights, **extras)
    imported = interop.read(f"safetensors:{tmp_path}")
    assert plain(imported.module) == plain(module)
    assert {key: imported.extras[key] for key in extras} == extras
    expected = precision.rounded(params, weights)
    if weights == "int8":  # rounded twice, the scale may differ in its last bit
        for path, x in expected.items():
            np.testing.assert_allclose(imported.params[path], x, rtol=1e-6)
    else:
        assert_same(imported.params, expected)


def test_the_library_alone_reads_it(tmp_path):
    params = random_params(clip())
    interop.write("safetensors", clip(), params, tmp_path, weights="float32")
    assert_same(safetensors.numpy.load_file(tmp_path / "model.safetensors"), params)


def test_sizes_of_the_files(tmp_path):
    params, sizes = random_params(clip(text={"width": 96, "heads": 3})), {}
    for weights in precision.WEIGHTS:
        module = clip(text={"width": 96, "heads": 3})
        interop.write("safetensors", module, params, tmp_path / weights, weights=weights)
        sizes[weights] = (tmp_path / weights / "model.safetensors").stat().st_size
    assert sizes["bfloat16"] < 0.55 * sizes["float32"]
    assert sizes["int8"] < 0.4 * sizes["float32"]


def change(file, **values):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "hf"}, "not of this format"),
        ({"version": 2}, "has version 2"),
        ({"model": {"class": "Resnet"}}, "describes no model of ours"),
        ({"model": {"class": "VisionTransformer", "widht": 3}}, "did you mean 'width'"),
        ({"model": {"class": "VisionTransformer", "width": 3}}, "needs image_size"),
        ({"extras": {"resise": "crop"}}, "did you mean 'resize'"),
    ],
)
def test_a_config_that_is_wrong(values, message, tmp_path):
    interop.write("safetensors", vit(), random_params(vit()), tmp_path)
    change(tmp_path / "config.json", **values)
    with pytest.raises(UserError, match=message):
        interop.read(f"safetensors:{tmp_path}")


def test_weights_of_another_model(tmp_path):
    interop.write("safetensors", vit(), random_params(vit()), tmp_path)
    interop.write("safetensors", vit(width=40), random_params(vit(width=40)), tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not fit its config.json"):
        interop.read(f"safetensors:{tmp_path}")


@pytest.mark.parametrize(
    ("format", "weights", "message"),
    [
        ("open_clip", "int8", "no place for weights in int8 .*safetensors and stablehlo take int8"),
        ("big_vision", "bfloat16", "no place for weights in bfloat16"),
        ("timm", "float16", "weights='float16' must be"),
    ],
)
def test_weights_that_a_format_has_no_place_for(format, weights, message, tmp_path):
    module = vit() if format == "timm" else clip()
    with pytest.raises(UserError, match=message):
        interop.write(format, module, random_params(module), tmp_path / "x", weights=weights)
    assert not (tmp_path / "x").exists()


def test_bfloat16_files_for_others_hold_bfloat16(tmp_path):
    interop.write("hf_clip", clip(), random_params(clip()), tmp_path, weights="bfloat16")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    import torch
    import transformers

    model = transformers.CLIPModel.from_pretrained(tmp_path, dtype="auto")
    assert model.visual_projection.weight.dtype == torch.bfloat16
    expected = random_params(clip())["image_projection/kernel"].astype(ml_dtypes.bfloat16)
    theirs = model.visual_projection.weight.float().numpy().T
    np.testing.assert_array_equal(theirs, expected.astype(np.float32))
