"""Several processes that are told to stop leave together: at the same look, or at once if one of
them has not begun; nobody else asks JAX."""

import os
import signal
import threading
import time

import jax
import pytest
from jax.experimental import multihost_utils

from tests.training.helpers import fresh, setup_on, tiny_config
from vlp_jax.parallel import agreement
from vlp_jax.training import preemption
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.preemption import PreemptionWatch


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
