"""`--help` with a config: every key that may be set, each with a meaning."""

import inspect
from pathlib import Path

import pytest

from vlp_jax import config as config_lib
from vlp_jax import config_help
from vlp_jax.evaluators import EVALUATORS
from vlp_jax.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("[!_]*.py"))


def keys_of(name):
    return {key.path: key for key in config_help.keys(config_lib.load(f"configs/{name}.py"))}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_has_a_meaning(name):
    keys = keys_of(name)
    assert [path for path, key in keys.items() if not key.meaning] == []


def test_every_argument_of_every_component_has_a_meaning():
    for table in (OBJECTIVES, EVALUATORS):
        for name, kind in table.items():
            keys = list(config_help._arguments(kind, {}, name))
            assert [key.path for key in keys if not key.meaning] == []


@pytest.mark.parametrize(
    ("name", "path", "value", "meaning"),
    [
        ("demo", "objective.attention", "xla", "a name in `attention.ATTENTIONS`"),
        ("demo", "objective.loss_form", "plain", '"plain" (a device computes all logits'),
        ("demo", "objective.mask_ratio", 0.0, "share of each image's patches"),
        ("demo", "objective.image.registers", 0, "learned tokens"),
        ("demo", "objective.image.width", 128, "residual stream"),
        ("demo", "objective.text.rope", None, "rotary"),
        ("demo", "evaluators.retrieval.ks", (1, 5, 10), "the values of k for R@k"),
        ("demo", "evaluators.retrieval.every", "25%", "how often it runs"),
        ("demo", "optimizer.b2", 0.98, "decay of the second moment"),
        ("demo", "duration", "500steps", "length of the run"),
        ("demo", "data.preprocess.resize.method", "bicubic", "bilinear"),
        ("clip_folder", "data.holdout", 0.1, "the fraction of images in `validation`"),
        ("mae_b16", "objective.decoder.position", "sincos", "sin"),
        ("coca_b32", "objective.text.depth", None, "number of layers"),
    ],
)
def test_keys_that_stand_in_constructors_alone(name, path, value, meaning):
    key = keys_of(name)[path]
    assert key.value == value and meaning in key.meaning


def test_every_section_of_a_component_leads_to_its_arguments():
    for name, kind in OBJECTIVES.items():
        for argument, parameter in inspect.signature(kind).parameters.items():
            is_section = parameter.annotation == "Mapping[str, Any]"
            if is_section and argument not in config_help.GIVEN:
                assert config_help._section_of(kind, argument), (name, argument)


@pytest.mark.parametrize("name", ["demo", "clip_folder", "coca_b32", "mae_then_clip"])
def test_what_is_listed_can_be_set(name):
    config = config_lib.load(f"configs/{name}.py")
    given = [f"{k.path}={k.value}" for k in keys_of(name).values() if k.value != "(needed)"]
    config_lib.override(config, given)
    again = {key.path: key.value for key in config_help.keys(config)}
    assert again == {path: key.value for path, key in keys_of(name).items()}
