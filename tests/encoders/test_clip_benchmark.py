"""CLIP_benchmark's own command on a run of ours, over data that we wrote for it."""

import io
import json
import sys

import numpy as np
import odd_images
import PIL.Image
import pytest
import torch

from tools.perf import check_exports
from vlp_jax import evaluate
from vlp_jax.commands import clip_benchmark as command
from vlp_jax.commands import write_evaluation_tars
from vlp_jax.data.image_ops.upright import upright_rgb
from vlp_jax.encoders.clip_benchmark import _accuracy

pytest.importorskip("clip_benchmark")


def benchmark(workdir, root, output, *arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    status = command.main(
        ["eval", "--model", str(workdir), "--pretrained", "", "--dataset", "wds/mine"]
        + ["--dataset_root", str(root), "--output", str(output), "--num_workers", "0"]
        + ["--batch_size", "32", *arguments]
    )
    assert status == 0
    return json.loads(output.read_text())["metrics"]


def written(workdir, evaluator, folder, *arguments):
    argv = ["--workdir", workdir, "--evaluator", evaluator, "--output", folder, *arguments]
    assert write_evaluation_tars.main([str(a) for a in argv]) == 0


def test_zero_shot(workdir, tmp_path, monkeypatch, capsys):
    written(workdir, "zero_shot", tmp_path / "data", "--shard-examples", "7")
    scores = evaluate.evaluate(workdir, names=["zero_shot"])
    n = int(scores["eval/zero_shot/examples"])
    assert (tmp_path / "data/test/nshards.txt").read_text() == f"{-(-n // 7)}\n"
    assert len((tmp_path / "data/classnames.txt").read_text().splitlines()) == 48
    theirs = benchmark(
        workdir,
        tmp_path / "data",
        tmp_path / "out.json",
        "--task",
        "zeroshot_classification",
        "--no_amp",
        monkeypatch=monkeypatch,
    )
    # An image on the border of two classes may fall to the other: its file is decoded by Pillow.
    assert theirs["acc1"] == pytest.approx(scores["eval/zero_shot/top1"], abs=1.5 / n)
    assert theirs["acc5"] == pytest.approx(scores["eval/zero_shot/top5"], abs=1.5 / n)


@pytest.mark.slow
def test_retrieval(workdir, tmp_path, monkeypatch):
    written(workdir, "retrieval", tmp_path / "data")
    scores = evaluate.evaluate(workdir, names=["retrieval"])
    arguments = ("--task", "zeroshot_retrieval", "--recall_k", "5", "--no_amp")
    theirs = benchmark(
        workdir, tmp_path / "data", tmp_path / "out.json", *arguments, monkeypatch=monkeypatch
    )
    n = scores["eval/retrieval/pairs"]
    ours = scores["eval/retrieval/image_to_text_r5"]
    assert theirs["text_retrieval_recall@5"] == pytest.approx(ours, abs=2.5 / n)


def test_the_stand_in_counts_hits():
    logits = torch.tensor(np.random.default_rng(0).normal(size=(50, 9)))
    target = torch.arange(50) % 9
    order = np.argsort(-logits.numpy(), axis=1)
    for k, value in zip((1, 5), _accuracy(logits, target, (1, 5)), strict=True):
        assert value == pytest.approx((order[:, :k] == target.numpy()[:, None]).any(1).mean())


def test_mistakes(workdir, tmp_path, capsys):
    argv = ["--workdir", str(workdir), "--output", str(tmp_path / "x")]
    assert write_evaluation_tars.main([*argv, "--evaluator", "zeroshot"]) == 2
    assert "did you mean 'zero_shot'" in capsys.readouterr().err
    (tmp_path / "x" / "test").mkdir(parents=True)
    assert write_evaluation_tars.main([*argv, "--evaluator", "zero_shot"]) == 2
    assert "exists; name another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("jpeg", "jpg"),
        ("webp lossy", "webp"),
        ("jpeg xmp", "png"),
        ("png raw profile zTXt", "png"),
        ("png palette", "png"),
        ("gif", "png"),
    ],
)
def test_files_for_others_have_the_pixels_that_a_run_sees(name, suffix):
    """CLIP_benchmark and the libraries of `check_exports` turn no image and know no white."""
    data = {**dict(odd_images.kinds()), **dict(odd_images.turned())}[name]
    found, content = write_evaluation_tars.encoded(data)
    assert found == suffix and (content == data) == (name in ("jpeg", "webp lossy"))
    with PIL.Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(upright_rgb(opened))
    with PIL.Image.open(io.BytesIO(content)) as opened:
        np.testing.assert_array_equal(np.asarray(opened.convert("RGB")), expected)
    np.testing.assert_array_equal(np.asarray(check_exports.picture(data)), expected)
