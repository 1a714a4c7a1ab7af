"""Config files: loading, overriding, checking, building."""

import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.errors import UserError


def write(tmp_path, body):
    file = tmp_path / "some.py"
    file.write_text(
        "from vlp_jax.config import base, duration\n"
        "def get_config(arg=None):\n    config = base()\n    " + body + "\n    return config\n"
    )
    return str(file)


def test_argument_reaches_get_config(tmp_path):
    path = write(tmp_path, "config.seed = int(arg or 3)")
    assert config_lib.load(path).seed == 3
    assert config_lib.load(path + ":11").seed == 11


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("config.optimizer.learning_rte = 1.0", "did you mean 'learning_rate'"),
        ("config.optimzer = 3", "did you mean 'optimizer'"),
        ("config.seed = None", "config.seed must not be None"),
        ("config.mesh = 8", "some.py: Could not override field 'mesh'"),
        ("config.objective = 3", "some.py: Could not override field 'objective'"),
        ("config.seed = 'x' + 1", "some.py"),
    ],
)
def test_mistakes_in_a_file(tmp_path, body, message):
    with pytest.raises(UserError, match=message):
        config_lib.load(write(tmp_path, body))


def test_missing_files_and_functions(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.py does not exist"):
        config_lib.load("nothing.py:3")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="no function get_config"):
        config_lib.load(str(tmp_path / "empty.py"))
    (tmp_path / "other.py").write_text("x = 1\n", "utf-16")
    with pytest.raises(UserError, match=r"other\.py is UTF-16, not UTF-8"):
        config_lib.load(str(tmp_path / "other.py"))


@pytest.mark.parametrize(
    ("assignment", "read", "value"),
    [
        ("seed=7", lambda c: c.seed, 7),
        ("optimizer.learning_rate=2e-4", lambda c: c.optimizer.learning_rate, 2e-4),
        ("optimizer.learning_rate=1", lambda c: c.optimizer.learning_rate, 1.0),
        ("writers.tensorboard=false", lambda c: c.writers.tensorboard, False),
        ("duration.steps=None", lambda c: c.duration.steps, None),
        ("duration.epochs=2.5", lambda c: c.duration.epochs, 2.5),
        ("writers.wandb.name=a=b c", lambda c: c.writers.wandb.name, "a=b c"),
        ("optimizer.no_decay=['bias']", lambda c: c.optimizer.no_decay, ("bias",)),
    ],
)
def test_overrides(assignment, read, value):
    config = config_lib.base()
    config_lib.override(config, [assignment])
    assert read(config) == value
    assert type(read(config)) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "optimizer.learning_rte=1",
            "unknown key 'learning_rte' in config.optimizer; did you mean",
        ),
        ("optimizr.learning_rate=1", "did you mean 'optimizer'"),
        ("seed=x", "--config.seed=x: not a value of type int"),
        ("seed=1.5", "not a value of type int"),
        ("writers.tensorboard=maybe", "not a value of type bool"),
        ("mesh=3", "is a section; set one of its keys: .*--config.mesh.replica"),
        ("seed.a=3", "config.seed is a value, not a section"),
        ("seed", "needs a value"),
    ],
)
def test_mistakes_in_overrides(assignment, message):
    with pytest.raises(UserError, match=message):
        config_lib.override(config_lib.base(), [assignment])


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("objective.attention=pallas", "pallas"),
        ("objective.image.registers=4", 4),
        ("objective.scan_layers=false", False),
        ("evaluators.zero_shot.batch_size=64", 64),
        ("data.lanes=(1,)", (1,)),
    ],
)
def test_an_argument_that_the_section_of_a_component_does_not_set(assignment, value):
    config = config_lib.load("configs/demo.py")
    with config.unlocked():
        del config.data["lanes"]
    config_lib.override(config, [assignment])
    assert dict(config_lib.flatten(config))[assignment.partition("=")[0]] == value
    assert config.is_locked


@pytest.mark.parametrize(
    "assignment",
    [
        "evaluators.zero_shot.every.step=5",
        "evaluators.zero=3",
        "objective.picture.width=3",
        "extra_data.more=3",
    ],
)
def test_a_section_cannot_be_added(assignment):
    with pytest.raises(UserError, match="unknown key"):
        config_lib.override(config_lib.load("configs/demo.py"), [assignment])


def test_an_evaluator_can_be_left_out():
    config = config_lib.load("configs/demo.py")
    config_lib.override(config, ["evaluators.zero_shot=None"])
    assert (
        set(config.evaluators) == {"zero_shot_unseen", "retrieval", "geometry"} and config.is_locked
    )
    with pytest.raises(UserError, match="is a section"):
        config_lib.override(config, ["optimizer=None"])


def test_an_operation_on_the_data_can_be_left_out_and_put_in():
    config = config_lib.load("configs/clip_folder.py")
    config_lib.override(
        config,
        [
            "data.preprocess.keep=None",
            "evaluators.retrieval.data.preprocess.decode_image=None",
            "data.preprocess.lowercase={}",
        ],
    )
    left = ["choose_text", "decode_image", "random_resized_crop", "lowercase"]
    assert sorted(config.data.preprocess) == sorted(left)
    assert "decode_image" not in config.evaluators.retrieval.data.preprocess and config.is_locked
    with pytest.raises(UserError, match="it has no keys yet; .*choose_text=None leaves it out"):
        config_lib.override(config, ["data.preprocess.choose_text=3"])


def test_json_round_trip():
    config = config_lib.load("configs/demo.py")
    again = config_lib.from_json(config_lib.to_json(config))
    assert dict(config_lib.flatten(again)) == dict(config_lib.flatten(config))


@dataclasses.dataclass
class Thing:
    size: int
    color: str = "red"

    def __post_init__(self):
        if self.size < 0:
            raise ValueError("size is negative\nmore lines")


def test_build_checks_keys():
    section = ConfigDict({"name": "thing", "size": 3})
    assert config_lib.build(Thing, section, "here") == Thing(3)
    with pytest.raises(UserError, match="unknown key 'colour' in here; did you mean 'color'"):
        config_lib.build(Thing, {**section, "colour": "blue"}, "here")
    with pytest.raises(UserError, match="here lacks size"):
        config_lib.build(Thing, {"name": "thing"}, "here")
    with pytest.raises(UserError, match="^here: size is negative$"):
        config_lib.build(Thing, {"size": -1}, "here")


def test_select_names_the_nearest():
    table = {"softmax": 1, "sigmoid": 2}
    assert config_lib.select(table, {"name": "sigmoid"}, "here") == 2
    with pytest.raises(UserError, match="did you mean 'softmax'"):
        config_lib.select(table, {"name": "softmx"}, "here")
    with pytest.raises(UserError, match="lacks a name"):
        config_lib.select(table, {}, "here")


def test_smoke_leaves_the_original_alone_and_keeps_what_is_not_size():
    config = config_lib.load("configs/siglip_shapes.py")
    before = config_lib.to_json(config)
    small = smoke_lib.smoke(config)
    assert config_lib.to_json(config) == before
    assert small.objective.image.width == 32 and small.objective.image.image_size == 16
    assert small.objective.image.pooling == "map" and small.objective.loss == "sigmoid"
    assert small.duration.steps == 2 and small.duration.epochs is None
    assert set(small.evaluators) == set(config.evaluators)
    assert small.data.preprocess.random_resized_crop.size == 16


def test_smoke_shortens_warmup_and_takes_the_captions_of_its_own_data():
    config = config_lib.load("configs/clip_b16.py")
    small = smoke_lib.smoke(config)
    assert config.optimizer.warmup.steps == 2000 and small.optimizer.warmup.steps == 1
    assert small.optimizer.cooldown.percent == 0
    assert config.data.preprocess.choose_text.field == "caption"
    assert "field" not in small.data.preprocess.choose_text


def test_a_config_of_an_earlier_version_gets_the_defaults_of_new_keys():
    old = json.loads(config_lib.to_json(config_lib.load("configs/demo.py")))
    del old["optimizer"]["frozen"], old["optimizer"]["layer_decay"], old["prefetch"]
    old["optimizer"]["b1"] = 0.5
    config = config_lib.from_json(json.dumps(old))
    assert config.optimizer.frozen == () and config.optimizer.layer_decay.image == 1.0
    assert config.prefetch == 2 and config.optimizer.b1 == 0.5
    assert config.objective.name == "contrastive"


@dataclasses.dataclass
class Part:
    """A component whose arguments say what they take."""

    flag: "bool" = True
    count: "int" = 1
    share: "float | None" = None
    name_of_it: "str" = ""
    size: "int | tuple[int, int]" = 3


def make_part(flag: "bool" = True, count: "int" = 1, share: "float" = 0.5, mean: "tuple" = ()):
    return tuple(mean)


@pytest.mark.parametrize("constructor", [Part, make_part])
@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("flag", "no", "bool"),
        ("count", 1.5, "int"),
        ("count", True, "int"),
        ("share", "a", "float"),
    ],
)
def test_values_of_another_type(constructor, key, value, name):
    with pytest.raises(UserError, match=f"^here.{key}={value!r}: not a value of type {name}$"):
        config_lib.build(constructor, {key: value}, "here")


def test_values_that_fit_or_are_not_checked():
    built = config_lib.build(Part, {"share": 1, "count": 2, "size": (1, 2)}, "here")
    assert built == Part(share=1, count=2, size=(1, 2))
    assert config_lib.build(Part, {"share": None}, "here").share is None
    with pytest.raises(UserError, match="^here: 'float' object is not iterable"):
        config_lib.build(make_part, {"mean": 0.5}, "here")


def test_smoke_lets_a_late_loss_begin_with_its_second_step():
    config = config_lib.load("configs/demo.py").unlock()
    late = {"value": 2.0, "begin": {"percent": 80}, "ramp": {"percent": 5}, "end": {"percent": 99}}
    parts = {"a": config.objective.to_dict(), "b": {**config.objective.to_dict(), "weight": late}}
    config.objective = config_lib.ConfigDict({"name": "composite", "parts": parts})
    config.init_from.sources = config_lib.ConfigDict({"x": {"source": "no/such"}})
    small = smoke_lib.smoke(config.lock())
    weight = small.objective.parts.b.weight
    assert weight.begin.steps == 1 and set(weight) == {"value", "begin"}
    assert not small.init_from.sources and small.objective.parts.b.image.width == 32


def test_what_makes_an_evaluator_small_are_its_own_arguments():
    import inspect

    from vlp_jax.evaluators import EVALUATORS

    assert any(kind.SMOKE for kind in EVALUATORS.values())
    for kind in EVALUATORS.values():
        assert set(kind.SMOKE) <= set(inspect.signature(kind.__init__).parameters), kind
