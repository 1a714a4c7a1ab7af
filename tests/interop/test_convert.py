"""Weights from one project's files to another's, with tokenizer and image processor."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import runs
import timm
import transformers
from foreign import assert_close, clip, images, pixels, random_params, siglip, vit

from vlp_jax import interop
from vlp_jax.commands import convert
from vlp_jax.data.tokenizers import train_subword
from vlp_jax.interop.hf_tokenizer import TokenizerFiles
from vlp_jax.models.values import Pixels

ROOT = Path(__file__).resolve().parents[2]


def command(source, target, *more):
    return convert.main(["--from", str(source), "--to", str(target), *map(str, more)])


@pytest.fixture(scope="module")
def tokenizer():
    return train_subword(runs.CAPTIONS, vocab_size=280, context_length=9)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, tokenizer):
    """A CLIPModel of the tokenizer's vocabulary that cuts the middle out of its images."""
    folder = tmp_path_factory.mktemp("clip")
    module = clip(dict(activation="gelu"), dict(vocab=tokenizer.vocab_size, eos_id=1))
    ids = dict(bos_id=2, eos_id=1, pad_id=0)
    files = TokenizerFiles.from_json(tokenizer.to_json(False), context_length=9, **ids)
    extras = dict(resize="crop", interpolation="bilinear", tokenizer=files, **ids)
    interop.write("hf_clip", module, random_params(module), folder, **extras)
    return folder


def test_there_and_back_is_the_same(clip_folder, tmp_path, capsys):
    assert command(f"hf:{clip_folder}", f"open_clip:{tmp_path}/oc") == 0
    assert "note" not in capsys.readouterr().out
    assert command(f"open_clip:{tmp_path}/oc", f"hf_clip:{tmp_path}/back") == 0
    for name in ("model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (clip_folder / name).read_bytes(), name
    processing = json.loads((tmp_path / "oc" / "open_clip_config.json").read_text())
    assert processing["preprocess_cfg"]["resize_mode"] == "shortest"
    assert processing["preprocess_cfg"]["interpolation"] == "bilinear"


def test_the_result_tokenizes_and_computes_the_same(clip_folder, tmp_path, tokenizer):
    assert command(f"hf_clip:{clip_folder}", f"open_clip:{tmp_path}/oc") == 0
    texts = ["a red circle", "a box on the floor on the floor on the floor"]
    name = f"local-dir:{tmp_path}/oc"
    ids = open_clip.get_tokenizer(name)(texts)
    np.testing.assert_array_equal(ids.numpy(), tokenizer(texts))
    model = open_clip.create_model(name).eval()
    theirs = transformers.CLIPModel.from_pretrained(clip_folder)
    inputs = pixels(images(theirs.config.vision_config.image_size))
    out = theirs(input_ids=ids, pixel_values=inputs)
    assert_close(model.encode_text(ids, normalize=True), out.text_embeds)
    assert_close(model.encode_image(inputs, normalize=True), out.image_embeds)


def test_a_tower_alone_takes_its_pixels_along(clip_folder, tmp_path, capsys):
    assert command(f"hf_clip:{clip_folder}", f"timm:{tmp_path}/timm") == 0
    assert "left out: image_projection, logit_scale, text" in capsys.readouterr().out
    config = json.loads((clip_folder / "preprocessor_config.json").read_text())
    tower = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval()
    assert list(tower.pretrained_cfg["mean"]) == config["image_mean"]
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    inputs = pixels(images(model.config.vision_config.image_size))
    assert_close(tower(inputs), model.vision_model(inputs).pooler_output)


def test_of_siglip_from_big_vision_needs_a_tokenizer(tmp_path, capsys):
    module = siglip(pixels=Pixels())
    interop.write("big_vision", module, random_params(module), tmp_path / "bv")
    assert command(f"big_vision:{tmp_path}/bv", f"hf_siglip:{tmp_path}/hf") == 0
    assert "no files of a tokenizer" in capsys.readouterr().out
    assert command(f"hf_siglip:{tmp_path}/hf", f"big_vision:{tmp_path}/again") == 0
    before, after = (np.load(tmp_path / name / "model.npz") for name in ("bv", "again"))
    assert before.files == after.files
    for key in before.files:
        np.testing.assert_array_equal(before[key], after[key], key)


def test_a_file_without_config_needs_a_model_like_it(clip_folder, tmp_path, capsys):
    assert command(f"hf:{clip_folder}", f"open_clip:{tmp_path}/oc") == 0
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tmp_path / "oc" / "open_clip_model.safetensors", bare / "weights.safetensors")
    source = f"open_clip:{bare}/weights.safetensors"
    assert command(source, f"hf_clip:{tmp_path}/new") == 2
    assert "open_clip_config.json" in capsys.readouterr().err
    assert command(source, f"hf_clip:{tmp_path}/new", "--like", f"hf:{clip_folder}") == 0
    new = (tmp_path / "new" / "model.safetensors").read_bytes()
    assert new == (clip_folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("hf:/nowhere", "hf_clip:{tmp}/x", "/nowhere does not exist"),
        ("{clip}", "hf_clip:{tmp}/x", "named FORMAT:PATH"),
        ("hf:{clip}", "{tmp}/x", "--to is FORMAT:DIR"),
        ("hf:{clip}", "hf_clap:{tmp}/x", "did you mean 'hf_clip'"),
        ("hf:{clip}", "hf_siglip:{tmp}/x", "image.pooling 'map', not 'cls'"),
        ("hf:{clip}", "hf_clip:{clip}", "is not empty"),
        ("hf_siglip:{clip}", "hf_siglip:{tmp}/x", "model_type 'clip'"),
    ],
)
def test_mistakes_end_with_a_message(source, target, message, clip_folder, tmp_path, capsys):
    words = (word.format(clip=clip_folder, tmp=tmp_path) for word in (source, target))
    assert command(*words) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_runs_as_a_script_without_tensorflow(tmp_path):
    interop.write("timm", vit(), random_params(vit()), tmp_path / "timm")
    words = ["convert.py", "--from", f"timm:{tmp_path}/timm", "--to", f"timm:{tmp_path}/again"]
    code = (
        "import sys, runpy\n"
        f"sys.argv = {words!r}\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'tools' / 'convert.py')!r}, run_name='__main__')\n"
        "finally:\n"
        "    assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = (tmp_path / n / "model.safetensors" for n in ("timm", "again"))
    assert before.read_bytes() == after.read_bytes()
