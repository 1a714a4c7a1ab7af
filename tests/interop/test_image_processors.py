"""Images as the libraries of others prepare them for their models, by what their folders say."""

import json
import re
import shutil

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from foreign import clip, images, random_params, siglip, vit
from PIL import Image

import vlp_jax
from vlp_jax import interop
from vlp_jax.encoders.images import ImageProcessor
from vlp_jax.errors import UserError
from vlp_jax.interop import hf_images

SIZES = ((57, 40), (41, 100), (30, 20), (33, 50), (32, 32), (70, 64))  # width and height
FILE = "preprocessor_config.json"
CLIP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


@pytest.fixture(scope="module")
def pictures():
    """Smooth as photographs are."""
    noise = np.random.default_rng(0).integers(0, 255, (len(SIZES), 7, 9, 3)).astype(np.uint8)
    pairs = zip(noise, SIZES, strict=True)
    return [Image.fromarray(x).resize(size, Image.Resampling.BICUBIC) for x, size in pairs]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small model of each type, by its model_type and by the format."""
    root = tmp_path_factory.mktemp("models")
    text = dict(vocab=49408, eos_id=49407)
    modules = {"hf_clip": clip(text=text), "hf_siglip": siglip(text=text), "hf_vit": vit()}
    modules |= {"open_clip": clip(dict(activation="gelu"), text), "timm": vit(norm_eps=1e-6)}
    for name, module in modules.items():
        extras = {} if name == "timm" else {"resize": "crop"}
        interop.write(name, module, random_params(module), root / name, **extras)
    return root


def copied(folders, name, tmp_path):
    return shutil.copytree(folders / name, tmp_path / name)


def with_processor(folders, config, tmp_path, name="hf_clip", file=FILE):
    """A folder of transformers whose image processor has a config, its class said or not."""
    folder = copied(folders, name, tmp_path)
    (folder / FILE).unlink()
    (folder / file).write_text(json.dumps(config))
    return folder


def prepared(model, pictures):
    """Normalized pixels, channels first, of a loaded model that holds its normalization."""
    mean, std = np.array(model.module.pixels.mean), np.array(model.module.pixels.std)
    pixels = np.stack([model.images(picture) for picture in pictures])
    return ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)


def theirs_of(folder, pictures):
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return np.stack([processor(x, return_tensors="np")["pixel_values"][0] for x in pictures])


def assert_same_pixels(ours, theirs, std):
    """Their fast image processor rounds a resized pixel otherwise, by one of 255 at most."""
    np.testing.assert_allclose(ours, theirs, atol=1.05 / 255 / min(std))


@pytest.mark.parametrize(
    "settings",
    [
        CLIP,
        {**CLIP, "size": {"shortest_edge": 40}},
        {**CLIP, "size": {"shortest_edge": 20}},  # the cut adds black
        {**CLIP, "size": {"height": 40, "width": 37}},
        {**CLIP, "size": 32, "crop_size": 32},
        {**CLIP, "size": [32, 32], "do_center_crop": False},
        {**CLIP, "do_center_crop": None, "size": [32, 32]},
        *({**CLIP, "resample": method} for method in (0, 1, 2)),
        {**CLIP, "rescale_factor": 1 / 127.5},
        {**CLIP, "do_rescale": False, "image_mean": [122, 116, 104], "image_std": [68, 66, 70]},
        {**CLIP, "do_normalize": False},
        {**CLIP, "image_mean": 0.5, "image_std": 0.25},
        {**CLIP, "image_processor_type": "CLIPImageProcessorFast"},
        {"size": 32, "crop_size": 32, "feature_extractor_type": "CLIPFeatureExtractor"},
        {"size": 32, "feature_extractor_type": "ViTFeatureExtractor"},
        {"size": 36, "crop_size": 32, "image_processor_type": "DeiTImageProcessor"},
    ],
    ids=str,
)
def test_an_image_processor_of_transformers_does_the_same(settings, folders, pictures, tmp_path):
    model = vlp_jax.load(f"hf:{with_processor(folders, settings, tmp_path)}")
    assert model.notes == ()
    theirs = theirs_of(tmp_path / "hf_clip", pictures)
    assert_same_pixels(prepared(model, pictures), theirs, model.module.pixels.std)


@pytest.mark.parametrize(("model_type", "size"), [("hf_siglip", [32, 32]), ("hf_vit", 32)])
def test_the_model_type_says_the_class_where_the_file_does_not(
    model_type, size, folders, pictures, tmp_path
):
    folder = with_processor(folders, {"size": size}, tmp_path, model_type)
    imported = interop.read(f"hf:{folder}")
    assert (
        imported.extras["interpolation"]
        == {"hf_siglip": "bicubic", "hf_vit": "bilinear"}[model_type]
    )
    how = {name: imported.extras[name] for name in ("resize", "interpolation", "scale")}
    pixels = np.stack([ImageProcessor((32, 32), **how)(x) for x in pictures]) / 127.5 - 1
    np.testing.assert_allclose(pixels.transpose(0, 3, 1, 2), theirs_of(folder, pictures), atol=0.01)


def test_a_section_of_processor_config_counts_first(folders, pictures, tmp_path):
    nested = {"image_processor": {**CLIP, "size": {"shortest_edge": 40}}}
    folder = with_processor(folders, nested, tmp_path, file="processor_config.json")
    (folder / FILE).write_text(json.dumps(CLIP))
    model = vlp_jax.load(f"hf:{folder}")
    assert model.images.scale == 40
    assert_same_pixels(
        prepared(model, pictures), theirs_of(folder, pictures), model.module.pixels.std
    )


def test_embeddings_of_a_larger_scale_are_theirs(folders, pictures, tmp_path):
    folder = with_processor(folders, {**CLIP, "size": {"shortest_edge": 40}}, tmp_path)
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    rows = theirs.get_image_features(torch.from_numpy(theirs_of(folder, pictures))).pooler_output
    rows = rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True)
    ours = vlp_jax.load(f"hf:{folder}").embed_image(pictures)
    assert (ours * rows).sum(axis=1).min() > 0.9999


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"size": {"shortest_edge": 32, "longest_edge": 40}}, "scales to .*longest_edge"),
        ({"size": {"max_height": 40, "max_width": 40}}, "scales to .*max_height"),
        ({"do_center_crop": False}, "keeps the shape of images and cuts nothing"),
        ({"do_center_crop": False, "size": [40, 40]}, "makes 40 x 40 pixels, and the model takes"),
        ({"crop_size": 24}, "cuts 24 out, and the model takes 32 x 32"),
        ({"do_resize": False}, "does not resize"),
        ({"do_pad": True, "pad_size": [40, 40]}, "pads images to"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order, which is left out"),
        ({"image_processor_type": "ConvNextImageProcessor"}, "ConvNextImageProcessor is not known"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "Siglip2ImageProcessor is not known"),
    ],
)
def test_what_an_image_processor_does_otherwise_is_noted(change, note, folders, tmp_path):
    folder = with_processor(folders, {**CLIP, **change}, tmp_path)
    notes = vlp_jax.load(f"hf:{folder}").notes
    assert len(notes) == 1 and re.search(note, notes[0])


def test_a_folder_without_an_image_processor(folders, tmp_path):
    folder = copied(folders, "hf_clip", tmp_path)
    (folder / FILE).unlink()
    model = vlp_jax.load(f"hf:{folder}")
    (note,) = model.notes
    assert "has no image processor" in note and "as by a CLIPImageProcessor" in note
    assert model.images.resize == "crop" and model.images.scale is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_std": [0, 1, 1]}, "image_std is .*, and pixels are divided by it"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0.5, 0.5\], not three numbers"),
        ({"rescale_factor": 0}, "rescale_factor is 0, not a number above 0"),
        ({"resample": 9}, "resample is 9, not one of PIL's"),
        ({"size": "32"}, "size is '32', not a number, two, or a mapping"),
    ],
)
def test_an_image_processor_that_cannot_be_read(change, message, folders, tmp_path):
    folder = with_processor(folders, {**CLIP, **change}, tmp_path)
    with pytest.raises(UserError, match=f"{FILE}: {message}"):
        vlp_jax.load(f"hf:{folder}")


@pytest.mark.parametrize("name", sorted(hf_images.DEFAULTS.keys() - {"ViTHybrid"}))
def test_the_defaults_are_those_of_the_classes(name):
    theirs = getattr(transformers, f"{name}ImageProcessor")
    for key, ours in hf_images.DEFAULTS[name].items():
        said = getattr(theirs, key, None)
        said = tuple(said) if isinstance(said, list) else said
        unset = said is None and key in ("do_center_crop", "crop_size")
        assert said == ours or (unset and (key == "crop_size" or ours is False)), key


OPEN_CLIP = [
    *({"resize_mode": mode} for mode in ("squash", "shortest", None)),
    *({"interpolation": method} for method in ("bilinear", "random", None)),
    *({"mean": 0.5, "std": 0.25}, {"size": 64}),
]


@pytest.mark.parametrize(
    ("size", "change"),
    [
        *((32, change) for change in OPEN_CLIP),
        *(((16, 40), {"resize_mode": mode}) for mode in ("squash", "shortest")),
        ((16, 40), {"interpolation": "bilinear", "resize_mode": "shortest"}),
    ],
    ids=str,
)
def test_what_open_clip_does(size, change, folders, pictures, tmp_path):
    folder = copied(folders, "open_clip", tmp_path)
    if size != 32:
        module = clip(dict(activation="gelu", size=size), dict(vocab=49408, eos_id=49407))
        interop.write("open_clip", module, random_params(module), folder)
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["preprocess_cfg"] |= change
    file.write_text(json.dumps(config))
    model = vlp_jax.load(f"open_clip:{folder}")
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs = np.stack([transform(picture) for picture in pictures])
    assert model.notes == ()
    np.testing.assert_allclose(prepared(model, pictures), theirs, atol=1e-5)


TIMM = [
    *({"crop_pct": 0.9, "crop_mode": mode} for mode in ("squash", "center")),
    *({"interpolation": method} for method in ("bilinear", "nearest", "lanczos", "box", "hamming")),
    *({"crop_pct": 1.1, "crop_mode": "center"}, {"crop_pct": None, "mean": None, "std": None}),
]


def timm_pixels(folder, pictures):
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    data = timm.data.resolve_data_config(
        pretrained_cfg=timm.models.PretrainedCfg(**config).to_dict()
    )
    transform = timm.data.create_transform(**data)
    return np.stack([transform(picture) for picture in pictures])


@pytest.mark.parametrize("change", TIMM, ids=str)
@pytest.mark.parametrize("size", [32, (16, 40)])
def test_what_timm_does(change, size, pictures, tmp_path):
    module = vit(size=size, norm_eps=1e-6)
    interop.write("timm", module, random_params(module), tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"] |= change
    file.write_text(json.dumps(config))
    model = vlp_jax.load(f"timm:{tmp_path / 'theirs'}")
    assert not [note for note in model.notes if "normalized" not in note]
    extras = interop.read(f"timm:{tmp_path / 'theirs'}").extras
    mean, std = np.array(extras["image_mean"]), np.array(extras["image_std"])
    ours = np.stack([(model.images(x) / 255 - mean) / std for x in pictures]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(ours, timm_pixels(tmp_path / "theirs", pictures), atol=1e-5)
    # And back: what is written prepares images in the same way.
    params = random_params(module)
    interop.write("timm", module, params, tmp_path / "ours", **extras)
    np.testing.assert_allclose(timm_pixels(tmp_path / "ours", pictures), ours, atol=1e-5)


@pytest.mark.parametrize(
    ("format", "file", "change"),
    [
        ("open_clip", "open_clip_config.json", {"resize_mode": "longest"}),
        ("timm", "config.json", {"crop_mode": "border"}),
    ],
)
def test_images_that_are_padded_are_noted(format, file, change, folders, tmp_path):
    folder = copied(folders, format, tmp_path)
    config = json.loads((folder / file).read_text())
    config["preprocess_cfg" if format == "open_clip" else "pretrained_cfg"] |= change
    (folder / file).write_text(json.dumps(config))
    assert any("fitted in whole and padded" in x for x in interop.read(f"{format}:{folder}").notes)


@pytest.mark.parametrize("extras", [{"resize": "crop", "scale": 40}, {"scale": (40, 37)}], ids=str)
def test_a_larger_scale_is_written_for_transformers_and_refused_by_open_clip(
    extras, pictures, tmp_path
):
    module = clip(text=dict(vocab=49408, eos_id=49407))
    interop.write("hf_clip", module, random_params(module), tmp_path / "hf", **extras)
    model = vlp_jax.load(f"hf:{tmp_path / 'hf'}")
    assert model.images.scale == extras["scale"] and model.notes == ()
    theirs = theirs_of(tmp_path / "hf", pictures)
    assert_same_pixels(prepared(model, pictures), theirs, module.pixels.std)
    with pytest.raises(UserError, match="open_clip scales images to cover 32 x 32 pixels, not to"):
        interop.write("open_clip", module, random_params(module), tmp_path / "oc", **extras)
    with pytest.raises(UserError, match="open_clip does not resize by 'box': give --interpolation"):
        interop.write(
            "open_clip", module, random_params(module), tmp_path / "oc", interpolation="box"
        )


def test_images_of_the_size_are_left_alone_by_every_resize():
    (image,) = images(32, batch=1)
    for resize in ("squash", "crop"):
        for method in ("bicubic", "nearest", "lanczos"):
            np.testing.assert_array_equal(ImageProcessor((32, 32), resize, method)(image), image)
