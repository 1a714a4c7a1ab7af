import threading
import time

from vlp_jax.observe.goodput import Heartbeat


def test_it_beats_by_itself_and_on_request_and_once_at_the_end():
    beats, beaten = [], threading.Event()

    def beat():
        beats.append(threading.current_thread())
        beaten.set()

    with Heartbeat(beat, interval=0.01):
        assert beaten.wait(5)
    beats.clear()
    beaten.clear()
    with Heartbeat(beat, interval=1000) as heartbeat:
        assert not beats
        heartbeat.soon()
        assert beaten.wait(5)
        assert len(beats) == 1
    assert len(beats) == 2 and threading.main_thread() not in beats


def test_the_caller_does_not_wait_for_a_slow_disk_and_at_the_end_only_so_long():
    release = threading.Event()
    begin = time.monotonic()
    with Heartbeat(lambda: release.wait(20), interval=1000, patience=0.05) as heartbeat:
        heartbeat.soon()
    assert time.monotonic() - begin < 10
    release.set()
