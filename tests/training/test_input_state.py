"""The input's record in a checkpoint: what a run may go on with."""

import types

import pytest

from vlp_jax.data.faults import REASONS
from vlp_jax.errors import UserError
from vlp_jax.training.input_state import InputState


def state_of(fingerprint="a", batch_size=16, accept_other_data=False, bad=0):
    pipe = types.SimpleNamespace(
        source_names=("data",),
        faults=types.SimpleNamespace(
            totals=lambda before: {"read": 16 * before, "bad": {"data": {REASONS[0]: bad}}},
            begin_with=lambda read, bad: None,
        ),
    )
    pipeline = types.SimpleNamespace(
        pipelines=lambda: {"": pipe}, fingerprint=lambda: {"files": fingerprint}
    )
    return InputState(pipeline, batch_size, accept_other_data)


def test_other_data_is_not_taken_for_that_of_the_checkpoint():
    saved = state_of().save(5)
    assert (saved["position"], saved["read"]) == (80, 80)
    state_of().resume(saved, 5)
    with pytest.raises(UserError, match="changed since the checkpoint.*accept_other_data"):
        state_of("b").resume(saved, 5)
    other = state_of("b", accept_other_data=True)
    other.resume(saved, 5)
    assert other.save(6)["read"] == 80 + 96


def test_another_batch_size_is_refused_and_the_old_one_named():
    with pytest.raises(UserError, match="config.batch_size 32; resume with the batch size 16"):
        state_of(batch_size=32).resume(state_of().save(5), 5)


def test_bad_examples_are_counted_over_restarts():
    saved = state_of(bad=2).save(5)
    assert saved["bad"] == [["", "data", REASONS[0], 2]]
    resumed = state_of(bad=1)
    resumed.resume(saved, 5)
    name = f"data/bad/data/{REASONS[0].replace(' ', '_')}"
    assert resumed.metrics(3) == {name: 3, "data/bad_fraction": 3 / (80 + 48)}
