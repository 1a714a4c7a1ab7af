"""One config trained here and in open_clip."""

import json

import numpy as np
import pytest
import torch
from test_clip_folder import make_folder

from tools.perf import compare_open_clip
from vlp_jax import config as config_lib
from vlp_jax.errors import UserError


def test_the_table_has_means_and_ends():
    def runs(*values):
        return [{**dict.fromkeys(compare_open_clip.SCORES, v), "chance_r1": 0.02} for v in values]

    text = compare_open_clip.table({"vlp_jax": runs(0.1, 0.2, 0.6), "open_clip": runs(0.3)})
    _, _, ours, theirs, chance = text.splitlines()
    assert "0.3000 (0.1000 to 0.6000)" in ours and "0.3000 (0.3000 to 0.3000)" in theirs
    assert chance.count("0.0200") == 2 and chance.count("0.2000") == 2


def test_weight_decay_is_of_matrices_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model.register_parameter("logit_scale", torch.nn.Parameter(torch.ones(())))
    plain, decayed = compare_open_clip.decayed(model, 0.3)
    assert plain["weight_decay"] == 0 and len(plain["params"]) == 4
    assert decayed["weight_decay"] == 0.3 and decayed["params"][0] is model[0].weight


def test_other_optimizers_are_refused(tmp_path):
    config = config_lib.load("clip_folder").unlock()
    config.optimizer.name = "muon"
    with pytest.raises(UserError, match="optimizer.name=adamw"):
        compare_open_clip.checked(config, "retrieval")
    with pytest.raises(UserError, match="no retrieval evaluator"):
        compare_open_clip.checked(config, "loss")


@pytest.mark.slow
def test_both_sides_learn_from_the_same_batches(tmp_path, capsys):
    folder = tmp_path / "pictures"
    make_folder(folder, 300, (40, 80))
    settings = [f"data.path={folder}", "optimizer.name=adamw", "batch_size=32", "log.every.steps=5"]
    settings += ["duration.epochs=None", "duration.steps=60", "tokenizer.vocab_size=400"]
    arguments = ["--output", str(tmp_path / "out"), "--seeds", "0", "--set", *settings]
    assert compare_open_clip.main(arguments) == 0
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    record = json.loads((tmp_path / "out/open_clip/seed_0/record.json").read_text())
    assert record["steps"][0] == 0 and record["steps"][-1] == 59
    assert np.mean(record["losses"][-3:]) < record["losses"][0] - 0.2
    pairs = [content["scores"][side][0]["pairs"] for side in ("vlp_jax", "open_clip")]
    assert pairs[0] == pairs[1] > 10
    assert (tmp_path / "out" / "curves.png").exists()
    capsys.readouterr()
    assert compare_open_clip.main(arguments) == 0  # nothing is trained again
    assert "is finished" in capsys.readouterr().out
