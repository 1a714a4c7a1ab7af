"""Several processes that are told to stop leave together: at the same look, or at once if one of
them has not begun; nobody else asks JAX."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
import types
from pathlib import Path
from unittest.mock import MagicMock

import jax
import pytest
from jax.experimental import multihost_utils

from tests.training.helpers import fresh, setup_on, tiny_config
from vlp_jax import signals, train
from vlp_jax.errors import Preempted
from vlp_jax.evaluators.base import Scores
from vlp_jax.parallel import agreement
from vlp_jax.training import preemption
from vlp_jax.training import setup as setup_lib
from vlp_jax.training import workdir as workdir_lib
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.command import run_command
from vlp_jax.training.loop import Evaluation, Loop
from vlp_jax.training.preemption import PreemptionWatch

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_save_does_not_ask_jax(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    setup = setup_on(tiny_config(), {}, 1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, fresh(setup), {"position": 0})
        checkpointer.finish(7)
    assert checkpointer.latest_step() == 7 and asked == []


class Others:
    """The notice of a job whose other process has answered `looks`; the real one needs two."""

    def __init__(self, looks, hears=False):
        self.looks, self.hears, self.asked = looks, hears, []

    def give(self):
        self.hears = True

    def given(self):
        return self.hears

    def answers(self, question, own, patient):
        self.asked.append((question, own))
        return [own, self.looks if question == "looks" else own]


@pytest.fixture
def watching(monkeypatch):
    """Begins to watch as the first of two processes: the watch, and the statuses it ends with."""
    opened = []
    monkeypatch.setattr(preemption, "LOOK_SECONDS", 0.01)

    def watch(others):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(agreement, "Notice", lambda name: others)
        ended = []
        opened.append(PreemptionWatch(end=ended.append).__enter__())
        return opened[0], ended

    yield watch
    opened[0].__exit__(None, None, None)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("furthest", [3, 7])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, None])
def test_all_stop_at_the_look_after_the_furthest(watching, furthest, number):
    """Whatever the steps between two looks, and whether this process was told or the other."""
    others = Others(furthest)
    watch, ended = watching(others)
    watch.begin()
    looks = [watch(step) for step in (600, 608, 616)]
    if number is None:
        others.give()
    else:
        os.kill(os.getpid(), number)
    until(lambda: others.asked)
    looks += [watch(step) for step in range(617, 617 + furthest - 2)]
    assert looks == [False] * furthest + [True] and ended == []
    assert others.asked == [("looks", 3)] and others.hears


@pytest.mark.parametrize("own_begun", [True, False])
def test_all_end_at_once_while_one_of_them_starts(watching, own_begun, capfd):
    watch, ended = watching(others := Others(None if own_begun else 5))
    if own_begun:
        watch.begin()
    os.kill(os.getpid(), signal.SIGTERM)
    until(lambda: ended)
    assert ended == [75] and others.asked == [("looks", 0 if own_begun else None), ("leave", True)]
    assert capfd.readouterr().err.count("told to stop while the run started") == 1


def test_a_process_that_is_told_by_nobody_ends_its_watch_at_once(watching):
    watch, ended = watching(Others(0))
    begin = time.monotonic()
    watch.__exit__(None, None, None)
    assert time.monotonic() - begin < 5 and ended == []
    assert "preemption" not in {thread.name for thread in threading.enumerate()}


def loop_with(evaluators, preempted, interruptible=contextlib.nullcontext):
    """A loop that evaluates before its first batch; all of its other parts are mocks."""
    evaluations = [
        Evaluation(f"{i}", lambda step: True, types.SimpleNamespace(outcome=outcome))
        for i, outcome in enumerate(evaluators)
    ]
    fields = {field.name: MagicMock() for field in dataclasses.fields(Loop)}
    fields |= {"evaluations": evaluations, "first_step": 4, "last_step": 9}
    made = Loop(**fields | {"preempted": preempted, "interruptible": interruptible})
    made.monitor.skipping = False
    return made


def test_an_evaluation_is_left_and_the_step_before_it_saved():
    """In a job of one process: it begins anew when the run goes on from this step."""

    def evaluator(params):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("it was finished")

    with signals.heard(), PreemptionWatch() as watch:
        watch.begin()
        loop = loop_with([evaluator], watch, watch.interruptible)
        with pytest.raises(Preempted, match="run the same command to go on"):
            loop.run(MagicMock())
        os.kill(os.getpid(), signal.SIGINT)  # saves are not left
    [call] = loop.checkpointer.save.call_args_list
    assert call.args[0] == 4 and not loop.program_of.called
    loop.checkpointer.finish.assert_called_once_with(4)


def test_several_processes_stop_between_two_evaluators():
    """All ask equally often, so that all leave out the same."""
    asked, first, second = (
        [],
        MagicMock(return_value=Scores({})),
        MagicMock(return_value=Scores({})),
    )

    def preempted(step):
        asked.append(step)
        return len(asked) == 2

    loop = loop_with([first, second], preempted)
    with pytest.raises(Preempted):
        loop.run(MagicMock())
    assert first.called and not second.called and asked == [4, 4]
    assert loop.checkpointer.save.call_args.args[0] == 4


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT, None])
def test_a_command_that_is_told_to_stop_ends_in_one_line(told, capsys):
    """A finally of the command is done; a program's own KeyboardInterrupt is no traceback."""
    left = []

    def command():
        try:
            if told is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), told)
            time.sleep(5)
        finally:
            left.append(True)

    assert run_command(command) == 75 and left == [True]
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("told to stop") and line.endswith("run the same command to go on")


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_while_it_opens_its_data(told, monkeypatch, tmp_path, capsys):
    def opening(*_):
        os.kill(os.getpid(), told)
        time.sleep(5)

    monkeypatch.setattr(setup_lib, "make_pipeline", opening)
    monkeypatch.setattr(workdir_lib, "open_tokenizer", lambda *_: None)
    config = str(ROOT / "configs" / "demo.py")
    assert train.main(["--config", config, "--workdir", str(tmp_path / "run")]) == 75
    assert capsys.readouterr().err.splitlines()[-1].startswith("told to stop (")
    assert not (tmp_path / "run" / "config.json").exists()
