"""Scores of a job of two processes, each of which reads its own part of the images and captions."""

import numpy as np
import pytest
from test_processes import run

CONFIG = """
import importlib
from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib

def get_config(arg=None):
    module = importlib.import_module("configs.NAME")
    config = smoke_lib.smoke(module.get_config()).unlock()
    for evaluator in config.evaluators.values():
        evaluator.data.limit = 37
    if "retrieval_captions" in config.evaluators:
        config.evaluators.retrieval_captions.data.preprocess.lowercase = {}
    return config
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("clip_shapes", 50), ("cap_shapes", 30)])
def test_scores_of_two_processes_equal_those_of_one(name, least, tmp_path, shapes_dir):
    config = tmp_path / "several.py"
    config.write_text(CONFIG.replace("NAME", name))
    one = run(str(config), tmp_path / "one", shapes_dir, 1)
    two = run(str(config), tmp_path / "two", shapes_dir, 2)
    scores = {key: value for key, value in one.items() if key[1].startswith("eval/")}
    assert (
        scores.keys() == {key for key in two if key[1].startswith("eval/")} and len(scores) > least
    )
    pairs = [value for key, value in scores.items() if key[1] == "eval/retrieval_captions/pairs"]
    assert pairs == [37 * 6] * (name == "clip_shapes")
    for key, value in scores.items():
        np.testing.assert_allclose(two[key], value, rtol=1e-4, atol=1e-6, err_msg=str(key))
