"""configs/finetune.py: model, tokenizer and preprocessing of weights, trained and given back."""

import csv
import shutil

import numpy as np
import pytest
import runs
import torch
import transformers
from etils import epath
from foreign import random_params, randomize, siglip, vit
from PIL import Image

import vlp_jax
from vlp_jax import config as config_lib
from vlp_jax import export, interop, train
from vlp_jax.data.tokenizers import ClipTokenizer, build_tokenizer
from vlp_jax.encoders.source_model import completed
from vlp_jax.errors import UserError
from vlp_jax.models.values import tower_fields
from vlp_jax.objectives import make_objective
from vlp_jax.training import workdir as workdir_lib

CONTEXT = 16
COLORS = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A folder that transformers has written: a CLIPModel of random weights, with all its files."""
    folder = tmp_path_factory.mktemp("clip")
    own = ClipTokenizer(ClipTokenizer.published(CONTEXT)._merges[:300], CONTEXT, "the merges")
    merges = [tuple(merge.split()) for merge in own._merges]
    tokenizer = transformers.CLIPTokenizer(vocab=dict(own._vocab), merges=merges)
    tower = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config={**tower, "hidden_size": 32, "image_size": 32, "patch_size": 8},
        text_config={
            **{**tower, "hidden_size": 24, "max_position_embeddings": CONTEXT},
            **{
                "vocab_size": own.vocab_size,
                "bos_token_id": own.bos_id,
                "eos_token_id": own.eos_id,
            },
        },
        projection_dim=20,
    )
    with torch.no_grad():
        randomize(transformers.CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures with a CSV of captions."""
    folder = tmp_path_factory.mktemp("pictures")
    with (folder / "captions.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("file", "caption"))
        for number in range(48):
            color = COLORS[number % 4]
            Image.new("RGB", (40 + number, 48), color).save(folder / f"{number}.png")
            rows.writerow((f"{number}.png", f"A {color} picture, number {number}"))
    return folder


def finetune(source, *assignments):
    config = config_lib.load("configs/finetune.py")
    config_lib.override(config, [f"init_from.source={source}", *assignments])
    return config


@pytest.mark.slow
def test_data_and_duration_are_all_that_is_left_to_say(clip_folder, pictures, tmp_path):
    source, run = f"hf:{shutil.copytree(clip_folder, tmp_path / 'source')}", tmp_path / "run"
    arguments = [
        *("--config", "configs/finetune.py", "--workdir", str(run)),
        *(f"--config.init_from.source={source}", f"--config.data.path={pictures}"),
        *("--config.batch_size=16", "--config.duration=2steps"),
    ]
    before = vlp_jax.load(source)
    assert train.main(arguments) == 0
    report = (run / "init_from.txt").read_text()
    assert f"start from {source}" in report and "fresh" not in report and "skipped" not in report
    metrics = (run / "metrics.jsonl").read_text()
    assert "eval/retrieval/image_to_text_r1" in metrics
    # The run goes on although its source is gone, by the model in its own config.
    shutil.rmtree(tmp_path / "source")
    assert train.main([a.replace("=2steps", "=3steps") for a in arguments]) == 0
    back = tmp_path / "back"
    command = ["--workdir", run, "--format", "hf", "--output", back, "--no-verify"]
    assert export.main([str(argument) for argument in command]) == 0

    texts = ["A red picture", "a GREEN one; and more"]
    after = vlp_jax.load(f"hf:{back}")
    np.testing.assert_array_equal(after.tokenizer(texts), before.tokenizer(texts))
    np.testing.assert_array_equal(vlp_jax.load(run).tokenizer(texts), before.tokenizer(texts))
    image = Image.radial_gradient("L").convert("RGB").resize((90, 50))
    np.testing.assert_array_equal(after.images(image), before.images(image))
    old, new = before.embed_text(texts), after.embed_text(texts)
    assert 0 < np.abs(old - new).max() < 0.05  # three steps with a small learning rate
    theirs = transformers.CLIPModel.from_pretrained(back).eval()
    rows = transformers.AutoTokenizer.from_pretrained(back)(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        features = theirs.get_text_features(**rows)
    features = getattr(features, "pooler_output", features).numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(new, features, atol=1e-4)


def test_the_sections_that_are_taken(clip_folder, tmp_path):
    config, _ = completed(finetune(f"hf:{clip_folder}"), epath.Path(tmp_path))
    image, text = config.objective.image, config.objective.text
    assert (image.patch_size, image.width, image.pooling, image.pre_norm) == (8, 32, "cls", True)
    assert (text.width, text.depth, text.activation) == (24, 2, "quick_gelu")
    assert config.image_size == 32 == image.image_size and config.objective.embed_dim == 20
    assert config.objective.loss == "softmax"
    assert config.tokenizer.context_length == CONTEXT
    for data in (config.data, config.evaluators.retrieval.data):
        resized = data.preprocess.resize_shortest_and_center_crop
        assert resized.size == 32 and resized.method == "bicubic"


def start_of(config, tmp_path):
    """What becomes of each parameter, by path."""
    from vlp_jax.observe.throughput import StartupClock
    from vlp_jax.training.build import build

    config, _ = completed(config, epath.Path(tmp_path))
    parts = build(config, epath.Path(tmp_path), StartupClock())
    return {fate.path: fate.kind for fate in parts.start.fates}, parts.setup


def test_overrides_are_adapted(clip_folder, pictures, tmp_path):
    usual = ("batch_size=16", f"data.path={pictures}")
    pooled = ("objective.image.pooling=map", "image_size=48", "data.preprocess.resize={}")
    fates, setup = start_of(finetune(f"hf:{clip_folder}", *usual, *pooled), tmp_path)
    assert fates["image/position_embedding"] == "resampled"
    assert {kind for path, kind in fates.items() if "/pooling/" in path} == {"fresh"}
    others = {kind for path, kind in fates.items() if "/pooling/" not in path}
    assert others == {"loaded", "resampled"}
    assert setup.batch_spec["image"].shape == (16, 48, 48, 3)
    assert "resize_shortest_and_center_crop" not in setup.config.data.preprocess


def test_another_objective_takes_the_tower(clip_folder, tmp_path):
    named = ("objective.name=classification", "objective.classes=4")
    config, _ = completed(finetune(f"hf:{clip_folder}", *named), epath.Path(tmp_path))
    assert config.objective.name == "classification" and config.objective.image.width == 32
    assert "text" not in config.objective or not config.objective.text
    assert config.objective.image_mean[0] == pytest.approx(0.4815, abs=1e-3)


def test_a_tower_alone_has_no_objective(tmp_path):
    module = vit(pooling="map", class_token=False)
    interop.write("timm", module, random_params(module), tmp_path / "timm")
    with pytest.raises(UserError, match="an image tower, which has no objective of its own: set"):
        completed(finetune(f"timm:{tmp_path / 'timm'}"), epath.Path(tmp_path))


def test_a_tokenizer_that_is_not_there(tmp_path):
    module = siglip()
    interop.write("hf_siglip", module, random_params(module), tmp_path / "siglip")
    with pytest.raises(UserError, match="name a tokenizer of 41 tokens"):
        completed(finetune(f"hf:{tmp_path / 'siglip'}"), epath.Path(tmp_path))


def test_without_a_source(tmp_path):
    config = config_lib.load("configs/finetune.py")
    with pytest.raises(UserError, match="config.init_from.source, which is not set: give a work"):
        completed(config, epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("kind", "format", "prefix"),
    [
        pytest.param("CLIP", None, "", marks=pytest.mark.slow),
        ("CLIP", "hf", "hf:"),
        pytest.param("CLIP", "open_clip", "open_clip:", marks=pytest.mark.slow),
        pytest.param("SIGLIP", "hf_siglip", "hf:", marks=pytest.mark.slow),
        ("SIGLIP", "big_vision", "big_vision:"),
        ("MAE", None, ""),
        pytest.param("MAE", "hf_vit_mae", "hf:", marks=pytest.mark.slow),
    ],
)
def test_the_model_of_a_run_comes_back_by_every_way(kind, format, prefix, tmp_path):
    """Written as a run and given to others, taken from there, it is the same model."""
    tokenizer = {} if kind == "MAE" else runs.SUBWORD
    squash = {"decode_image": {}, "resize": {"size": 24, "method": "bilinear"}}
    run = runs.run_config(getattr(runs, kind), tokenizer, squash)
    objective, _ = runs.write_run(run, tmp_path / "run")
    folder = tmp_path / "run"
    if format is not None:
        folder = tmp_path / "out"
        words = ["--workdir", tmp_path / "run", "--format", format, "--output", folder]
        assert export.main([str(word) for word in words] + ["--no-verify"]) == 0
    source = f"{prefix}{folder}"
    given = []
    if format == "big_vision":  # a file without config or tokenizer
        given = ["tokenizer.name=subword", "tokenizer.context_length=12", "tokenizer.file=X"]
        source = f"{prefix}{folder}/model.npz"
    config, _ = completed(finetune(source, *given), epath.Path(tmp_path / "new"))
    kept = workdir_lib.open_kept_tokenizer(tmp_path / "run", run)
    model = make_objective(config.objective, kept).model
    for name, tower in objective.model.towers().items():
        ours, theirs = tower_fields(model.towers()[name]), tower_fields(tower)
        assert ours == {**theirs, "pad_id": ours.get("pad_id")} or ours == theirs, name
    assert model.pixels == objective.model.pixels and type(model) is type(objective.model)
    assert config.image_size == 24
    if format != "big_vision":
        assert config.data.preprocess.resize.to_dict() == {"method": "bilinear", "size": 24}
    if tokenizer and not given:
        ours = build_tokenizer(config.tokenizer, lambda: (), None)
        texts = ["A red circle on the left", "Blue box"]
        np.testing.assert_array_equal(ours(texts), kept(texts))
