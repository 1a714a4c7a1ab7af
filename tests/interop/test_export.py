"""A run's model in other people's hands: weights, texts and images as their libraries take them."""

import dataclasses
import io
import json

import jax
import numpy as np
import open_clip
import PIL.Image
import pytest
import runs
import timm
import torch
import transformers
from foreign import applied, assert_close, pixels
from runs import CROP, SQUASH

from vlp_jax import export, interop
from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.data.tokenizers import ByteTokenizer, SubwordTokenizer
from vlp_jax.interop.trees import plain
from vlp_jax.models.masking import mask_from_noise
from vlp_jax.training import run as run_lib

TEXTS = ["A red circle on the Left", "", "Größe 42 <eos> <pad>", "a very long text " * 30]


def command(*arguments):
    """Without the proof in a process of its own, which tests/handover looks at."""
    return export.main([*(str(argument) for argument in arguments), "--no-verify"])


@pytest.fixture(scope="module")
def pictures():
    """Two of 61 x 40 and 40 x 50 pixels, smooth as photographs are."""
    small = np.random.default_rng(4).integers(0, 256, (2, 5, 7, 3), np.uint8)
    return [
        PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC)
        for pixels, size in zip(small, [(61, 40), (40, 50)], strict=True)
    ]


def prepared(pictures, preprocess):
    """The pictures as a run with this preprocessing has them, uint8 [2, 24, 24, 3]."""
    files = [io.BytesIO() for _ in pictures]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file, "PNG")
    data = {"source": "arrays", "arrays": {"image": [file.getvalue() for file in files]}}
    data["preprocess"] = {"decode_image": {}, **preprocess}
    pipeline = EvalPipeline(data, None, batch_size=2, process_index=0, process_count=1)
    return next(iter(pipeline.batches()))["image"]


def ours(objective, tree, image, texts):
    """Unit vectors of images and texts, and the logits of every pair."""
    out = jax.jit(objective.model.apply)({"params": tree}, image, texts)
    out = jax.tree.map(np.asarray, out)
    logits = np.exp(out["logit_scale"]) * out["image"] @ out["text"].T + out["logit_bias"]
    return out["image"], out["text"], logits


@pytest.mark.parametrize("step", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_clip_run_as_hugging_face_takes_it(step, clip_run, tmp_path, pictures, capsys):
    workdir, objective, trees = clip_run
    chosen = [] if step == 7 else ["--step", step]
    assert command("--workdir", workdir, "--format", "hf", "--output", tmp_path, *chosen) == 0
    assert f'CLIPModel.from_pretrained("{tmp_path}")' in capsys.readouterr().out
    model = transformers.CLIPModel.from_pretrained(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    tokenizer = SubwordTokenizer.load(workdir / "tokenizer.json", 12)
    ids = tokenizer([text.lower() for text in TEXTS])
    theirs = processor(
        text=TEXTS, images=pictures, return_tensors="pt", padding="max_length", truncation=True
    )
    np.testing.assert_array_equal(theirs["input_ids"].numpy(), ids)
    image = prepared(pictures, CROP)
    mean, std = objective.model.pixels.mean, objective.model.pixels.std
    expected = np.asarray(objective.model.pixels.normalize(image)).transpose(0, 3, 1, 2)
    assert np.abs(theirs["pixel_values"].numpy() - expected).max() < 2.5 / 255 / min(std)
    theirs["pixel_values"] = pixels(image, mean, std)
    out = model(**theirs)
    image, text, logits = ours(objective, trees[step], image, ids)
    assert_close(out.image_embeds, image)
    assert_close(out.text_embeds, text)
    assert_close(out.logits_per_image, logits)


def test_clip_run_as_open_clip_takes_it(clip_run, tmp_path, pictures):
    workdir, objective, trees = clip_run
    assert command("--workdir", workdir, "--format", "open_clip", "--output", tmp_path) == 0
    name = f"local-dir:{tmp_path}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = SubwordTokenizer.load(workdir / "tokenizer.json", 12)
    texts = [text.strip() for text in TEXTS]  # open_clip strips
    ids = tokenizer([text.lower() for text in texts])
    np.testing.assert_array_equal(open_clip.get_tokenizer(name)(texts).numpy(), ids)
    image = prepared(pictures, CROP)
    mean, std = objective.model.pixels.mean, objective.model.pixels.std
    expected = np.asarray(objective.model.pixels.normalize(image)).transpose(0, 3, 1, 2)
    theirs = torch.stack([transform(picture) for picture in pictures]).numpy()
    assert np.abs(theirs - expected).max() < 2.5 / 255 / min(std)
    features, words, scale = model.eval()(pixels(image, mean, std), torch.from_numpy(ids))[:3]
    image, text, logits = ours(objective, trees[7], image, ids)
    assert_close(features, image)
    assert_close(words, text)
    assert_close(scale * features @ words.T, logits)


def test_siglip_run_of_bytes_as_hugging_face_takes_it(siglip_run, tmp_path, pictures):
    workdir, objective, trees = siglip_run
    assert command("--workdir", workdir, "--format", "hf_siglip", "--output", tmp_path) == 0
    model = transformers.AutoModel.from_pretrained(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    theirs = processor(
        text=TEXTS, images=pictures, return_tensors="pt", padding="max_length", truncation=True
    )
    ids = ByteTokenizer(20)(TEXTS)
    np.testing.assert_array_equal(theirs["input_ids"].numpy(), ids)
    assert "attention_mask" not in theirs  # it would hide the padding that the text is pooled at
    image = prepared(pictures, SQUASH)
    assert np.abs(theirs["pixel_values"].numpy() - pixels(image, 0.5, 0.5).numpy()).max() < 0.02
    theirs["pixel_values"] = pixels(image, 0.5, 0.5)
    image, text, logits = ours(objective, trees[3], image, ids)
    out = model(**theirs)
    assert_close(out.image_embeds, image)
    assert_close(out.text_embeds, text)
    assert_close(out.logits_per_image, logits)


def test_mae_run_with_its_decoder_and_without(mae_run, tmp_path, capsys):
    workdir, objective, trees = mae_run
    assert command("--workdir", workdir, "--format", "hf_vit_mae", "--output", tmp_path / "a") == 0
    model = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "a")
    assert model.config.norm_pix_loss is True and model.config.mask_ratio == 0.6
    image = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
    noise = np.random.default_rng(1).random((2, 9), np.float32)
    mean, std = objective.model.pixels.mean, objective.model.pixels.std
    with_mask = mask_from_noise(noise, int(9 * (1 - 0.6)))
    expected = applied(objective.model, {"params": trees[3]}, image, with_mask)
    theirs = model.eval()(pixels(image, mean, std), noise=torch.from_numpy(noise))
    assert_close(theirs.logits, expected)
    for format in ("hf_vit", "timm"):
        folder = tmp_path / format
        assert command("--workdir", workdir, "--format", format, "--output", folder) == 0
        assert "left out: decoder" in capsys.readouterr().out
    expected = applied(objective.model, {"params": trees[3]}, image, method="encode")
    tower = transformers.ViTModel.from_pretrained(tmp_path / "hf_vit", add_pooling_layer=False)
    inputs = pixels(image, mean, std)
    assert_close(tower(inputs).last_hidden_state, expected)
    tower = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True)
    assert_close(tower.eval().forward_features(inputs), expected)
    assert tower.pretrained_cfg["mean"] == tuple(mean) or tower.pretrained_cfg["mean"] == list(mean)


def test_part_of_a_composite(tmp_path):
    parts = {"pairs": {**runs.CLIP, "weight": 2.0, "dtype": "bfloat16"}}
    image = {k: v for k, v in runs.CLIP["image"].items() if k != "pooling"}
    parts["painting"] = {**runs.MAE, "image": {**image, "position": "learned"}}
    config = runs.run_config(
        {"name": "composite", "parts": parts}, runs.SUBWORD, {"decode_image": {}, **SQUASH}
    )
    objective, trees = runs.write_run(config, tmp_path / "run")
    arguments = ("--workdir", tmp_path / "run", "--format")
    assert command(*arguments, "hf_clip", "--output", tmp_path / "clip") == 0
    model = transformers.CLIPModel.from_pretrained(tmp_path / "clip")
    image = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
    part = objective.parts()["pairs"].objective
    expected = applied(
        plain(part.model),  # in float32, as the others compute
        {"params": {k: v for k, v in trees[3].items() if k != "decoder"}},
        image,
        method="embed_image",
    )
    features = model.vision_model(pixels(image, part.model.pixels.mean, 0.5)).pooler_output
    features = model.visual_projection(features)
    assert_close(features / features.norm(dim=-1, keepdim=True), expected)
    for wrong, part in (("hf_clip", "painting"), ("hf_clip", "pears")):
        output = tmp_path / "not"
        assert command(*arguments, wrong, "--output", output, "--part", part) == 2
        assert not output.exists()


def test_scale_above_its_bound_is_written_as_the_loss_saw_it():
    objective = type("Bounded", (), {"max_logit_scale": 100.0})()
    wild = run_lib.bounded(objective, {"logit_scale": np.float32(5.0), "x": np.ones(2)})
    np.testing.assert_allclose(np.exp(wild["logit_scale"]), 100.0, rtol=1e-6)
    tame = run_lib.bounded(objective, {"logit_scale": np.float32(2.0)})
    assert tame["logit_scale"] == 2.0
    objective.max_logit_scale = 0.0
    assert run_lib.bounded(objective, {"logit_scale": np.float32(5.0)})["logit_scale"] == 5.0


def test_what_a_run_says_of_its_images():
    def said(preprocess, evaluator=None):
        notes = []
        config = runs.run_config(runs.CLIP, runs.SUBWORD, preprocess).copy_and_resolve_references()
        if evaluator is not None:
            config.unlock().evaluators = {"retrieval": {"data": {"preprocess": evaluator}}}
        return run_lib.resizing(config, notes), notes

    crop = {"random_resized_crop": {"size": 24}}
    assert said({"resize": {"size": 24, "method": "bilinear"}}) == (
        {"resize": "squash", "interpolation": "bilinear"},
        [],
    )
    assert said(crop, CROP)[0] == {"resize": "crop", "interpolation": "bilinear"}
    assert said({"resize": {"size": 24}}, CROP)[0]["resize"] == "crop"  # what it is evaluated on
    settings, (note,) = said(crop)
    assert settings == {} and "--resize" in note
    settings, notes = said({"resize": {"size": 24, "method": "lanczos3", "antialias": False}})
    assert settings == {"resize": "squash"} and len(notes) == 2


@pytest.mark.parametrize(
    ("choice", "part"), [("params", "params"), ("ema", "ema"), ("auto", "ema")]
)
def test_the_parameters_or_their_average_are_written(choice, part, clip_run, tmp_path, capsys):
    workdir, _, trees = clip_run
    arguments = ("--workdir", workdir, "--format", "hf", "--output", tmp_path, "--no-check")
    assert command(*arguments, "--params", choice) == 0
    assert f"{workdir}, {part} of step 7" in capsys.readouterr().out
    scale = float(transformers.CLIPModel.from_pretrained(tmp_path).logit_scale)
    # The run has perturbed the average, and left the parameters as they were initialized.
    average, first = float(trees[7]["logit_scale"]), np.log(1 / 0.07)
    assert abs(average - first) > 1e-3
    assert scale == pytest.approx(average if part == "ema" else first, abs=1e-6)


def test_command_line_overrides_the_run(clip_run, tmp_path):
    settings = ("--resize", "squash", "--interpolation", "bicubic")
    arguments = ("--workdir", clip_run[0], "--format", "hf_clip", "--output", tmp_path)
    assert command(*arguments, *settings) == 0
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (config["do_center_crop"], config["resample"]) == (False, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--format", "hf_clop"), "did you mean 'hf_clip'"),
        (
            ("--format", "hf_siglip"),
            "cannot be written as hf_siglip: SiglipModel has image.pooling",
        ),
        (("--step", "5"), "no checkpoint of step 5 (it has: 3, 7)"),
        (("--workdir", "/nowhere/at/all"), "holds no run"),
        (("--part", "text"), "--part"),
        (("--output", "gs://bucket/model"), "local folder"),
    ],
)
def test_mistakes_end_with_a_message_and_no_files(change, message, clip_run, tmp_path, capsys):
    arguments = {"--workdir": clip_run[0], "--format": "hf_clip", "--output": tmp_path / "new"}
    arguments |= {change[0]: change[1]}
    assert command(*(word for pair in arguments.items() for word in pair)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert not (tmp_path / "new").exists()


def test_a_folder_with_files_is_left_alone(clip_run, tmp_path, capsys):
    (tmp_path / "config.json").write_text("mine")
    arguments = ("--workdir", clip_run[0], "--format", "hf_clip", "--output", tmp_path)
    assert command(*arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "mine"
    assert command(*arguments, "--overwrite", "--no-check") == 0
    assert transformers.CLIPConfig.from_pretrained(tmp_path).projection_dim == 16


def test_a_result_that_computes_something_else_is_an_error(clip_run, tmp_path, monkeypatch, capsys):
    right = interop.FORMATS["hf_clip"]

    def wrong(module, params, directory, extras):
        return right.write(module, {**params, "logit_scale": np.float32(1)}, directory, extras)

    faulty = dataclasses.replace(right, write=wrong)
    monkeypatch.setitem(interop.FORMATS, "hf_clip", faulty)
    arguments = ("--workdir", clip_run[0], "--format", "hf_clip", "--output", tmp_path / "new")
    assert command(*arguments) == 2
    assert "computes something else" in capsys.readouterr().err
