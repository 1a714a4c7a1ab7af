"""What config.mesh makes of a number of devices: presets, sizes, and their contradictions."""

import json

import jax
import pytest

from vlp_jax import config as config_lib
from vlp_jax.errors import UserError
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.mesh import resolve_sizes


@pytest.mark.parametrize(
    ("section", "shape"),
    [
        ({}, (64, 1, 1)),
        ({"replica": None, "fsdp": None, "tensor": None, "preset": None}, (64, 1, 1)),
        ({"replica": -1, "fsdp": 1, "tensor": 1}, (64, 1, 1)),  # the defaults of old configs
        ({"replica": 1, "fsdp": -1, "tensor": 1}, (1, 64, 1)),
        ({"replica": 2, "fsdp": -1}, (2, 32, 1)),
        ({"fsdp": 8}, (8, 8, 1)),
        ({"fsdp": -1}, (1, 64, 1)),
        ({"tensor": 4}, (16, 1, 4)),
        ({"replica": 4, "fsdp": 8, "tensor": 2}, (4, 8, 2)),
        ({"preset": "dp"}, (64, 1, 1)),
        ({"preset": "dp", "replica": 64, "fsdp": 1}, (64, 1, 1)),
        ({"preset": "fsdp"}, (1, 64, 1)),
        ({"preset": "fsdp", "replica": 4}, (4, 16, 1)),
        ({"preset": "fsdp", "fsdp": 16}, (4, 16, 1)),
        ({"preset": "fsdp", "replica": -1, "fsdp": 16}, (4, 16, 1)),
        ({"preset": "fsdp", "replica": 1, "fsdp": -1}, (1, 64, 1)),
        ({"preset": "fsdp_tp", "tensor": 4}, (1, 16, 4)),
        ({"preset": "fsdp_tp", "tensor": 4, "fsdp": 8}, (2, 8, 4)),
        ({"preset": "fsdp_tp", "tensor": 4, "replica": 2}, (2, 8, 4)),
        ({"preset": "fsdp_tp", "tensor": -1, "fsdp": 8}, (1, 8, 8)),
        ({"preset": "hybrid"}, (4, 16, 1)),
        ({"preset": "hybrid", "tensor": 2}, (4, 8, 2)),
        ({"preset": "hybrid", "replica": 8}, (8, 8, 1)),
        ({"preset": "hybrid", "fsdp": 4}, (16, 4, 1)),
    ],
)
def test_sizes_of_64_devices_in_four_islands(section, shape):
    assert resolve_sizes(section, 64, 4) == shape


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"replica": 3}, "mesh replica 3 x fsdp 1 x tensor 1 does not fit the 64 devices"),
        ({"replica": 4, "fsdp": 3}, "replica 4 x fsdp 3 x tensor 1 does not fit"),
        ({"replica": -1, "fsdp": 3}, "replica -1 x fsdp 3 x tensor 1 does not fit"),
        ({"preset": "fsdp", "replica": 3}, r"fsdp -1 x tensor 1 \(preset fsdp\) does not fit"),
        ({"replica": -1, "fsdp": -1}, "mesh replica -1, fsdp -1: .* at most one"),
        ({"replica": 0}, "at least 1"),
        ({"fsdp": -2}, "at least 1"),
        ({"data": 8}, "unknown key 'data' in config.mesh"),
        ({"preset": "fsdp_pt"}, "did you mean 'fsdp_tp'.*known: dp, fsdp, fsdp_tp, hybrid"),
        (
            {"preset": "dp", "fsdp": 4},
            "preset dp keeps parameters whole, but config.mesh.fsdp is 4",
        ),
        ({"preset": "dp", "tensor": 2}, "but config.mesh.tensor is 2"),
        ({"preset": "fsdp", "fsdp": 1}, "preset fsdp shards parameters, but .* is 1"),
        ({"preset": "fsdp", "tensor": 2}, "has no tensor axis.*use preset fsdp_tp"),
        ({"preset": "fsdp_tp"}, "needs the size of the tensor axis.*--config.mesh.tensor=N"),
        ({"preset": "fsdp_tp", "tensor": 1}, "at least 2.*or use preset fsdp$"),
        ({"preset": "hybrid", "fsdp": 1}, "preset hybrid shards parameters"),
        ({"preset": "hybrid", "replica": 2}, "over the 4 slices or processes .* replica is 2"),
        ({"preset": "hybrid", "fsdp": 32}, "replica is 2: set it to a multiple"),
    ],
)
def test_mistakes(section, message):
    with pytest.raises(UserError, match=message) as raised:
        resolve_sizes(section, 64, 4)
    assert "\n" not in str(raised.value)


def test_a_mesh_of_devices_that_are_here():
    assert mesh_lib.make_mesh({"replica": -1}).devices.shape == (8, 1, 1)
    mesh = mesh_lib.make_mesh({"preset": "fsdp_tp", "tensor": 2, "replica": 2})
    assert mesh.devices.flatten().tolist() == jax.devices()
    assert dict(mesh.shape) == {"replica": 2, "fsdp": 2, "tensor": 2}
    assert mesh_lib.describe(mesh).endswith("in 1 process(es), mesh replica 2 x fsdp 2 x tensor 2")


def override(config, *assignments):
    config_lib.override(config, list(assignments))
    return mesh_lib.make_mesh(config.mesh).devices.shape


def test_presets_on_the_command_line():
    assert override(config_lib.base()) == (8, 1, 1)
    assert override(config_lib.base(), "mesh.preset=fsdp") == (1, 8, 1)
    assert override(config_lib.base(), "mesh.preset=fsdp", "mesh.replica=4") == (4, 2, 1)
    sharded = config_lib.load("configs/clip_l14.py")
    assert override(sharded) == (1, 8, 1)
    assert override(sharded, "mesh.preset=dp") == (8, 1, 1)
    assert override(sharded, "mesh.preset=None", "mesh.tensor=2") == (4, 1, 2)


def test_a_config_that_was_saved_before_there_were_presets():
    saved = json.loads(config_lib.to_json(config_lib.load("configs/demo.py")))
    saved["mesh"] = {"replica": -1, "fsdp": 2, "tensor": 1}
    config = config_lib.from_json(json.dumps(saved))
    assert config.mesh.preset is None
    assert mesh_lib.make_mesh(config.mesh).devices.shape == (4, 2, 1)
    again = config_lib.from_json(config_lib.to_json(config_lib.load("configs/clip_l14.py")))
    assert mesh_lib.make_mesh(again.mesh).devices.shape == (1, 8, 1)
