"""Programs of jax.export: they compute what the model computes, for any batch."""

import importlib.util
import io
import json

import jax
import numpy as np
import odd_images
import pytest
import transformers
from foreign import applied, autoencoder, clip, images, random_params, siglip, token_ids, vit
from PIL import Image

from vlp_jax import interop
from vlp_jax.data.image_ops.upright import upright_rgb
from vlp_jax.data.tokenizers.subword import train_subword
from vlp_jax.handover import artifacts
from vlp_jax.handover.artifacts import artifact_functions
from vlp_jax.handover.foreign import run_stablehlo
from vlp_jax.interop import precision
from vlp_jax.interop.base import Extras
from vlp_jax.interop.hf_tokenizer import TokenizerFiles
from vlp_jax.models.values import Pixels


def opened(folder):
    """The example that is in a folder, as its user imports it."""
    spec = importlib.util.spec_from_file_location("run", folder / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    return run.Model(folder)


def written(module, params, folder, dtype="float32", **extras):
    folder.mkdir(exist_ok=True)
    artifacts.write("stablehlo", module, params, folder, dtype, **extras)
    return opened(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    module, folder = clip(), tmp_path_factory.mktemp("clip")
    params = random_params(module)
    return module, params, written(module, params, folder), folder


@pytest.mark.parametrize(
    "batch",
    [3, 64, pytest.param(1, marks=pytest.mark.slow)],  # the proof of each export takes 1
)
def test_any_batch(pair, batch):
    module, params, program, _ = pair
    tree = {"params": interop.to_tree(module, params)}
    image = images(32, batch)
    text = np.resize(token_ids(41, 9, 5), (batch, 9)).astype(np.int32)
    out = jax.jit(module.apply)(tree, image, text)
    np.testing.assert_allclose(program("embed_image", image), out["image"], atol=1e-6)
    np.testing.assert_allclose(program("embed_text", text), out["text"], atol=1e-6)


def test_lowered_for_three_platforms_with_the_weights_outside(pair):
    *_, folder = pair
    signature = json.loads((folder / "signature.json").read_text())
    for said in signature["functions"].values():
        exported = jax.export.deserialize(bytearray((folder / said["program"]).read_bytes()))
        assert exported.platforms == ("cpu", "cuda", "tpu")
        assert exported.calling_convention_version == said["calling_convention_version"]
        assert len(exported.in_avals) == len(said["weights"]) + 1
        size = sum(np.prod(x["shape"]) for x in signature["arrays"].values())
        assert (folder / said["program"]).stat().st_size < 4 * size
    assert signature["functions"]["embed_image"]["output"]["shape"] == ["batch", 20]
    scale = float(np.exp(pair[1]["logit_scale"]))
    assert signature["logit_scale"] == pytest.approx(scale) and signature["logit_bias"] == 0


def test_new_weights_go_into_the_same_program(pair):
    module, _, program, _ = pair
    other = random_params(module, seed=5)
    kept = program.weights
    program.weights = {name: other[name] for name in kept}
    image = images(32, 2)
    tree = {"params": interop.to_tree(module, other)}
    expected = applied(module, tree, image, method="embed_image")
    try:
        np.testing.assert_allclose(program("embed_image", image), expected, atol=1e-6)
    finally:
        program.weights = kept


@pytest.mark.parametrize("weights", [pytest.param("bfloat16", marks=pytest.mark.slow), "int8"])
def test_weights_in_fewer_bits_are_restored_inside(weights, tmp_path):
    module = siglip()
    params, image = random_params(module), images(32, 2)
    program = written(module, params, tmp_path, weights=weights)
    kinds = {str(x.dtype) for x in program.weights.values()}
    assert kinds == {"bfloat16": {"bfloat16"}, "int8": {"int8", "float32"}}[weights]
    tree = {"params": interop.to_tree(module, precision.rounded(params, weights))}
    expected = applied(module, tree, image, method="embed_image")
    np.testing.assert_allclose(program("embed_image", image), expected, atol=2e-6)


@pytest.mark.slow
def test_products_in_bfloat16(pair, tmp_path):
    module, params, exact, _ = pair
    program = written(module, params, tmp_path, "bfloat16")
    image = images(32, 4)
    apart = np.abs(program("embed_image", image) - exact("embed_image", image)).max()
    assert 1e-5 < apart < 5e-2
    name = next(iter(program.signature["functions"].values()))["program"]
    exported = jax.export.deserialize(bytearray((tmp_path / name).read_bytes()))
    assert "bf16" in exported.mlir_module()


@pytest.mark.slow
def test_an_image_tower_alone_normalizes_inside(tmp_path):
    module, mean, std = vit(pooling="mean", class_token=False), (0.1, 0.2, 0.3), (0.3, 0.2, 0.4)
    params, image = random_params(module), images(32, 2)
    program = written(module, params, tmp_path, image_mean=mean, image_std=std)
    tree = {"params": interop.to_tree(module, params)}
    expected = applied(module, tree, np.asarray(Pixels(mean, std).normalize(image)))
    np.testing.assert_allclose(program("embed_image", image), expected, atol=1e-5)


def test_a_masked_autoencoder_embeds_and_paints(tmp_path):
    module = autoencoder()
    params, image = random_params(module), images(32, 2)
    program = written(module, params, tmp_path, mask_ratio=0.5, norm_pix_loss=True)
    tree = {"params": interop.to_tree(module, params)}
    features = np.array(applied(module, tree, image, method="features"))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(program("embed_image", image), features, atol=1e-6)
    noise = np.random.default_rng(0).random((2, 16), np.float32)
    seen, painted, true = np.moveaxis(program("reconstruct", image, noise), 1, 0)
    np.testing.assert_allclose(true, image / 255, atol=1e-6)
    order = np.argsort(np.argsort(noise, axis=1), axis=1).reshape(2, 4, 4)
    hidden = np.repeat(np.repeat(order >= 8, 8, axis=1), 8, axis=2)
    np.testing.assert_allclose(seen[hidden], 0.5, atol=1e-6)
    np.testing.assert_allclose(painted[~hidden], true[~hidden], atol=1e-6)
    assert np.abs(painted[hidden] - true[hidden]).max() > 0.01


def test_the_example_tokenizes_as_transformers(tmp_path):
    texts = ["A red circle", "", "<eos> is a word here", "a very long text " * 9, "Größe 42"]
    tokenizer = train_subword(["a red circle on the left", "a blue box"] * 4, 280, 12)
    ids = {name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "pad_id")}
    files = TokenizerFiles.from_json(tokenizer.to_json(True), context_length=12, **ids)
    text = {"vocab": tokenizer.vocab_size, "length": 12, "eos_id": tokenizer.eos_id}
    module = clip(text=text)
    program = written(module, random_params(module), tmp_path, tokenizer=files, **ids)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs(texts, padding="max_length", truncation=True, return_tensors="np")
    np.testing.assert_array_equal(program.ids(texts), expected["input_ids"])
    np.testing.assert_array_equal(program.ids(texts), tokenizer([x.lower() for x in texts]))


def test_the_example_resizes_as_the_processor_of_clip(pair, tmp_path):
    *_, program, _ = pair
    small = np.random.default_rng(4).integers(0, 256, (5, 7, 3), np.uint8)
    picture = Image.fromarray(small).resize((70, 44), Image.Resampling.BICUBIC)
    said = program.signature["preprocessing"]
    for how in ("squash", "crop"):
        folder = tmp_path / how
        params = random_params(clip())
        interop.write("hf_clip", clip(), params, folder, resize=how, interpolation="bilinear")
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        processor.do_normalize = False
        theirs = processor(images=[picture], return_tensors="np")["pixel_values"]
        program.signature["preprocessing"] = {**said, "resize": how, "interpolation": "bilinear"}
        ours = program.pixels([picture])
        assert np.abs(ours / 255 - theirs.transpose(0, 2, 3, 1)).max() < 2.5 / 255


@pytest.mark.parametrize("name", ["jpeg exif 6", "png xmp iTXt", "png alpha", "webp exif"])
def test_the_example_sees_upright_pixels_on_white(pair, name, monkeypatch):
    *_, program, _ = pair
    files = dict(odd_images.kinds()) | dict(odd_images.turned())
    with Image.open(io.BytesIO(files[name])) as opened:
        np.testing.assert_array_equal(
            program.pixels([opened]), program.pixels([upright_rgb(opened)])
        )
    crop = {**program.signature["preprocessing"], "resize": "crop"}
    monkeypatch.setitem(program.signature, "preprocessing", crop)
    with pytest.raises(ValueError, match="too long: crop it first"):
        program.pixels([Image.new("RGB", (10**7, 1))])


def test_functions_take_only_the_weights_they_need():
    module = clip()
    image, text = artifact_functions(module, random_params(module), Extras())
    assert {key.split("/")[0] for key in image.weights} == {"image", "image_projection"}
    assert {key.split("/")[0] for key in text.weights} == {"text", "text_projection"}
    assert artifacts.PLATFORMS == ("cpu", "cuda", "tpu")


def test_the_program_makes_rgb_of_odd_pictures_as_training_does():
    color = np.full((8, 8, 3), (200, 60, 20), np.uint8)
    color[:4] = (10, 10, 250)
    picture, exif = Image.fromarray(color), Image.Exif()
    exif[0x0112] = 3
    turned = io.BytesIO()
    picture.save(turned, "PNG", exif=exif)
    clear = picture.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((8, 8)))
    grey = Image.fromarray(np.full((8, 8), 0x4000, np.uint16))
    kinds = {"turned": Image.open(turned), "RGBA": clear, "LA": clear.convert("LA"), "grey": grey}
    for name, image in kinds.items():
        ours = np.asarray(upright_rgb(image))
        np.testing.assert_array_equal(np.asarray(run_stablehlo.rgb(image)), ours, name)
    assert np.asarray(run_stablehlo.rgb(grey)).max() == 0x40
