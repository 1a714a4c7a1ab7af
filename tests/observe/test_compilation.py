import threading

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache

from vlp_jax.observe.compilation import Compiled, CompileWatch, describe


@pytest.fixture
def own_cache(tmp_path):
    """An empty cache on disk, in which every program is kept, however short."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path), True, 0.0, -1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def lower(factor):
    return jax.jit(lambda x: jnp.sin(x) * factor).lower(jnp.ones(8))


def test_ahead_of_time_compilation_uses_the_persistent_cache(own_cache):
    lowered = [lower(1.25), lower(1.25)]
    seconds = []
    with CompileWatch(lambda took, name: seconds.append(took)) as watch:
        lowered[0].compile()
        first = watch.so_far()
        assert any(own_cache.iterdir())
        lowered[1].compile()
        second = watch.so_far() - first
    assert (first.programs, first.requests, first.hits) == (1, 1, 0) and not first.from_cache()
    assert (second.programs, second.requests, second.hits) == (1, 1, 1) and second.from_cache()
    assert first.seconds > 0 and sum(seconds) == pytest.approx(watch.so_far().seconds)
    lower(1.5).compile()
    assert watch.so_far().programs == 2  # it has stopped to listen


def test_without_a_cache(own_cache):
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    with CompileWatch() as watch:
        lower(2.5).compile()
    assert watch.so_far().programs == 1 and watch.so_far().requests == 0
    assert "the persistent cache is off" in describe(watch.so_far(), 1.0)


def test_the_callback_is_for_its_own_thread_alone(own_cache):
    lowered, seconds = lower(3.5), []
    with CompileWatch(lambda took, name: seconds.append(took)) as watch:
        thread = threading.Thread(target=lowered.compile)
        thread.start()
        thread.join()
    assert watch.so_far().programs == 1 and seconds == []


def test_how_it_is_told():
    assert describe(Compiled(1, 9.0, 1, 0, 0.0), 9.2).endswith("it was not in the persistent cache")
    told = describe(Compiled(1, 0.4, 1, 1, 30.0), 0.5)
    assert told == "the step in 0.5 s, from the persistent cache, which saved 30.0 s"
