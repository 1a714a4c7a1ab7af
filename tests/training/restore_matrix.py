"""Saves a state on three meshes of four devices, and restores what others have saved.

As a program it is one of several processes that form a job:
restore_matrix.py DIR PORT COUNT INDEX PAIRS.
The states are random numbers that follow from a seed, so that each process knows all of them.
"""

import itertools
import json
import sys
from pathlib import Path

import helpers
import jax
import numpy as np

from vlp_jax.parallel import startup
from vlp_jax.training.checkpoint import Checkpointer

MESHES = {"dp": {"replica": 4}, "fsdp": {"fsdp": 4}, "fsdp_tp": {"fsdp": 2, "tensor": 2}}
JOBS = ("1", "2")  # folders of what one process and two have saved
# (saved on, restored on)
PAIRS = {
    "quick": (("dp", "fsdp"), ("fsdp", "fsdp_tp"), ("fsdp_tp", "dp")),
    "all": tuple(itertools.product(MESHES, MESHES)),
}


def setups(names=tuple(MESHES)):
    config = helpers.tiny_config()
    config.optimizer.ema_decay = 0.9
    return {name: helpers.setup_on(config, MESHES[name], 4) for name in names}


def values(setup, job, saved_on):
    """The whole arrays of the state that the job `job` saves on the mesh `saved_on`, in order."""
    rng = np.random.default_rng([int(job), list(MESHES).index(saved_on)])
    return [
        (1000 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        for leaf in jax.tree.leaves(setup.abstract)
    ]


def placed(setup, arrays):
    """The state on the mesh, each process giving its part."""
    leaves, tree = jax.tree.flatten(setup.abstract)
    return jax.tree.unflatten(
        tree,
        [
            jax.make_array_from_callback(leaf.shape, leaf.sharding, array.__getitem__)
            for leaf, array in zip(leaves, arrays, strict=True)
        ],
    )


def compared(setup, state, arrays):
    """Paths whose bits differ on a device of this process, and how many bytes it looked at.

    Bytes that several devices hold count once in the whole job.
    """
    different, looked_at = [], 0
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), wanted, array in zip(
        leaves, jax.tree.leaves(setup.abstract), arrays, strict=True
    ):
        same = leaf.sharding == wanted.sharding and leaf.dtype == wanted.dtype
        for shard in leaf.addressable_shards:
            same &= np.asarray(shard.data).tobytes() == array[shard.index].tobytes()
            looked_at += shard.data.nbytes if shard.replica_id == 0 else 0
        if not same:
            different.append(jax.tree_util.keystr(path, simple=True, separator="/"))
    return {"different": different, "bytes": looked_at}


def save_all(found, root, job):
    """Saves a state on each mesh."""
    for name, setup in found.items():
        with Checkpointer(root / job / name) as checkpointer:
            checkpointer.save(1, placed(setup, values(setup, job, name)), {"position": 0})
            checkpointer.wait()


def restore_all(found, root, pairs):
    """ "JOB SAVED_ON RESTORED_ON" -> what came of it."""
    report = {}
    for job in JOBS:
        for saved_on, name in pairs:
            setup = found[name]
            with Checkpointer(root / job / saved_on, read_only=True) as checkpointer:
                assert checkpointer.check_fits(setup.abstract) == 1
                state = checkpointer.restore(setup.abstract, 1)
            report[f"{job} {saved_on} {name}"] = compared(
                setup, state, values(setup, job, saved_on)
            )
    return report


def main(root, port, count, index, pairs):
    startup.initialize(f"127.0.0.1:{port}", int(count), int(index))
    assert jax.process_count() == int(count) and jax.device_count() == 4
    found = setups()
    save_all(found, Path(root), count)
    report = restore_all(found, Path(root), PAIRS[pairs])
    (Path(root) / f"{count}_{index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
