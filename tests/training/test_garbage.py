import contextlib
import gc
import weakref

import pytest

from vlp_jax.training.measures import ScheduledCollection


class Pauses(list):
    @contextlib.contextmanager
    def __call__(self, cause):
        self.append(cause)
        yield


class Node:
    pass


def cycle():
    """A weak reference to an object that only a collection can free."""
    node = Node()
    node.own = node
    return weakref.ref(node)


@pytest.fixture(autouse=True)
def as_before():
    yield
    gc.unfreeze()
    gc.enable()


def test_it_collects_at_multiples_alone():
    pauses = Pauses()
    with ScheduledCollection(10, pauses) as collect:
        assert not gc.isenabled()
        begin = len(pauses)
        garbage = cycle()
        for step in (0, 1, 9, 11):
            collect(step)
        assert garbage() is not None and len(pauses) == begin
        collect(20)
        assert garbage() is None and pauses[begin:] == ["garbage collection"]


def test_what_was_there_before_is_left_out_until_the_end():
    assert gc.get_freeze_count() == 0
    with pytest.raises(RuntimeError), ScheduledCollection(10, Pauses()):
        assert gc.get_freeze_count() > 1000
        raise RuntimeError
    assert gc.get_freeze_count() == 0 and gc.isenabled()


def test_a_state_that_was_another_is_kept():
    gc.disable()
    gc.freeze()
    frozen = gc.get_freeze_count()
    with ScheduledCollection(10, Pauses()):
        pass
    assert not gc.isenabled() and gc.get_freeze_count() >= frozen - 1000 > 0


def test_zero_leaves_it_to_python():
    pauses = Pauses()
    with ScheduledCollection(0, pauses) as collect:
        assert gc.isenabled() and gc.get_freeze_count() == 0
        collect(10)
    assert pauses == []
