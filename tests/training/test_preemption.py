"""Of several processes all stop at the same look, which holds if nobody else asks JAX."""

import jax
import pytest
from jax.experimental import multihost_utils

from tests.training.helpers import fresh, setup_on, tiny_config
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.preemption import PreemptionWatch


@pytest.fixture
def asked(monkeypatch):
    """The numbers that JAX is asked for; like it, `asked.stop` is met by that number alone."""

    class Asked(list):
        stop = None

        def __call__(self, number):
            self.append(number)
            return number == self.stop

    asked = Asked()
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked)
    return asked


def test_looks_are_counted_whatever_the_steps_between_them(asked, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    asked.stop = 4  # the next number after that of the process that had come the furthest
    watch = PreemptionWatch()
    assert [watch(step) for step in (600, 608, 616, 617, 620)] == [False] * 3 + [True, False]
    assert asked == [1, 2, 3, 4, 5]


def test_a_save_does_not_ask(asked, tmp_path):
    setup = setup_on(tiny_config(), {}, 1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, fresh(setup), {"position": 0})
        checkpointer.finish(7)
    assert checkpointer.latest_step() == 7 and asked == []
