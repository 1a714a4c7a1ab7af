"""The command line: units, sections, lists, and names that people type first."""

import pytest
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.defaults import DURATION_UNITS
from vlp_jax.errors import UserError
from vlp_jax.objectives import make_objective


class Words:
    """A tokenizer of a hundred words."""

    vocab_size, context_length, pad_id, eos_id = 100, 16, 0, 1


def demo(*assignments):
    config = config_lib.load("configs/demo.py")
    config_lib.override(config, list(assignments))
    assert config.is_locked
    return config


def given_units(section):
    return {unit: section.get(unit) for unit in DURATION_UNITS if section.get(unit) is not None}


@pytest.mark.parametrize(
    ("assignment", "units"),
    [
        ("duration.epochs=3", {"epochs": 3.0}),
        ("duration=40steps", {"steps": 40}),
        ("duration=1 step", {"steps": 1}),
        ("duration=1_000_000examples", {"examples": 1_000_000}),
        ("duration=30epochs", {"epochs": 30.0}),
        ("duration={'epochs': 2.5}", {"epochs": 2.5}),
        ("optimizer.warmup=5%", {"percent": 5.0}),
        ("optimizer.warmup=2.5 percent", {"percent": 2.5}),
        ("optimizer.warmup.steps=10", {"steps": 10}),
        ("evaluators.retrieval.every=50steps", {"steps": 50}),
        ("log.every.percent=1", {"percent": 1.0}),
    ],
)
def test_a_unit_replaces_the_other(assignment, units):
    config = demo(assignment)
    section = config
    for key in assignment.partition("=")[0].split("."):
        section = section[key] if key not in DURATION_UNITS else section
    assert given_units(section) == units
    assert all(type(section[unit]) is type(value) for unit, value in units.items())


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["duration=40"], "a number with its unit, such as 40steps"),
        (["duration=soon"], "--config.duration=soon: a duration is a number with its unit"),
        (["duration=2.5steps"], "--config.duration.steps=2.5: not a whole number"),
        (["duration={'steps': 1, 'epochs': 2}"], "a number with its unit"),
        (["duration.steps=x"], "--config.duration.steps=x: not a value of type int"),
        (["duration.hours=3"], "unknown key 'hours' in config.duration"),
        (["duration.steps=4", "duration.epochs=3"], "config.duration gets steps and epochs"),
    ],
)
def test_what_is_no_duration(assignments, message):
    with pytest.raises(UserError, match=message):
        demo(*assignments)


def test_durations_of_a_weight():
    config = config_lib.load("configs/demo.py").unlock()
    late = {"value": 2.0, "begin": {"percent": 80}}
    parts = {"a": {**config.objective.to_dict(), "weight": late}}
    config.objective = ConfigDict({"name": "composite", "parts": parts})
    config.lock()
    path = "objective.parts.a.weight"
    config_lib.override(config, [f"{path}.begin.steps=5", f"{path}.end=90%"])
    weight = config.objective.parts.a.weight
    assert given_units(weight.begin) == {"steps": 5} and given_units(weight.end) == {"percent": 90}
    config_lib.override(config, [path + "={'value': 1, 'ramp': '10steps'}"])
    assert set(config.objective.parts.a.weight) == {"value", "ramp"}
    assert given_units(config.objective.parts.a.weight.ramp) == {"steps": 10}


def test_a_mapping_gives_a_section():
    config = demo(
        "data.preprocess.choose_text={'index': 0}",
        "data.preprocess.flip_left_right={}",
        "data.where={'num_objects': 1}",
        "data.fields={'image': 'jpg', 'captions': ['a', 'b']}",
        "tokenizer={'name': 'bytes', 'context_length': 16}",
        "mesh={'fsdp': 4, 'preset': 'hybrid'}",
        "optimizer={'name': 'lion', 'muon': {'momentum': 0.5}, 'warmup': '3steps'}",
    )
    assert config.data.preprocess.choose_text.to_dict() == {"index": 0}
    assert config.data.preprocess.flip_left_right.to_dict() == {}
    assert config.data.where.num_objects == 1 and config.data.fields.captions == ("a", "b")
    assert config.tokenizer.to_dict() == {"name": "bytes", "context_length": 16}
    assert config.mesh.fsdp == 4 and config.mesh.preset == "hybrid" and config.mesh.tensor is None
    assert config.optimizer.name == "lion" and config.optimizer.muon.momentum == 0.5
    assert config.optimizer.muon.learning_rate == 0.01
    assert given_units(config.optimizer.warmup) == {"steps": 3}


def test_an_evaluator_a_dataset_and_a_source_can_be_added_and_left_out():
    added = [
        "evaluators.mine={'name': 'retrieval', 'ks': [1], 'every': '10steps'}",
        "evaluators.late={'name': 'loss', 'data': {'preprocess': {'resize': {}}}}",
        "extra_data.more={'source': 'folder', 'path': 'x'}",
        "init_from.sources.eyes={'source': 'runs/mae', 'into': 'image'}",
        "evaluators.mine.ks=(5, 10)",
    ]
    config = demo(*added)
    assert config.evaluators.mine.ks == (5, 10)
    assert given_units(config.evaluators.mine.every) == {"steps": 10}
    assert given_units(config.evaluators.late.every) == {"percent": 100.0}
    assert config.evaluators.late.data.preprocess.resize.size == 64
    assert config.extra_data.more.path == "x" and config.extra_data.more.lanes == 16
    assert config.init_from.sources.eyes.into == "image"
    config_lib.override(
        config, ["evaluators.mine=None", "extra_data.more=None", "init_from.sources.eyes=None"]
    )
    assert "mine" not in config.evaluators
    assert not config.extra_data and not config.init_from.sources


def test_a_file_stands_where_a_list_of_texts_stood():
    config = demo("evaluators.zero_shot.class_names=names.txt")
    assert config.evaluators.zero_shot.class_names == "names.txt"
    config_lib.override(config, ["evaluators.zero_shot.class_names=['a ring', 'a star']"])
    assert config.evaluators.zero_shot.class_names == ("a ring", "a star")
    config_lib.override(config, ["evaluators.zero_shot.templates=('a {}', '{}')"])
    assert config.evaluators.zero_shot.templates == ("a {}", "{}")


def test_none_and_lists_in_the_place_of_texts():
    config = config_lib.load("configs/clip_folder.py")
    config_lib.override(config, ["data.path=['a', 'b']", "data.split=None"])
    assert config.data.path == ("a", "b") and config.data.split is None
    config_lib.override(config, ["data.path=x"])
    assert config.data.path == "x"


def test_texts_in_brackets_stay_texts():
    config = demo("data.preprocess.prompt_template={'template': 'a {}'}")
    for text in ("{}", "({})", "[{} of it]", "(a {})"):
        config_lib.override(config, [f"data.preprocess.prompt_template.template={text}"])
        assert config.data.preprocess.prompt_template.template == text


def test_preprocessing_in_either_form():
    pairs = "data.preprocess=[('decode_image', {}), ('resize', {'size': 32}), ('resize', {})]"
    config = demo(pairs)
    assert config.data.preprocess == (
        ("decode_image", {}),
        ("resize", {"size": 32}),
        ("resize", {"size": 64}),
    )
    config_lib.override(config, ["data.preprocess.resize.method=bilinear"])
    assert config.data.preprocess[1] == ("resize", {"size": 32, "method": "bilinear"})
    config_lib.override(config, ["data.preprocess={'decode_image': {}}"])
    assert config.data.preprocess.to_dict() == {"decode_image": {}}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("data.preprocess.choose_text={index: 0}", "is no Python literal; write"),
        ("evaluators.x={'name': 'loss', 'every': 3}", "evaluators.x.every=3: a duration is"),
        ("evaluators.x={1: 2}", "the keys of a section are texts without dots, not 1"),
        ("objective.image=3", "is a section; .*or give all of it: --config.objective.image='{"),
        ("seed={'a': 1}", "not a value of type int"),
        ("optimizer={'b3': 1}", "unknown key 'b3' in config.optimizer"),
    ],
)
def test_mistakes_in_literals(assignment, message):
    with pytest.raises(UserError, match=message):
        demo(assignment)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("learning_rate=1e-3", "did you mean --config.optimizer.learning_rate\\?$"),
        ("lr=1e-3", "did you mean --config.optimizer.learning_rate\\?$"),
        ("epochs=3", "did you mean --config.duration.epochs\\?$"),
        ("loss=siglip", "did you mean --config.objective.loss\\?$"),
        ("patch_size=8", "did you mean --config.objective.image.patch_size\\?$"),
        ("variant=B", "--config.objective.image.variant or --config.objective.text.variant"),
        ("optimizer.lr=1", "unknown key 'lr' in config.optimizer; did you mean 'learning_rate'"),
    ],
)
def test_what_people_type_first(assignment, message):
    with pytest.raises(UserError, match=message):
        demo(assignment)


def test_a_loss_by_the_name_of_its_model():
    objective = demo("objective.loss=siglip").objective
    with pytest.raises(UserError, match="unknown loss 'siglip'; did you mean 'sigmoid'"):
        make_objective(objective, Words())


def test_a_patch_size_one_section_too_high():
    objective = demo("objective.patch_size=8").objective
    with pytest.raises(UserError, match="did you mean 'image.patch_size'"):
        make_objective(objective, Words())


def test_a_patch_size_and_sizes_instead_of_a_variant():
    model = make_objective(demo("objective.image.patch_size=32").objective, Words()).model
    assert model.image.patch_size == 32 and model.image.width == 128
    config = demo().unlock()
    whole = make_objective(config.objective, Words()).model
    del config.objective.image["variant"], config.objective.text["variant"]
    with pytest.raises(UserError, match="config.objective.image: an image variant is SIZE/PATCH"):
        make_objective(config.objective, Words())
    config.objective.image.patch_size = 16
    assert make_objective(config.objective, Words()).model == whole
    assert smoke_lib.smoke(config).image_size == 32
    del config.objective.text["heads"], config.objective.text["depth"]
    with pytest.raises(UserError, match="set variant, such as 'B', or else also depth, heads"):
        make_objective(config.objective, Words())
    del config.objective.image["image_size"]
    with pytest.raises(UserError, match="image_size is not set: set config.image_size"):
        make_objective(config.objective, Words())


def test_the_image_size_is_said_once():
    config = demo("image_size=96")
    assert config.image_size == 96 and config.objective.image.image_size == 96
    assert config.data.preprocess.resize.size == 96
    sizes = {e.data.preprocess.resize.size for e in config.evaluators.values()}
    assert sizes == {96}
    config = demo("data.preprocess.resize.size=80", "image_size=96")
    assert config.data.preprocess.resize.size == 80 and config.objective.image.image_size == 96
    assert demo("objective.image.image_size=32").data.preprocess.resize.size == 64


def test_the_image_size_of_a_list_of_operations_and_of_a_decoder():
    config = config_lib.load("configs/clip_folder.py")
    pairs = "[('decode_image', {'min_side': 128}), ('resize', {}), ('resize', {'size': 32})]"
    config_lib.override(config, [f"data.preprocess={pairs}"])
    config_lib.override(config, ["image_size=128"])
    assert [arguments for _, arguments in config.data.preprocess] == [
        {"min_side": 256},
        {"size": 128},
        {"size": 32},
    ]
    assert config.evaluators.retrieval.data.preprocess.decode_image.min_side == 256


def test_operations_of_several_datasets_that_are_one_section_follow_once(tmp_path):
    file = tmp_path / "shared.py"
    file.write_text(
        "from configs import clip_folder\n"
        "def get_config(arg=None):\n"
        "    config = clip_folder.get_config()\n"
        "    config.evaluators.retrieval.data.preprocess = config.data.preprocess\n"
        "    return config\n"
    )
    config = config_lib.load(str(file))
    config_lib.override(config, ["image_size=128"])
    assert config.data.preprocess.decode_image.min_side == 256


@pytest.mark.parametrize("size", ["0", "big", "(1, 2, 3)", "2.5"])
def test_what_is_no_image_size(size):
    with pytest.raises(UserError, match="neither a side in pixels nor two"):
        demo(f"image_size={size}")


def test_models_of_several_sizes_have_none_in_common():
    config = config_lib.load("configs/demo.py").unlock()
    small = config.objective.to_dict()
    small["image"]["image_size"] = 32
    parts = {"a": config.objective.to_dict(), "b": small}
    config.objective = ConfigDict({"name": "composite", "parts": parts})
    config.image_size = None
    with pytest.raises(UserError, match="several image sizes: set the image_size of each"):
        config_lib.override(config.lock(), ["image_size=96"])


def test_every_operation_on_the_side_of_an_image_follows_the_image_size():
    import inspect

    from vlp_jax.data.ops import OPS
    from vlp_jax.image_size import SIZED

    takes = {name for name, op in OPS.items() if "size" in inspect.signature(op).parameters}
    assert takes == set(SIZED)
