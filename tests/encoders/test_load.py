"""`vlp_jax.load`: what others compute from the same folder, from image files and texts on."""

import io
import resource
import subprocess
import sys
import zlib

import numpy as np
import odd_images
import open_clip
import PIL.Image
import pytest
import runs
import torch
import torchvision.transforms
import transformers
from etils import epath
from foreign import applied
from runs import CROP

import vlp_jax
from vlp_jax import export
from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.encoders import ImageProcessor
from vlp_jax.encoders import images as encoders_images
from vlp_jax.errors import UserError
from vlp_jax.interop.trees import plain
from vlp_jax.training import workdir as workdir_lib

SQUASH = {"resize": {"size": 24}}
TEXTS = ["A red circle on the Left", "a blue box", "Größe 42 <eos> <pad>", "one Box"]


@pytest.fixture(scope="module")
def pictures():
    """Of 61 x 40, 40 x 50 and 24 x 24 pixels, smooth as photographs are."""
    small = np.random.default_rng(4).integers(0, 256, (3, 5, 7, 3), np.uint8)
    sizes = [(61, 40), (40, 50), (24, 24)]
    return [
        PIL.Image.fromarray(x).resize(size, PIL.Image.Resampling.BICUBIC)
        for x, size in zip(small, sizes, strict=True)
    ]


def exported(workdir, format, folder):
    arguments = ("--workdir", workdir, "--format", format, "--output", folder, "--no-verify")
    assert export.main([str(a) for a in arguments]) == 0
    return folder


def unit(x):
    x = x.detach().numpy().astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def png(picture, **options):
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def pipeline_pixels(files, preprocess):
    """Files as a run's input has them."""
    data = {"source": "arrays", "arrays": {"image": files}}
    data["preprocess"] = {"decode_image": {}, **preprocess}
    return next(iter(EvalPipeline(data, None, batch_size=len(files)).batches()))["image"]


def test_a_folder_for_transformers(clip_run, pictures, tmp_path):
    folder = exported(clip_run[0], "hf", tmp_path / "out")
    ours = vlp_jax.load(f"hf:{folder}")
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text=TEXTS, images=pictures, return_tensors="pt", padding="max_length", truncation=True
    )
    out = model(**inputs)
    # Its fast image processor rounds what it has resized otherwise: by one of 255 at most.
    np.testing.assert_allclose(ours.embed_image(pictures), unit(out.image_embeds), atol=3e-3)
    np.testing.assert_allclose(ours.embed_text(TEXTS), unit(out.text_embeds), atol=1e-5)
    assert ours.logit_scale == pytest.approx(float(model.logit_scale.exp()), rel=1e-6)
    cosine = ours.embed_image(pictures) @ ours.embed_text(TEXTS).T
    np.testing.assert_allclose(ours.logits(pictures, TEXTS), ours.logit_scale * cosine, rtol=1e-5)
    assert np.ptp(cosine) > 0.05


def test_a_folder_for_open_clip(clip_run, pictures, tmp_path):
    folder = exported(clip_run[0], "open_clip", tmp_path / "out")
    ours = vlp_jax.load(f"open_clip:{folder}")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    images = torch.stack([transform(picture) for picture in pictures])
    model.eval()
    np.testing.assert_allclose(
        ours.embed_image(pictures), unit(model.encode_image(images)), atol=1e-5
    )
    np.testing.assert_allclose(ours.embed_text(TEXTS), unit(model.encode_text(tokens)), atol=1e-5)


def test_a_siglip_folder_has_its_bias(siglip_run, pictures, tmp_path):
    folder = exported(siglip_run[0], "hf", tmp_path / "out")
    ours, run = vlp_jax.load(f"hf:{folder}"), vlp_jax.load(siglip_run[0])
    model = transformers.SiglipModel.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text=TEXTS, images=pictures, return_tensors="pt", padding="max_length", truncation=True
    )
    out = model(**inputs)
    np.testing.assert_allclose(
        ours.logits(pictures, TEXTS), out.logits_per_image.detach().numpy(), atol=0.05
    )
    np.testing.assert_allclose(ours.embed_text(TEXTS), unit(out.text_embeds), atol=1e-5)
    np.testing.assert_allclose(run.logits(pictures, TEXTS), ours.logits(pictures, TEXTS), atol=1e-4)
    assert run.logit_bias == ours.logit_bias != 0


def test_a_run_embeds_as_its_objective_does_and_chooses_the_step(clip_run, pictures):
    workdir, objective, trees = clip_run
    model = vlp_jax.load(workdir)
    assert model.step == 7 and vlp_jax.load(workdir, step=3).step == 3
    pixels = pipeline_pixels([png(p) for p in pictures], CROP)
    tokens = model.tokenizer([text.lower() for text in TEXTS])
    rows = np.resize(tokens, (3, 12))
    for step in (3, 7):
        loaded = vlp_jax.load(workdir, step=step)
        out = applied(plain(objective.model), {"params": trees[step]}, pixels, rows)
        np.testing.assert_allclose(loaded.apply("embed_image", pixels), out["image"], atol=1e-5)
        # Pillow and TensorFlow round a resized pixel differently now and then.
        np.testing.assert_allclose(loaded.embed_image(pictures), out["image"], atol=1e-2)
    words = applied(plain(objective.model), {"params": trees[7]}, tokens, method="embed_text")
    np.testing.assert_allclose(model.embed_text(TEXTS), words, atol=1e-5)
    shouted = model.embed_text([text.upper() for text in TEXTS[:2]])
    np.testing.assert_allclose(shouted, model.embed_text(TEXTS[:2]), atol=1e-6)  # lowercase


def test_batches_do_not_matter_and_nothing_is_an_empty_array(clip_run, pictures):
    model = vlp_jax.load(clip_run[0])
    many = [pictures[i % 3] for i in range(11)]
    whole = model.embed_image(many)
    assert whole.shape == (11, 16) and whole.dtype == np.float32
    np.testing.assert_allclose(model.embed_image(iter(many), batch_size=4), whole, atol=1e-6)
    np.testing.assert_allclose(whole[:3], whole[3:6], atol=1e-6)
    assert model.embed_image([]).shape == (0, 16) and model.embed_text([]).shape == (0, 16)
    assert model.embed_text("a red box").shape == (1, 16)
    array = np.stack([np.asarray(p.resize((24, 24))) for p in pictures])
    np.testing.assert_allclose(model.embed_image(array), model.embed_image(list(array)), atol=1e-6)


def test_every_kind_of_image_is_the_same_image(clip_run, pictures, tmp_path):
    model, picture = vlp_jax.load(clip_run[0]), pictures[0]
    (tmp_path / "a.png").write_bytes(png(picture))
    kinds = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        png(picture),
        picture,
        np.asarray(picture),
    ]
    rows = model.embed_image(kinds)
    np.testing.assert_array_equal(rows, np.repeat(rows[:1], len(kinds), axis=0))


def odd_files(picture):
    """Files whose pixels are not simply RGB."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    alpha = picture.convert("RGBA")
    alpha.putalpha(PIL.Image.linear_gradient("L").resize(picture.size))
    grey16 = PIL.Image.fromarray(np.asarray(picture.convert("L"), np.uint16) * 257)
    jpeg = io.BytesIO()
    picture.convert("CMYK").save(jpeg, "JPEG", quality=100)
    return {
        "turned": png(picture, exif=exif),
        "alpha": png(alpha),
        "palette": png(picture.convert("P")),
        "grey": png(picture.convert("L")),
        "grey and alpha": png(alpha.convert("LA")),
        "16 bits": png(grey16),
        "cmyk": jpeg.getvalue(),
    }


@pytest.mark.parametrize("resize", [SQUASH, CROP], ids=["squash", "crop"])
def test_odd_images_become_the_pixels_that_a_run_sees(pictures, resize):
    files = odd_files(pictures[0])
    how = (
        {"resize": "squash"}
        if resize is SQUASH
        else {"resize": "crop", "interpolation": "bilinear"}
    )
    process = ImageProcessor((24, 24), **how)
    theirs = pipeline_pixels(list(files.values()), resize)
    for (name, file), expected in zip(files.items(), theirs, strict=True):
        difference = np.abs(process(file).astype(int) - expected.astype(int))
        # The two decoders convert CMYK by other tables.
        limit = {"cmyk": 4, "palette": 2}.get(name, 1)
        assert difference.max() <= limit, (name, difference.max())


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_crop_is_torchvisions_resize_and_center_crop(interpolation, monkeypatch):
    random = np.random.default_rng(0)
    method = getattr(torchvision.transforms.InterpolationMode, interpolation.upper())
    for size in (24, 33):
        theirs = torchvision.transforms.Compose(
            [
                torchvision.transforms.Resize(size, method),
                torchvision.transforms.CenterCrop(size),
            ]
        )
        process = ImageProcessor((size, size), "crop", interpolation)
        for width, height in [(size, size), (90, 7), (7, 90), (61, 40), (24, 50), (33, 25)] + [
            tuple(random.integers(5, 90, 2)) for _ in range(12)
        ]:
            picture = PIL.Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
            expected = np.asarray(theirs(picture)).astype(int)
            np.testing.assert_array_equal(process(picture), expected)
            with monkeypatch.context() as patch:  # as of an image too long to be resized whole
                patch.setattr(encoders_images, "_MAX_BETWEEN", 0)
                assert np.abs(process(picture) - expected).max() <= 1


def test_a_thin_image_takes_no_more_than_its_pixels():
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (4, 24_000, 3), np.uint8)
    for flat in (pixels, pixels.transpose(1, 0, 2)):
        picture, before = PIL.Image.fromarray(flat), peak()
        crop = ImageProcessor((224, 224), "crop")(picture)
        squash = ImageProcessor((224, 224), "squash")(picture)
        # The whole resized image would take 1,150 MiB.
        assert peak() - before < 200
        # 4 pixels become 224: a piece of a multiple of 4 about the middle has the same grid.
        middle = [
            slice((side - 40) // 2, (side + 40) // 2) if side > 4 else slice(4)
            for side in flat.shape[:2]
        ]
        expected = ImageProcessor((224, 224), "crop")(np.ascontiguousarray(flat[tuple(middle)]))
        assert np.abs(crop.astype(int) - expected).max() <= 1
        whole = picture.resize((224, 224), PIL.Image.Resampling.BICUBIC)
        assert np.abs(squash.astype(int) - np.asarray(whole)).max() <= 1


def test_a_long_image_is_averaged_before_it_is_squashed(monkeypatch):
    """Of one long enough, Pillow's table of weights alone would take gigabytes."""
    wide = PIL.Image.linear_gradient("L").resize((5000, 8)).convert("RGB")
    exact = ImageProcessor((24, 24))(wide).astype(int)
    monkeypatch.setattr(encoders_images, "_MAX_BETWEEN", 10**4)
    assert np.abs(ImageProcessor((24, 24))(wide) - exact).max() <= 2
    monkeypatch.undo()
    tall = PIL.Image.new("L", (1, 4_000_000), 200)
    assert (ImageProcessor((24, 24))(tall) == 200).all()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp"])
def test_a_header_that_promises_too_much_is_refused_by_load(kind):
    told = "cannot be read" if kind == "webp" else "too large"  # libwebp refuses by itself
    with pytest.raises(UserError, match=f"^the image (is )?{told}"):
        ImageProcessor((24, 24))(odd_images.large(kind))


def test_damaged_files_are_told_in_one_line():
    """Also where Pillow raises what is neither an OSError nor a ValueError."""
    process = ImageProcessor((24, 24))
    animated = dict(odd_images.kinds())["gif animated"]
    second = animated.index(b",", animated.index(b",") + 1)
    bomb = zlib.compress(b"0" * 2**22)
    for data in (
        animated[: second + 10],
        odd_images.with_chunk(png(PIL.Image.new("L", (9, 9))), b"zTXt", b"Comment\0\0" + bomb),
        odd_images.chunk(b"x", b"")[4:],
    ):
        with pytest.raises(UserError, match="^the image (is|cannot)") as caught:
            process(data)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not an image that can be read: its format is HEIC"):
        process(b"\0\0\0\x18ftypheic" + bytes(50))
    broken = odd_images.with_app1(dict(odd_images.kinds())["jpeg"], b"Exif\0\0nothing")
    assert process(broken).shape == (24, 24, 3)


def test_an_image_tower_alone_and_a_masked_autoencoder_take_no_texts(mae_run, tmp_path, pictures):
    model = vlp_jax.load(mae_run[0])
    rows = model.embed_image(pictures)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    with pytest.raises(UserError, match="takes no texts"):
        model.embed_text("a")
    with pytest.raises(UserError, match="no logits"):
        _ = model.logit_scale
    folder = exported(mae_run[0], "hf_vit", tmp_path / "vit")
    tower = vlp_jax.load(f"hf:{folder}")
    theirs = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    inputs = transformers.AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")
    expected = unit(theirs(**inputs).last_hidden_state[:, 0])
    np.testing.assert_allclose(tower.embed_image(pictures), expected, atol=3e-3)


def test_bfloat16_is_near_and_not_the_same(clip_run, pictures):
    exact, rough = (vlp_jax.load(clip_run[0], dtype=d) for d in ("float32", "bfloat16"))
    a, b = exact.embed_image(pictures), rough.embed_image(pictures)
    assert b.dtype == np.float32 and not np.array_equal(a, b)
    assert (a * b).sum(axis=1).min() > 0.99


def test_a_long_text_warns_and_loses_its_end(clip_run):
    model = vlp_jax.load(clip_run[0])
    long = "one two three four five six seven eight nine ten eleven twelve"
    with pytest.warns(
        UserWarning, match=r"text 1 has 62 tokens \(and 1 more\); the model reads the first 12"
    ):
        rows = model.embed_text(["a", long, long + " thirteen"])
    np.testing.assert_allclose(rows[1], rows[2], atol=1e-6)


def test_mistakes(clip_run, tmp_path):
    model = vlp_jax.load(clip_run[0])
    (tmp_path / "text.png").write_text("no image")
    torn = png(PIL.Image.new("RGB", (50, 50), "red"))[:60]
    wide = PIL.Image.new("RGB", (20_000, 9_000))
    cases = [
        (lambda: model.embed_text(["a", " "]), "text 1 is empty"),
        (lambda: model.embed_text([3]), "text 0 is of int"),
        (lambda: model.embed_image(tmp_path / "text.png"), r"text.png is not an image"),
        (lambda: model.embed_image([tmp_path / "none.png"]), "none.png is no file"),
        (lambda: model.embed_image([torn]), "image 0 (is damaged|cannot be read)"),
        (lambda: model.embed_image([wide]), r"20,000 x 9,000 pixels, more than"),
        (lambda: model.embed_image([3.5]), "of float"),
        (lambda: model.embed_image([np.zeros((4, 4, 3))]), r"float64\[4, 4, 3\]"),
        (lambda: model.embed_image([wide], batch_size=0), "batch_size"),
        (lambda: vlp_jax.load(tmp_path), "holds no run"),
        (lambda: vlp_jax.load(clip_run[0], step=4), "no checkpoint of step 4"),
        (lambda: vlp_jax.load("hff:x"), "did you mean 'hf'"),
        (lambda: vlp_jax.load("hf:x", step=3), "it has no steps"),
        (lambda: vlp_jax.load(clip_run[0], dtype="half"), "dtype='half'"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
    assert model.embed_image(PIL.Image.new("RGB", (20_000, 10))).shape == (1, 16)


def test_a_workdir_without_a_checkpoint(tmp_path):
    config = runs.run_config(runs.MAE, {}, {})
    workdir_lib.prepare(epath.Path(tmp_path), config, None)
    with pytest.raises(UserError, match="holds no checkpoint"):
        vlp_jax.load(tmp_path)


def test_importing_the_package_is_light():
    code = (
        "import sys, vlp_jax; assert 'jax' not in sys.modules; vlp_jax.load; "
        "print([m for m in ('tensorflow', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = vlp_jax.lod


def test_tokenizer_argument_of_files_without_one(clip_run, tmp_path):
    folder = exported(clip_run[0], "hf", tmp_path / "out")
    kept = (folder / "tokenizer.json").rename(tmp_path / "kept.json")
    with pytest.raises(UserError, match="has no tokenizer.json: name a tokenizer of 280 tokens"):
        vlp_jax.load(f"hf:{folder}")
    given, run = vlp_jax.load(f"hf:{folder}", tokenizer=str(kept)), vlp_jax.load(clip_run[0])
    np.testing.assert_allclose(given.embed_text(TEXTS), run.embed_text(TEXTS), atol=1e-5)


# Captions.

DECODER = {"variant": "mu", "width": 32, "depth": 1, "mlp_dim": 64, "heads": 2}


@pytest.fixture(scope="module")
def coca_run(tmp_path_factory):
    """A sum of contrast and captions, whose parameters are far from their start."""
    workdir = tmp_path_factory.mktemp("coca")
    image = {key: value for key, value in runs.CLIP["image"].items() if key != "pooling"}
    captions = {"name": "captioning", "image": {**image, "pooling": "cls"}, "decoder": DECODER}
    pixels = {key: runs.CLIP[key] for key in ("image_mean", "image_std") if key in runs.CLIP}
    section = {
        "name": "composite",
        "parts": {"pairs": runs.CLIP, "captions": {**captions, **pixels, "weight": 2.0}},
    }
    config = runs.run_config(section, runs.SUBWORD, {"lowercase": {}, "decode_image": {}, **CROP})
    objective, trees = runs.write_run(config, workdir)
    return workdir, objective, trees


def test_a_run_of_contrast_and_captions_embeds_and_says(coca_run, pictures):
    workdir, objective, trees = coca_run
    model = vlp_jax.load(workdir)
    assert model.embed_image(pictures).shape == model.embed_text(TEXTS[:3]).shape
    said = model.caption(pictures)
    assert len(said) == 3 and all(isinstance(text, str) for text in said)
    part = objective.parts()["captions"].objective
    pixels = np.stack([model.images(picture, "x") for picture in pictures])
    (params,) = trees.values()
    made = part.caption(params, pixels)
    assert said == model.tokenizer.decode(np.asarray(made.tokens))


def test_how_a_caption_is_chosen(coca_run, pictures):
    model = vlp_jax.load(coca_run[0])
    greedy = model.caption(pictures)
    assert model.caption(iter(pictures), batch_size=2) == greedy  # one by one, whatever the batch
    assert model.caption(pictures, beams=1, temperature=0.0) == greedy
    drawn = [model.caption(pictures, temperature=5.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert model.caption(pictures, prompt="A Box", length=2) == model.caption(
        pictures, prompt="a box", length=2
    )  # worded as the run words its texts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "box " * 40}, "leaves no room in the context of 12"),
        ({"beams": 2, "temperature": 1.0}, "drawn by a temperature or followed by beams, not both"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be in"),
        ({"beam": 2}, "'beam'"),
    ],
)
def test_settings_of_captions_that_are_none(coca_run, pictures, settings, message):
    with pytest.raises(UserError, match=message):
        vlp_jax.load(coca_run[0]).caption(pictures, **settings)


def test_a_model_that_says_nothing(clip_run, pictures):
    with pytest.raises(UserError, match="has no caption"):
        vlp_jax.load(clip_run[0]).caption(pictures)
