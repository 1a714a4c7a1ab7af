"""Saved on any mesh by one process or two, restored on any mesh by one or two: the same bits."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import restore_matrix
from test_processes import ROOT, free_port


def restored(root, pairs):
    """processes -> what each of them has found on restoring."""
    found = restore_matrix.setups()
    restore_matrix.save_all(found, root, "1")
    port, script = str(free_port()), str(Path(restore_matrix.__file__))
    started = [
        subprocess.Popen(
            [sys.executable, script, str(root), port, "2", str(index), pairs],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "2",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    for process in started:
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output
    two = [json.loads((root / f"2_{index}.json").read_text()) for index in range(2)]
    return {"1": [restore_matrix.restore_all(found, root, restore_matrix.PAIRS[pairs])], "2": two}


@pytest.fixture(scope="module")
def size():
    """Bytes of the state."""
    abstract = restore_matrix.setups(("dp",))["dp"].abstract
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def check_pairs(reports, size, pairs):
    """Every pair of meshes, saved and restored by one process and by two."""
    for saved_by, restored_by in itertools.product(restore_matrix.JOBS, repeat=2):
        for saved_on, restored_on in restore_matrix.PAIRS[pairs]:
            name = f"{saved_by} {saved_on} {restored_on}"
            found = [report[name] for report in reports[restored_by]]
            assert [pair["different"] for pair in found] == [[]] * int(restored_by), name
            # Together the processes have looked at the whole state.
            assert sum(pair["bytes"] for pair in found) == size, name


@pytest.mark.slow
def test_some_pairs_are_bit_identical(tmp_path, size):
    check_pairs(restored(tmp_path, "quick"), size, "quick")


@pytest.mark.slow
def test_every_pair_is_bit_identical(tmp_path, size):
    assert len(restore_matrix.PAIRS["all"]) == 9
    check_pairs(restored(tmp_path, "all"), size, "all")
