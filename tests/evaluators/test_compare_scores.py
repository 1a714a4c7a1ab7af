"""Embeddings are saved whole, and tools.compare_scores comes to the same scores from them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from toy_models import CLASS_NAMES, CLASSES, make_resources, make_world

from vlp_jax.commands import compare_scores
from vlp_jax.evaluators import make_evaluators
from vlp_jax.evaluators.saved import save_embeddings

ROOT = Path(__file__).resolve().parents[2]
TRAIN_SIZE = 90
SECTIONS = {
    "zero_shot": {"name": "zero_shot", "class_names": CLASS_NAMES, "templates": ("a {}", "{}!")},
    "retrieval": {"name": "retrieval"},
    "sweep": {"name": "linear_probe", "grid": (300.0, 1e4)},
    "sgd": {"name": "linear_probe", "method": "sgd", "epochs": 2, "batch_size": 30},
    "knn": {"name": "knn"},
    "few_shot": {"name": "few_shot", "shots": (1, 3), "seeds": 2},
    "geometry": {"name": "geometry"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    world, rng = make_world(), np.random.default_rng(1)
    train = {
        "image": rng.integers(0, 256, (TRAIN_SIZE, 4, 4, 3)).astype(np.uint8),
        "label": (np.arange(TRAIN_SIZE) % CLASSES).astype(np.int32),
    }
    world.arrays["text"][5] = world.arrays["text"][11]  # a caption that occurs twice
    sections = {key: dict(section) for key, section in SECTIONS.items()}
    for key in ("sweep", "sgd", "knn", "few_shot"):
        sections[key]["train_data"] = {"arrays": train}
    data = {"source": "arrays", "arrays": world.arrays}
    folder, scores = tmp_path_factory.mktemp("embeddings"), {"step": 3.0}
    for key, evaluator in make_evaluators(sections, data, make_resources()).items():
        outcome = evaluator.outcome(world.params)
        save_embeddings(outcome, folder / f"{key}.npz")
        scores |= {f"eval/{key}/{name}": value for name, value in outcome.scores().items()}
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


def test_every_score_is_computed_again(saved, capsys):
    arguments = ["--embeddings", str(saved)]
    assert compare_scores.main(arguments) == 0, capsys.readouterr().out
    assert compare_scores.main([*arguments, "--scores", str(saved / "scores.json")]) == 0
    output = capsys.readouterr().out
    for score in ("zero_shot/calibration_error", "retrieval/image_to_text_mrr", "knn/top1_k20"):
        assert score in output
    assert "nobody" not in output and "equals in random order" in output


def test_another_score_fails(saved, tmp_path, capsys):
    scores = json.loads((saved / "scores.json").read_text())
    scores["eval/zero_shot/nll"] += 2e-6
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    arguments = ["--embeddings", str(saved), "--scores", str(tmp_path / "scores.json")]
    assert compare_scores.main(arguments) == 1
    assert "largest difference 2.0e-06" in capsys.readouterr().out


def test_mistakes(saved, tmp_path, capsys):
    assert compare_scores.main(["--embeddings", str(tmp_path)]) == 2
    assert "there is no .npz" in capsys.readouterr().err
    np.savez(tmp_path / "x.npz", image=np.zeros(3))
    assert compare_scores.main(["--embeddings", str(tmp_path)]) == 2
    assert "not written by save_embeddings" in capsys.readouterr().err
    (tmp_path / "scores.json").write_text('{"eval/zero_shoot/top1": 1}')
    arguments = ["--embeddings", str(saved), "--scores", str(tmp_path / "scores.json")]
    assert compare_scores.main(arguments) == 2
    assert "unknown key 'few_shot'" in capsys.readouterr().err


def test_the_tool_shares_no_code_with_the_evaluators():
    code = (
        "import sys, vlp_jax.commands.compare_scores; "
        "print([m for m in sys.modules if m.startswith('vlp_jax.evaluators') or m == 'jax'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_file_is_read_without_vlp_jax(saved):
    with np.load(saved / "zero_shot.npz", allow_pickle=False) as arrays:
        assert arrays["image"].shape[0] == len(arrays["labels"]) == len(arrays["index"])
        assert arrays["class_names"].tolist() == list(CLASS_NAMES)
        assert arrays["class_embeddings"].shape[0] == CLASSES and arrays["logit_scale"] == 7
