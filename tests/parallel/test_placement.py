"""Where devices stand in a mesh: slow networks are crossed by `replica`, processes late."""

import random

import fake_devices
import numpy as np
import pytest

from vlp_jax.errors import UserError
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.placement import islands, place
from vlp_jax.parallel.topologies import known_topologies, tpu_devices


def of(array, attribute):
    return np.vectorize(lambda device: getattr(device, attribute))(array)


def constant_along(array, *axes):
    return (array == array.min(axis=axes, keepdims=True)).all()


@pytest.mark.parametrize("per_slice", [None, 8])
def test_hosts_of_gpus_are_islands_and_only_replica_leaves_them(per_slice):
    devices = fake_devices.devices(32, per_process=8, per_slice=per_slice)
    random.Random(0).shuffle(devices)
    assert [len(group) for group in islands(devices)] == [8] * 4
    mesh = mesh_lib.make_mesh({"preset": "hybrid", "tensor": 2}, devices)
    assert mesh.devices.shape == (4, 4, 2)
    assert constant_along(of(mesh.devices, "process_index"), 1, 2)
    assert of(mesh.devices, "id").flatten().tolist() == list(range(32))


def test_islands_of_several_processes():
    devices = fake_devices.devices(32, per_process=1, per_slice=16)  # a process for each device
    assert [len(group) for group in islands(devices)] == [16, 16]
    assert mesh_lib.make_mesh({"preset": "hybrid"}, devices).devices.shape == (2, 16, 1)


def test_axes_that_are_too_long_leave_a_process_but_tensor_must_not():
    devices = fake_devices.devices(32)
    fsdp = place(devices, (1, 16, 2))
    assert constant_along(of(fsdp, "process_index"), 2)
    assert [sorted(set(row)) for row in of(fsdp, "process_index")[..., 0].tolist()] == [
        [0, 1, 2, 3]
    ]
    with pytest.raises(UserError, match=r"tensor 16 would run over several .* a process \(8\)"):
        place(devices, (1, 2, 16))


def test_islands_of_different_sizes_are_refused():
    with pytest.raises(UserError, match=r"different numbers of devices \[4, 8\]"):
        islands(fake_devices.devices(12))


def test_there_are_topologies_and_only_those():
    known = known_topologies()
    assert {"v5e:16x16", "v6e:8x8", "v4:8x8x8", "v5p:4x4x12", "tpu7x:4x4x4"} <= set(known)
    assert "v5e:32x32" not in known and "v4:16x16x24" not in known and len(set(known)) == len(known)
    with pytest.raises(
        UserError, match="'v5e:3x3' does not exist; those of v5e: v5e:1x1, .*16x16$"
    ):
        tpu_devices("v5e:3x3")
    with pytest.raises(UserError, match="'v9:2x2' does not exist; some are v5e:16x16, .*v4:"):
        tpu_devices("v9:2x2")
    with pytest.raises(UserError, match="at least one slice"):
        tpu_devices("v5e:4x4", 0)


def test_without_libtpu_a_topology_is_an_error(monkeypatch):
    def refuse(**arguments):
        raise RuntimeError("no TPU support\nmore lines")

    from vlp_jax.parallel import topologies

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match="^topology v5e:4x4: no TPU support; this needs .* libtpu"):
        tpu_devices("v5e:4x4")


@pytest.mark.parametrize(
    ("name", "chips", "hosts"),
    [("v5e:1x1", 1, 1), ("v5e:2x4", 8, 1), ("v6e:16x16", 256, 64), ("v4:2x2x2", 8, 2)],
)
def test_topologies_of_libtpu(name, chips, hosts):
    pytest.importorskip("libtpu")
    devices = tpu_devices(name)
    assert len(devices) == len({d.id for d in devices}) == chips
    assert len({d.process_index for d in devices}) == hosts
    assert len(islands(devices)) == 1


@pytest.mark.slow
def test_libtpu_knows_all_topologies():
    pytest.importorskip("libtpu")
    for name in known_topologies():
        chips = np.prod([int(side) for side in name.partition(":")[2].split("x")])
        if chips <= 1024:  # larger ones take a second each
            assert len(tpu_devices(name)) == chips * (2 if name.startswith("tpu7x") else 1), name


def test_slices_of_a_tpu_are_crossed_by_replica_alone():
    pytest.importorskip("libtpu")
    devices = tpu_devices("v5e:4x4", 2)
    random.Random(0).shuffle(devices)
    mesh = mesh_lib.make_mesh({"preset": "hybrid", "replica": 4, "tensor": 4}, devices)
    assert mesh.devices.shape == (4, 2, 4)
    assert of(mesh.devices, "slice_index")[:, 0, 0].tolist() == [0, 0, 1, 1]
    assert constant_along(of(mesh.devices, "slice_index"), 1, 2)
    assert constant_along(of(mesh.devices, "process_index"), 2)
    assert "and 2 slices, mesh replica 4" in mesh_lib.describe(mesh)
    assert len(set(mesh.devices.flat)) == 32
    for section in ({"preset": "fsdp"}, {"replica": 1, "fsdp": 8, "tensor": 4}):
        with pytest.raises(UserError, match="over the 2 TPU slices.*preset=hybrid"):
            mesh_lib.make_mesh(section, devices)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("name", ["v5e:4x4", "v6e:8x16", "v5p:4x4x4"])
def test_tensor_stays_inside_a_process_of_a_tpu(name, tensor):
    pytest.importorskip("libtpu")
    devices = tpu_devices(name)
    array = place(devices, (1, len(devices) // tensor, tensor))
    assert constant_along(of(array, "process_index"), 2) and len(set(array.flat)) == len(devices)
