"""Both forms of `data.preprocess`: loaded, overridden, written, shrunk to a smoke test, and run."""

import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax import config_help
from vlp_jax import smoke as smoke_lib
from vlp_jax.data.ops import OPS, build_ops, in_order
from vlp_jax.data.pipeline import TrainPipeline
from vlp_jax.data.tokenizers import ByteTokenizer
from vlp_jax.data.wording import caption_wording
from vlp_jax.errors import UserError
from vlp_jax.preprocess import SMOKE_OTHER_FIELDS, SMOKE_READ, SMOKE_WITHOUT, labelled

PAIRS = [
    ("choose_text", {}),
    ("decode_image", {"into": "view"}),
    ("random_resized_crop", ConfigDict({"field": "view", "size": 32})),
    ("decode_image", None),
    ("random_resized_crop", {"size": 32}),
    ("tokenize", {"into": "prefix", "length": 9, "eos": False}),
    ("keep", {"fields": ["image", "view", "text", "prefix"]}),
]
DATA = {"source": "tfds", "dataset": "shapes/tiny", "split": "train"}


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "configs" / "pairs.py"
    file.parent.mkdir()
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "from vlp_jax import config as config_lib\n"
        "def get_config(arg=None):\n"
        "    config = config_lib.load('configs/debug_cpu.py').unlock()\n"
        f"    config.data = ConfigDict({{**{DATA!r}, 'preprocess': PAIRS}})\n"
        "    return config\n"
        "PAIRS = "
        + repr([(n, v.to_dict() if isinstance(v, ConfigDict) else v) for n, v in PAIRS])
        + "\n"
    )
    return config_lib.load(str(file))


def test_a_list_is_overridden_by_the_name_of_the_operation(config):
    assignments = [
        "data.preprocess.random_resized_crop.size=48",
        "data.preprocess.random_resized_crop#2.size=64",
        "data.preprocess.random_resized_crop#2.min_scale=0.25",
        "data.preprocess.choose_text.index=0",
        "data.preprocess.keep.fields=('image', 'view')",
        "data.preprocess.grayscale={}",
        "data.preprocess.decode_image#2.min_side=70",
    ]
    config_lib.override(config, assignments)
    assert config.is_locked and isinstance(config.data.preprocess, tuple)
    assert config.data.preprocess == (
        ("choose_text", {"index": 0}),
        ("decode_image", {"into": "view"}),
        ("random_resized_crop", {"field": "view", "size": 48}),
        ("decode_image", {"min_side": 70}),
        ("random_resized_crop", {"size": 64, "min_scale": 0.25}),
        ("tokenize", {"into": "prefix", "length": 9, "eos": False}),
        ("keep", {"fields": ("image", "view")}),
        ("grayscale", {}),
    )
    config_lib.override(config, ["data.preprocess.decode_image=None"])
    names = [name for name, _ in config.data.preprocess]
    assert names.count("decode_image") == 1 and config.data.preprocess[2][1] == {"min_side": 70}
    assert config.data.preprocess[0][0] == "choose_text"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("data.preprocess.random_resized_crop.size=large", "not a value of type int"),
        ("data.preprocess.resise.size=3", "unknown key 'resise' in config.data.preprocess"),
        ("data.preprocess.keep=3", "is a section; set one of its keys: .*=None leaves it out"),
        ("data.preprocess.decode_image#3.min_side=3", "unknown key 'decode_image#3'"),
    ],
)
def test_mistakes_in_overrides_of_a_list_change_nothing(config, assignment, message):
    before = config.data.preprocess
    with pytest.raises(UserError, match=message):
        config_lib.override(config, [assignment])
    assert config.data.preprocess == before and config.is_locked


def test_every_argument_of_a_list_has_a_key(config):
    found = {key.path: key.value for key in config_help.keys(config)}
    assert found["data.preprocess.random_resized_crop#2.size"] == 32
    assert found["data.preprocess.random_resized_crop.field"] == "view"
    config_lib.override(config, [f"{key}={value}" for key, value in found.items() if ".pre" in key])
    assert {key.path: key.value for key in config_help.keys(config)} == found


def test_json_round_trip_of_a_list(config):
    again = config_lib.from_json(config_lib.to_json(config))
    assert dict(config_lib.flatten(again)) == dict(config_lib.flatten(config))
    assert [name for name, _ in in_order(again.data.preprocess)] == [name for name, _ in PAIRS]


def test_labels_and_the_order_of_a_mapping_with_repeated_operations():
    assert list(labelled([("keep", {}), ("resize", {}), ("keep", None)])) == [
        *("keep", "resize", "keep#2"),
    ]
    numbers = ["resize"] + [f"resize#{n}" for n in range(2, 12)]
    mapping = ConfigDict({label: {"size": n + 1} for n, label in enumerate(numbers)})
    mapping.lowercase = {}
    found = in_order(mapping)
    assert found[0] == ("lowercase", {})
    assert [arguments["size"] for _, arguments in found[1:]] == list(range(1, 12))


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (["decode_image"], "pairs, such as .*got 'decode_image'"),
        ([("decode_image", {}, 1)], "pairs, such as"),
        ([("resize#2", {"size": 3})], "by its plain name, 'resize'"),
        ({"resize#1": {"size": 3}}, "a further resize is resize#2"),
        ({"resize#b": {"size": 3}}, "a further resize is resize#2"),
        ({"resise#2": {"size": 3}}, "unknown key 'resise'"),
        ({"resize": 3}, "resize: the arguments must be a mapping, got 3"),
        ([("keep", {"fields": []}), ("resize", {"size": 3}), ("resize", {"sise": 3})], "resize#2"),
    ],
)
def test_mistakes_in_either_form_are_one_line(preprocess, message):
    with pytest.raises(UserError, match=message) as caught:
        build_ops(preprocess)
    assert "\n" not in str(caught.value)


def first_batch(data):
    pipeline = TrainPipeline(data.to_dict(), ByteTokenizer(16), batch_size=8, seed=0)
    return next(iter(pipeline.batches()))


def test_smoke_keeps_the_form_and_its_data_can_be_read(config):
    small = smoke_lib.smoke(config)
    size = small.objective.image.image_size
    assert [name for name, _ in small.data.preprocess] == [name for name, _ in PAIRS]
    batch = first_batch(small.data)
    assert batch["image"].shape == batch["view"].shape == (8, size, size, 3)
    assert (batch["image"] != batch["view"]).any()
    assert batch["prefix"].shape == (8, 9) and batch["text"].shape == (8, 16)
    np.testing.assert_array_equal(batch["prefix"], batch["text"][:, :9])  # both begin with bos


OTHER = [
    ("decode_image", {}),
    ("resize_shortest_and_center_crop", {"size": 32, "box_fields": ["labels"]}),
    ("decode_image", {"field": "second"}),
    ("resize", {"size": 32, "field": "second"}),
    ("pad_rows", {"fields": ["boxes", "labels"], "count": 4}),
    ("tokenize", {"field": "question"}),
    ("tokenize", {"field": "answer", "into": "target", "length": 8}),
    ("keep", {"fields": ("image", "second", "question", "target")}),
]


@pytest.mark.parametrize("form", [pytest.param("list", marks=pytest.mark.slow), "mapping"])
def test_smoke_of_operations_on_fields_that_the_embedded_data_lacks(form):
    config = config_lib.load("configs/debug_cpu.py").unlock()
    preprocess = OTHER if form == "list" else labelled(OTHER)
    config.data = ConfigDict({**DATA, "preprocess": preprocess})
    small = smoke_lib.smoke(config.lock())
    batch = first_batch(small.data)
    size = small.objective.image.image_size
    assert set(batch) == {"image", "second", "question", "target"}
    assert batch["second"].shape == (8, size, size, 3) and batch["target"].shape == (8, 8)


def test_what_smoke_knows_of_operations_exists():
    assert {*SMOKE_OTHER_FIELDS, *SMOKE_READ, *SMOKE_WITHOUT} <= set(OPS)


def test_the_wording_of_text_is_that_of_the_text_itself():
    questions = [("choose_text", {"field": "q"}), ("lowercase", {}), ("tokenize", {"into": "q"})]
    answers = [("choose_text", {"field": "a"}), ("canonicalize_text", {}), ("tokenize", {})]
    assert caption_wording([*questions, *answers]).names == ("canonicalize_text",)
    assert caption_wording([*answers, *questions]).names == ("canonicalize_text",)
    assert caption_wording(questions).names == ("lowercase",)
    assert caption_wording({"choose_text": {}, "lowercase": {}}).names == ("lowercase",)


def test_a_list_and_the_mapping_of_the_same_order_give_the_same_batches():
    mapping = {
        "choose_text": {},
        "decode_image": {},
        "random_resized_crop": {"size": 32},
        "flip_left_right": {},
        "color_jitter": {"brightness": 0.4},
    }
    batches = []
    for preprocess in (mapping, list(mapping.items())):
        data = {**DATA, "preprocess": preprocess}
        pipeline = TrainPipeline(data, ByteTokenizer(16), batch_size=8, seed=0)
        batches.append(list(itertools.islice(pipeline.batches(), 2)))
    for first, second in zip(*batches, strict=True):
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
