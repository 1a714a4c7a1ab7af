"""Saved on any mesh by one process or two, restored on any mesh by one or two: the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import helpers
import jax
import pytest
import restore_matrix
from test_processes import ROOT, free_port


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """processes -> what each of them has found on restoring."""
    root = tmp_path_factory.mktemp("matrix")
    found = restore_matrix.setups()
    restore_matrix.save_all(found, root, "1")
    port, script = str(free_port()), str(Path(restore_matrix.__file__))
    started = [
        subprocess.Popen(
            [sys.executable, script, str(root), port, "2", str(index)],
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
    return {"1": [restore_matrix.restore_all(found, root)], "2": two}


@pytest.fixture(scope="module")
def parameters():
    """How many numbers the parameters are."""
    setup = helpers.setup_on(helpers.tiny_config(), {"replica": 8})
    return sum(leaf.size for leaf in jax.tree.leaves(setup.abstract.params))


@pytest.mark.parametrize("restored_by", restore_matrix.JOBS)
@pytest.mark.parametrize("saved_by", restore_matrix.JOBS)
@pytest.mark.parametrize("restored_on", restore_matrix.MESHES)
@pytest.mark.parametrize("saved_on", restore_matrix.MESHES)
def test_every_pair_is_bit_identical(
    reports, parameters, saved_on, restored_on, saved_by, restored_by
):
    pairs = [report[f"{saved_by} {saved_on} {restored_on}"] for report in reports[restored_by]]
    assert [pair["different"] for pair in pairs] == [[]] * int(restored_by)
    # Together the processes have looked at the whole: parameters, two moments, average, 3 counts.
    assert sum(pair["bytes"] for pair in pairs) == 4 * (4 * parameters + 3)
