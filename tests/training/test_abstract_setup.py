"""A setup from a config alone is that of the run, which has data and a tokenizer."""

import fake_devices
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from recipe_shapes import load

from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.errors import UserError
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.training.abstract_setup import abstract_setup, tokenizer_sizes
from vlp_jax.training.setup import make_pipeline, make_setup


def eight():
    return mesh_lib.make_mesh({"preset": "fsdp"})


def same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.sharding == other.sharding


def test_it_is_the_setup_of_a_run_on_data(shapes_dir):
    config = smoke_lib.smoke(load("siglip_shapes")).unlock()
    config.tokenizer = ConfigDict({"name": "bytes", "context_length": 24})
    config.duration = config_lib.duration(epochs=2.0)
    from vlp_jax.data.tokenizers import ByteTokenizer

    tokenizer = ByteTokenizer(24)
    pipeline = make_pipeline(config, tokenizer)
    run = make_setup(config, eight(), tokenizer, pipeline.batch_spec(), len(pipeline))
    ours = abstract_setup(config, eight(), epoch_examples=len(pipeline))
    assert {k: (v.shape, v.dtype) for k, v in ours.batch_spec.items()} == {
        k: (v.shape, v.dtype) for k, v in run.batch_spec.items() if k in ("image", "text")
    }
    same(ours.abstract, run.abstract)
    assert ours.units == run.units and ours.objective == run.objective


def test_parts_of_a_composite_get_the_fields_of_their_dataset():
    config = load("clip_folder").unlock()
    image = config.objective.image.to_dict()
    clip = config.objective.to_dict()
    mae = {
        "name": "masked_autoencoding",
        "data": "pictures",
        "image": {**image, "image_size": 96, "class_token": False},
        "decoder": {"width": 64, "depth": 1, "mlp_dim": 64, "heads": 2},
    }
    del mae["image"]["pooling"]
    both = {"name": "composite", "parts": {"clip": {**clip, "weight": 2.0}, "mae": mae}}
    config.objective = ConfigDict(both)
    config.duration = config_lib.duration(steps=5)
    with pytest.raises(UserError, match="fed from 'pictures', which config.extra_data lacks"):
        abstract_setup(config, eight())
    config.extra_data = ConfigDict({"pictures": {"source": "webdataset", "path": "nowhere"}})
    config.objective.parts.mae.image.image_size = image["image_size"]
    spec = abstract_setup(config, eight()).batch_spec
    size = image["image_size"]
    assert {name: leaf.shape for name, leaf in spec.items()} == {
        "image": (128, size, size, 3),
        "text": (128, 32),
        "pictures/image": (128, size, size, 3),
    }


def test_the_dtype_is_that_of_the_devices_of_the_mesh():
    config = load("debug_cpu").unlock()
    config.objective.dtype = None
    config.mesh.fsdp = 8
    before = config_lib.to_json(config)
    tpu = fake_devices.mesh(1, 8, 1)  # which are no CPUs
    assert abstract_setup(config, tpu).objective.compute_dtype == jax.numpy.bfloat16
    assert abstract_setup(config, eight()).objective.compute_dtype == np.float32
    config.objective.dtype = "float32"
    assert abstract_setup(config, tpu).objective.compute_dtype == np.float32
    config.objective.dtype = None
    assert config_lib.to_json(config) == before


@pytest.mark.parametrize(
    ("section", "size"),
    [
        ({"name": "bytes", "context_length": 8, "vocab_size": 1000}, 259),
        ({"name": "clip", "context_length": 77}, 49_408),
        ({"name": "clip", "context_length": 77, "file": "mine.txt", "vocab_size": 500}, 500),
        ({"name": "sentencepiece", "context_length": 64, "vocab_size": 32_000}, 32_000),
    ],
)
def test_vocabularies(section, size):
    assert tokenizer_sizes(ConfigDict(section)).vocab_size == size


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "clip", "context_length": 77, "file": "mine.txt"}, "not known without its file"),
        ({"name": "subword", "context_length": 8}, "set --config.tokenizer.vocab_size"),
        ({"name": "subwords", "context_length": 8}, "did you mean 'subword'"),
        ({"name": "bytes", "context_length": 8, "flie": 1}, "did you mean 'file'"),
        ({"name": "bytes"}, "context_length"),
    ],
)
def test_tokenizers_of_which_nothing_is_known(section, message):
    with pytest.raises(UserError, match=message):
        tokenizer_sizes(ConfigDict(section))


def test_epochs_need_their_number_of_examples():
    config = load("clip_folder")
    with pytest.raises(UserError, match="config.duration is in epochs.*--epoch-examples"):
        abstract_setup(config, eight())
    assert abstract_setup(config, eight(), 1280).units.total_steps == 300


def test_the_mesh_must_divide_the_batch():
    config = load("clip_folder").unlock()
    config.batch_size = 12
    with pytest.raises(UserError, match="12 is not divisible by the 8 devices"):
        abstract_setup(config, eight(), 1280)


@pytest.mark.parametrize(
    "steps, message", [(0, "less than one step"), (2**31, "counted in 32 bits")]
)
def test_runs_of_no_step_or_of_too_many(steps, message):
    config = load("clip_folder").unlock()
    config.duration = config_lib.duration(steps=steps)
    with pytest.raises(UserError, match=message):
        abstract_setup(config, eight())
