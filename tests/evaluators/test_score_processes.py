"""Scores of a job of two processes, each of which reads its own part of the images and captions."""

import numpy as np
import pytest
from test_processes import run

CONFIG = """
from configs import clip_shapes
from vlp_jax import config as config_lib

def get_config(arg=None):
    config = config_lib.smoke(clip_shapes.get_config()).unlock()
    for evaluator in config.evaluators.values():
        evaluator.data.limit = 37
    config.evaluators.retrieval_captions.data.preprocess.lowercase = {}
    return config
"""


@pytest.mark.slow
def test_scores_of_two_processes_equal_those_of_one(tmp_path, shapes_dir):
    config = tmp_path / "several.py"
    config.write_text(CONFIG)
    one = run(str(config), tmp_path / "one", shapes_dir, 1)
    two = run(str(config), tmp_path / "two", shapes_dir, 2)
    scores = {key: value for key, value in one.items() if key[1].startswith("eval/")}
    assert scores.keys() == {key for key in two if key[1].startswith("eval/")} and len(scores) > 50
    pairs = [value for key, value in scores.items() if key[1] == "eval/retrieval_captions/pairs"]
    assert pairs == [37 * 6]
    for key, value in scores.items():
        np.testing.assert_allclose(two[key], value, rtol=1e-4, atol=1e-6, err_msg=str(key))
