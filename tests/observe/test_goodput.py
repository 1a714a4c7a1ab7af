"""The time of a run over several processes, with clocks that a test turns by hand."""

import json

import pytest
from etils import epath

from vlp_jax.observe.goodput import (
    MAX_MARKS,
    OwnTime,
    RunLedger,
    RunTime,
    goodput_metrics,
    in_order,
)


class Machine:
    """Time that passes for the processes of one run, one after the other."""

    def __init__(self, folder):
        self.path = epath.Path(folder) / "goodput.json"
        self.now = 1_700_000_000.0
        self.warnings = []

    def start(self, step, start_seconds=10.0):
        """A process that took `start_seconds` up to the point where it reads the ledger."""
        self.own = {"start": start_seconds}
        self.steps = 0
        self.now += start_seconds
        own = self.own
        self.ledger = RunLedger(
            self.path,
            lambda: OwnTime(dict(own), self.steps),
            self.warnings.append,
            lambda: self.now,
        )
        self.ledger.begin(step)
        self.ledger.write()

    def spend(self, cause, seconds):
        self.own[cause] = self.own.get(cause, 0.0) + seconds
        self.now += seconds

    def step(self, count=1, seconds=2.0):
        for _ in range(count):
            self.spend("useful", seconds)
            self.steps += 1

    def save(self, step, seconds=1.0):
        self.spend("checkpoint", seconds)
        self.ledger.saved(step)
        self.ledger.write()

    def file(self):
        return json.loads(self.path.read_text())


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_one_process_adds_up(machine):
    machine.start(0)
    machine.step(5)
    machine.save(5)
    machine.spend("evaluation", 4)
    machine.ledger.end("complete")
    machine.ledger.write()
    found = machine.file()
    expected = {"useful": 10, "start": 10, "checkpoint": 1, "evaluation": 4, "down": 0}
    assert found["seconds"] == pytest.approx(expected)
    assert (found["starts"], found["steps_done"], found["steps_lost"]) == (1, 5, 0)
    assert found["ended"] == "complete" and machine.warnings == []
    assert sum(found["seconds"].values()) == pytest.approx(found["alive_at"] - found["began_at"])


def test_killed_and_resumed_at_the_last_save(machine):
    machine.start(0)
    machine.step(4, seconds=2)
    machine.save(4)
    machine.step(3, seconds=5)
    machine.ledger.write()  # the last sign of life
    machine.step(1, seconds=7)  # nobody will ever know of it
    machine.now += 100
    machine.start(4)
    found = machine.file()
    assert found["seconds"]["useful"] == pytest.approx(8)
    assert found["seconds"]["lost work"] == pytest.approx(15)
    assert found["seconds"]["down"] == pytest.approx(107)
    assert found["seconds"]["start"] == pytest.approx(20)
    assert (found["starts"], found["steps_done"], found["steps_lost"]) == (2, 7, 3)
    assert found["step"] == 4 and found["ended"] is None
    machine.step(3, seconds=2)  # replayed
    machine.save(7)
    found = machine.file()
    assert found["seconds"]["useful"] == pytest.approx(14)
    assert (found["step"], found["steps_done"], found["steps_lost"]) == (7, 10, 3)
    assert sum(found["seconds"].values()) == pytest.approx(found["alive_at"] - found["began_at"])


def test_killed_over_and_over_before_a_save(machine):
    for _ in range(3):
        machine.start(0)
        machine.step(2)
        machine.ledger.write()
    machine.start(0)
    found = machine.file()
    assert found["seconds"]["useful"] == 0 and found["seconds"]["lost work"] == pytest.approx(12)
    assert (found["starts"], found["steps_done"], found["steps_lost"]) == (4, 6, 6)


def test_set_back_to_an_older_step_across_processes(machine):
    machine.start(0)
    machine.step(4, seconds=1)
    machine.save(4)
    machine.step(4, seconds=2)
    machine.save(8)
    machine.start(8)
    machine.step(4, seconds=3)
    machine.save(12)
    machine.start(4)  # the checkpoints of 8 and 12 were damaged, say
    found = machine.file()
    assert found["seconds"]["useful"] == pytest.approx(4)
    assert found["seconds"]["lost work"] == pytest.approx(8 + 12)
    assert (found["steps_done"], found["steps_lost"], found["step"]) == (12, 8, 4)
    assert [step for step, _ in found["marks"]] == [0, 4]


def test_between_two_marks_it_is_in_proportion(machine):
    machine.start(0)
    machine.step(10, seconds=1)
    machine.save(10)
    machine.step(10, seconds=3)
    machine.save(20)
    machine.start(15)
    assert machine.file()["seconds"]["useful"] == pytest.approx(10 + 15)


def test_a_checkpoint_that_is_newer_than_the_ledger(machine):
    machine.start(0)
    machine.step(2)
    machine.ledger.write()
    machine.start(6)
    found = machine.file()
    assert "lost work" not in found["seconds"] and found["seconds"]["useful"] == pytest.approx(4)
    assert (found["step"], found["steps_done"], found["steps_lost"]) == (6, 6, 0)


def test_marks_do_not_grow_and_old_ones_are_thinned_out(machine):
    machine.start(0)
    for step in range(1, 3 * MAX_MARKS):
        machine.step(seconds=1)
        machine.save(step, seconds=0)
    marks = machine.file()["marks"]
    assert len(marks) <= MAX_MARKS and marks[0] == [0, 0]
    assert [step for step, _ in marks[-50:]] == list(range(3 * MAX_MARKS - 50, 3 * MAX_MARKS))
    machine.start(101)
    assert machine.file()["seconds"]["useful"] == pytest.approx(101)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 2, "began_at": 0.0, "alive_at": 0.0}',
        '{"format": 1, "began_at": 0.0, "alive_at": 0.0, "seconds": {"useful": "x"}}',
        '{"format": 1, "began_at": 0.0, "alive_at": NaN}',
        '{"format": 1, "began_at": 0.0, "alive_at": 0.0, "marks": [[1]]}',
        '{"format": 1, "began_at": 0.0, "alive_at": 0.0, "step": "7"}',
        '{"format": 1, "began_at": 0.0, "alive_at": 0.0, "colour": 1}',
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_ledger_is_begun_anew_with_a_warning(machine, damage):
    machine.path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    machine.start(30)
    assert len(machine.warnings) == 1 and "counted anew from step 30" in machine.warnings[0]
    machine.step(5)
    machine.save(35)
    found = machine.file()
    assert (found["starts"], found["step"], found["steps_done"]) == (1, 35, 5)
    machine.start(20)  # of what was before the ledger, it knows nothing
    found = machine.file()
    assert (found["steps_lost"], found["seconds"]["lost work"]) == (5, pytest.approx(10))
    assert found["seconds"]["useful"] == 0 and len(machine.warnings) == 1


def test_a_ledger_that_is_gone_is_warned_of_in_a_run_that_has_begun(machine):
    machine.start(0)
    assert machine.warnings == []
    machine.path.unlink()
    machine.start(12)
    assert "it is not there" in machine.warnings[0]


def test_a_clock_that_is_set_back_or_leaps_while_the_run_is_down(machine):
    machine.start(0)
    machine.step(2)
    machine.ledger.write()
    machine.now -= 5000
    machine.start(0)
    assert machine.file()["seconds"]["down"] == 0
    machine.ledger.write()
    machine.now += 5000
    machine.start(0)
    assert machine.file()["seconds"]["down"] == pytest.approx(5000)


def test_a_clock_that_leaps_while_the_run_is_up_changes_no_cause(machine):
    machine.start(0)
    machine.step(2)
    machine.now += 5000
    machine.step(2)
    machine.save(4)
    assert machine.file()["seconds"] == pytest.approx(
        {"start": 10, "useful": 8, "checkpoint": 1, "down": 0}
    )
    machine.now -= 5000
    machine.step(1)
    machine.ledger.write()
    machine.start(4)
    found = machine.file()["seconds"]
    assert (found["useful"], found["lost work"], found["down"]) == pytest.approx((8, 2, 0))


def test_a_full_disk_is_warned_of_once_and_tolerated(machine, monkeypatch):
    machine.start(0)
    before = machine.path.read_text()

    def full(self, text):
        self._original = text
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(machine.path), "write_bytes", full)
        machine.step(3)
        machine.save(3)
        machine.save(4)
    assert len(machine.warnings) == 1 and "No space left" in machine.warnings[0]
    assert machine.path.read_text() == before
    machine.ledger.write()
    assert machine.file()["steps_done"] == 3 and len(machine.warnings) == 1


def test_metrics_and_their_order():
    seconds = {"down": 1.0, "garbage collection": 2.0, "data wait": 2.0, "useful": 5.0}
    assert list(in_order(seconds)) == ["useful", "data wait", "garbage collection", "down"]
    assert goodput_metrics(seconds) == {
        "goodput/useful_fraction": 0.5,
        "goodput/useful_seconds": 5.0,
        "goodput/data_wait_seconds": 2.0,
        "goodput/garbage_collection_seconds": 2.0,
        "goodput/down_seconds": 1.0,
    }


def test_json_there_and_back():
    time = RunTime(1.0, 2.5, 1, {"useful": 1.5}, 3, 4, 1, [(0, 0.0), (3, 1.5)], "complete")
    assert RunTime.from_json(time.to_json()) == time
