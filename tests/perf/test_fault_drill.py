"""The fault drill: what it draws, what it takes for wrong, and one of it, small, run for real."""

import json
import random

import numpy as np
import pytest

from tools.perf import fault_drill
from tools.perf.fault_drill import FAULTS
from vlp_jax.errors import UserError


def test_every_kind_is_drawn_as_often_as_the_others():
    drawn = fault_drill.choose(None, 2 * len(FAULTS), random.Random(0))
    assert sorted(drawn) == sorted(2 * list(FAULTS))
    assert drawn != fault_drill.choose(None, 2 * len(FAULTS), random.Random(1))
    assert set(fault_drill.choose("nan,sigterm", 5, random.Random(0))) == {"nan", "sigterm"}


def test_mistakes(tmp_path, capsys):
    with pytest.raises(UserError, match="did you mean 'sigstop'"):
        fault_drill.choose("sigstp", 1, random.Random(0))
    assert fault_drill.main(["--output", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def a_round(fault="kill_one", checkpoints=(8, 16), resumed=16):
    return {"fault": fault, "step": 20, "checkpoints": list(checkpoints), "resumed": resumed}


def test_a_whole_checkpoint_that_was_not_used_is_wrong():
    assert fault_drill.problems([a_round(), a_round(resumed=None)]) == []
    assert fault_drill.problems([a_round("truncate", resumed=8)]) == []
    [line] = fault_drill.problems([a_round(resumed=8)])
    assert "went on from step 8, although the checkpoint of step 16 was whole" in line
    assert fault_drill.problems([a_round("truncate", resumed=0)])


class Ended:
    def __init__(self, losses, parameters):
        self.losses, self.parameters = lambda: losses, lambda: parameters


def test_any_difference_is_found():
    losses = {(0, "train/loss"): 2.0, (1, "train/loss"): 1.0}
    arrays = {"params/a": np.ones(3, np.float32)}
    quiet = Ended(losses, arrays)
    assert fault_drill.differences(quiet, Ended(dict(losses), {"params/a": np.ones(3)})) == []
    [line] = fault_drill.differences(quiet, Ended({**losses, (1, "train/loss"): 1.0000001}, arrays))
    assert "train/loss differs from step 1 on (1 of 2 numbers)" in line
    nearly = {"params/a": np.nextafter(np.ones(3, np.float32), 2, dtype=np.float32)}
    [line] = fault_drill.differences(quiet, Ended(losses, nearly))
    assert "1 of 1 arrays of the last checkpoint differ: params/a" in line
    assert len(fault_drill.differences(quiet, Ended({(0, "train/loss"): 2.0}, {}))) == 2


@pytest.mark.slow
def test_a_drill(tmp_path, shapes_dir):
    file = tmp_path / "drill.json"
    arguments = ["--output", str(tmp_path / "drill"), "--rounds", "4", "--json", str(file)]
    arguments += ["--faults", "kill_one,truncate,sigterm,nan"]
    assert fault_drill.main(arguments) == 0
    record = json.loads(file.read_text())
    assert record["wrong"] == [] and len(record["rounds"]) == 4
    by_fault = {each["fault"]: each for each in record["rounds"]}
    assert set(by_fault["sigterm"]["statuses"]) == {75}
    assert 65 in by_fault["nan"]["statuses"]
    assert by_fault["truncate"]["resumed"] < by_fault["truncate"]["checkpoints"][-1]
