"""The whole command: proof, record, card and scores of an export."""

import contextlib
import hashlib
import io
import json
import shutil
import sys

import numpy as np
import pytest
import runs
import transformers
from foreign import autoencoder, clip, siglip, vit
from huggingface_hub import ModelCard
from ml_collections import ConfigDict
from PIL import Image

import vlp_jax
from vlp_jax import evaluate, export
from vlp_jax.config import duration
from vlp_jax.handover import card, scores, verify
from vlp_jax.handover.foreign import check
from vlp_jax.observe.jsonl import JsonlWriter

PREPROCESS = {"choose_text": {"index": 0}, "lowercase": {}, "decode_image": {}}
PREPROCESS |= {"resize": {"size": 24}}


def command(*arguments):
    return export.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    """A CLIP run with pictures to retrieve, and scores that it has noted."""
    data, workdir = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("clip")
    rng = np.random.default_rng(0)
    rows = ["path,caption"]
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(data / f"{i}.png")
        rows.append(f"{i}.png,{runs.CAPTIONS[i]} {i}")
    (data / "captions.csv").write_text("\n".join(rows))
    config = runs.run_config(runs.CLIP, runs.SUBWORD, PREPROCESS)
    config = config.copy_and_resolve_references().unlock()
    config.data.update({"path": str(data), "split": "all"})
    config.mesh.replica = None  # all devices of the test
    section = {"name": "retrieval", "data": {}, "every": duration(percent=50.0)}
    config.evaluators = ConfigDict({"retrieval": section})
    runs.write_run(config.lock(), workdir)
    writer = JsonlWriter(workdir / "metrics.jsonl")
    writer.write_scalars(2, {"eval/retrieval/text_to_image_r1": 0.25, "eval/retrieval/pairs": 16})
    writer.write_scalars(2, {"train/loss": 1.0})
    writer.write_scalars(9, {"eval/retrieval/text_to_image_r1": 0.5})
    writer.close()
    return workdir


@pytest.fixture(scope="module")
def mae_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mae")
    runs.write_run(
        runs.run_config(runs.MAE, {}, {"decode_image": {}, "resize": {"size": 24}}), workdir
    )
    return workdir


def record_of(folder):
    return json.loads((folder / "export.json").read_text())


def run_example(card, folder, monkeypatch):
    """Runs the Python of a card as its reader does, inside the folder; returns what it prints."""
    (code,) = (part.split("```")[0] for part in card.split("```python\n")[1:])
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("run", None)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue()


def test_an_export_is_proved_recorded_and_described(clip_run, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "Mein Modell"
    license = ("--license", "apache-2.0")
    assert command("--workdir", clip_run, "--format", "hf", "--output", folder, *license) == 0
    assert "verified: transformers" in capsys.readouterr().out
    record = record_of(folder)
    assert record["verified"]["library"] == "transformers"
    assert 0 <= record["verified"]["max_difference"] < 1e-4
    assert record["source"] == {"workdir": clip_run.name, "step": 3, "params": "params"}
    assert record["scores"]["values"] == {"retrieval/text_to_image_r1": 0.25, "retrieval/pairs": 16}
    on_disk = {x.name for x in folder.iterdir()} - {"export.json"}
    assert record["files"].keys() == on_disk
    for name, said in record["files"].items():
        content = (folder / name).read_bytes()
        assert said == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert card.data.eval_results[0].metric_value == 0.25
    for fact in ("24 examples seen", "step 3", "| width | 32 | 32 |", "text_to_image_r1 | 0.2500"):
        assert fact in card.text, fact
    assert str(clip_run) not in card.text  # paths of this machine say nothing elsewhere
    assert "tensor" in run_example(card.text, folder, monkeypatch)


def test_what_rounding_costs_is_measured(clip_run, tmp_path, capsys):
    arguments = ("--workdir", clip_run, "--format", "safetensors", "--no-verify", "--output")
    assert command(*arguments, tmp_path / "new", "--weights", "int8") == 0
    out = capsys.readouterr().out
    assert "what the weights cost" in out and "retrieval/image_to_text_r1" in out
    assert "embed_text: least cosine" in out
    rounding = record_of(tmp_path / "new")["rounding"]
    assert all(0.9 < value < 1 - 1e-7 for value in rounding["least_cosine"].values())
    theirs = evaluate.evaluate(clip_run, None, None)
    for name, value in rounding["before"].items():
        assert theirs[f"eval/{name}"] == pytest.approx(value, abs=1e-6)
    assert rounding["after"].keys() == rounding["before"].keys()
    scored = record_of(tmp_path / "new")["scores"]
    assert scored["values"] == rounding["after"] and "int8" in scored["source"]
    assert command(*arguments, tmp_path / "b", "--weights", "bfloat16", "--no-evaluate") == 0
    assert "what the weights cost" not in capsys.readouterr().out
    assert "float32" in record_of(tmp_path / "b")["scores"]["source"]


def test_rounding_without_the_data_says_so(clip_run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(clip_run, copy)
    text = (copy / "config.json").read_text()
    path = json.loads(text)["data"]["path"]
    (copy / "config.json").write_text(text.replace(path, "/nowhere/at/all"))
    arguments = ("--workdir", copy, "--format", "safetensors", "--weights", "bfloat16")
    arguments += ("--no-verify",)
    assert command(*arguments, "--output", tmp_path / "a") == 0
    assert "could not be measured: " in capsys.readouterr().out
    assert command(*arguments, "--output", tmp_path / "b", "--evaluate") == 2
    assert "/nowhere/at/all" in capsys.readouterr().err and not (tmp_path / "b").exists()


@pytest.mark.parametrize("fault", ["number", "shape", "name", "nan"])
def test_a_library_that_computes_something_else(fault, clip_run, tmp_path, monkeypatch, capsys):
    def wrong(library, directory, inputs, what):
        made = {"image": np.zeros((3, 16)), "text": np.zeros((3, 16)), "logits": np.zeros((3, 3))}
        if fault == "shape":
            made["text"] = made["text"][:2]
        if fault == "name":
            made["pixels"] = made.pop("logits")
        if fault == "nan":
            made["image"][0] = np.nan
        return {"library": library, "version": "1.0"}, made

    monkeypatch.setattr(verify, "run_foreign", wrong)
    arguments = ("--workdir", clip_run, "--format", "hf", "--no-check", "--output")
    assert command(*arguments, tmp_path / "new") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: transformers 1.0") and list(tmp_path.iterdir()) == []


def test_a_library_that_does_not_load_it(tmp_path):
    (tmp_path / "run.py").write_text("raise ValueError('no such model')")
    with pytest.raises(verify.UserError, match="jax does not load .*: ValueError: no such model"):
        verify.run_foreign("jax", tmp_path, {"image": np.zeros(1)}, "stablehlo")


def test_a_library_that_is_not_installed_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(check.os, "environ", {})
    monkeypatch.setattr(check.sys, "meta_path", [])
    assert check.main("timm", str(tmp_path), "", "") == 0
    assert json.loads(capsys.readouterr().out) == {"skipped": "torch is not installed"}


def test_the_program_refuses_vlp_jax():
    with pytest.raises(ImportError, match="does without"):
        check.NoVlpJax().find_spec("vlp_jax.models")
    assert check.NoVlpJax().find_spec("vlp_jaxx") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--format", "stablehol"), "did you mean 'stablehlo'"),
        (("--dtype", "bfloat16"), "--dtype is of the computation in"),
        (("--weights", "int8"), "hf has no place for weights in int8"),
        (("--output", "{workdir}/models/mine"), "inside the run's folder"),
        (("--output", "{file}"), "is a file"),
    ],
)
def test_mistakes(change, message, clip_run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    value = change[1].format(workdir=clip_run, file=tmp_path / "file")
    arguments = {"--workdir": clip_run, "--format": "hf", "--output": tmp_path / "new"}
    arguments[change[0]] = value
    assert command(*(word for pair in arguments.items() for word in pair)) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert [x.name for x in tmp_path.iterdir()] == ["file"]
    assert not (clip_run / "models").exists()


def test_scores_of_the_nearest_step(clip_run, tmp_path):
    assert scores.noted(clip_run, 5).step == 2 and scores.noted(clip_run, 6).step == 9
    assert scores.noted(clip_run, 10**6).values == {"retrieval/text_to_image_r1": 0.5}
    assert scores.noted(tmp_path, 5) is None
    before = scores.Scores({"a/top1": 0.5, "a/chance": 0.1}, "x", 1)
    after = scores.Scores({"a/top1": 0.25, "a/chance": 0.1}, "y", 1)
    assert scores.table(before, after)[1:] == ["  a/top1   0.5000   0.2500  +0.2500"]


SIGLIP = {"length": 64}
SOFTMAX = {"text": SIGLIP, "logit_bias_init": None}


@pytest.mark.parametrize(
    ("format", "module", "architecture", "tag", "reason"),
    [
        ("hf", clip(), "CLIPModel", "zero-shot-image-classification", ""),
        ("hf_siglip", siglip(text=SIGLIP), "SiglipModel", "zero-shot-image-classification", ""),
        ("hf_siglip", siglip(), "SiglipModel", None, "to 64 tokens, and this model takes 9"),
        ("hf", siglip(**SOFTMAX), "SiglipModel", None, "this model was trained with a softmax"),
        ("hf_vit", vit(), "ViTModel", "image-feature-extraction", ""),
        ("hf_vit_mae", autoencoder(), "ViTMAEForPreTraining", None, "hides patches at random"),
        ("open_clip", siglip(), "", "zero-shot-image-classification", ""),
        ("timm", vit(), "", "image-feature-extraction", ""),
        *((format, clip(), "", None, "") for format in ("stablehlo", "safetensors", "big_vision")),
    ],
)
def test_a_card_names_the_pipelines_that_run_the_model(format, module, architecture, tag, reason):
    found, why = card.pipeline_of(format, module, architecture)
    assert found == tag and (reason in why if reason else why == "")


PIPELINES = {
    "clip": (runs.CLIP, runs.SUBWORD, {"lowercase": {}}),
    "canonical": (runs.CLIP, {**runs.SUBWORD, "context_length": 40}, {"canonicalize_text": {}}),
    "siglip 64": (runs.SIGLIP, {"name": "bytes", "context_length": 64}, {}),
    "siglip 20": (runs.SIGLIP, runs.BYTES, {}),
    "softmax 64": (
        {**runs.SIGLIP, "loss": "softmax"},
        {"name": "bytes", "context_length": 64},
        {"lowercase": {}},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_tagged_export_scores_in_the_pipeline_as_here(name, weights, tmp_path, capsys):
    objective, tokenizer, wording = PIPELINES[name]
    preprocess = {**wording, "decode_image": {}, "resize": {"size": 24}}
    runs.write_run(runs.run_config(objective, tokenizer, preprocess), tmp_path / "run")
    arguments = ("--workdir", tmp_path / "run", "--format", "hf", "--output", tmp_path / "out")
    assert command(*arguments, "--weights", weights, "--no-evaluate", "--no-verify") == 0
    tag = ModelCard.load(tmp_path / "out" / "README.md").data.pipeline_tag
    assert (tag is None) == ("note: no pipeline_tag" in capsys.readouterr().out)
    assert (tag is None) == (name in ("siglip 20", "softmax 64"))
    if tag is None:
        return
    labels, template = ["red Box", "Blue circle", "one"], "{}" if name == "clip" else "Look: a {}!"
    small = np.random.default_rng(4).integers(0, 256, (5, 7, 3), np.uint8)
    picture = Image.fromarray(small).resize((61, 40), Image.Resampling.BICUBIC)
    run = transformers.pipeline(tag, model=str(tmp_path / "out"))
    said = run(picture, candidate_labels=labels, hypothesis_template=template)
    theirs = {row["label"]: row["score"] for row in said}
    logits = vlp_jax.load(tmp_path / "run").logits([picture], [template.format(x) for x in labels])
    odds = np.exp(logits[0].astype(np.float64))
    ours = odds / (1 + odds) if "siglip" in name else odds / odds.sum()
    atol = 2e-3 if weights == "float32" else 0.03
    np.testing.assert_allclose([theirs[label] for label in labels], ours, atol=atol)


@pytest.mark.slow
def test_pipelines_of_image_towers(mae_run, tmp_path):
    picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (24, 24, 3), np.uint8))
    for format in ("hf_vit", "hf_vit_mae"):
        out = tmp_path / format
        assert (
            command("--workdir", mae_run, "--format", format, "--output", out, "--no-verify") == 0
        )
        run = transformers.pipeline("image-feature-extraction", model=str(out))
        first, second = (np.asarray(run(picture)) for _ in range(2))
        tag = ModelCard.load(out / "README.md").data.pipeline_tag
        assert np.array_equal(first, second) == (tag == "image-feature-extraction")
    row = np.asarray(
        transformers.pipeline("image-feature-extraction", str(tmp_path / "hf_vit"))(picture)
    )
    ours = vlp_jax.load(f"hf:{tmp_path / 'hf_vit'}").embed_image(picture)[0]
    np.testing.assert_allclose(row[0, 0] / np.linalg.norm(row[0, 0]), ours, atol=3e-3)


@pytest.mark.parametrize("format", ["hf", "open_clip", "timm"])
def test_a_card_says_what_becomes_of_transparency(format, clip_run, tmp_path):
    arguments = ("--workdir", clip_run, "--format", format, "--output", tmp_path / "out")
    assert command(*arguments, "--no-verify", "--no-check", "--no-evaluate") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "what is transparent is composited on white" in text
    assert "drops the alpha channel" in text or "drop the alpha channel" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "format"),
    [
        *(("clip_run", x) for x in ("open_clip", "stablehlo", "saved_model", "safetensors")),
        *(("clip_run", x) for x in ("timm", "hf_vit", "big_vision")),
        *(("mae_run", x) for x in ("hf", "hf_vit", "timm", "stablehlo", "saved_model")),
    ],
)
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_every_format_is_proved_and_its_card_works(
    run, format, weights, tmp_path, request, capsys, monkeypatch
):
    workdir = request.getfixturevalue(run)
    arguments = ("--workdir", workdir, "--format", format, "--weights", weights)
    status = command(*arguments, "--output", tmp_path / "new", "--no-evaluate")
    if status:
        error = capsys.readouterr().err
        assert "cannot be written as" in error and not (tmp_path / "new").exists()
        return
    proof = record_of(tmp_path / "new")["verified"]
    assert proof.get("max_difference", 1.0 * (format != "big_vision")) < 1e-4
    card = (tmp_path / "new" / "README.md").read_text()
    assert run_example(card, tmp_path / "new", monkeypatch)
