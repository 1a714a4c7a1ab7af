"""The narrow form of a config that is measured for the work of the host."""

import pytest

from tools.perf import overhead
from vlp_jax.training.step import CompiledSteps


@pytest.mark.parametrize(
    ("name", "depths"),
    [
        ("clip_l14", {"image": 24, "text": 12}),
        ("siglip_b16", {"image": 12, "text": 12}),
        ("mae_l16", {"image": 24, "decoder": 8}),
    ],
)
def test_it_has_the_layers_of_the_config(name, depths):
    narrow = overhead.narrow_config(f"configs/{name}.py", None).objective
    assert {tower: narrow[tower].depth for tower in depths} == depths
    assert narrow.image.width == 32
    # The host's work for a step depends on how often it is logged.
    assert overhead.narrow_config(f"configs/{name}.py", None).log.every.steps == 100
    narrow = overhead.narrow_config(f"configs/{name}.py", 6).objective
    assert {narrow[tower].depth for tower in depths} == {6}


@pytest.mark.slow
def test_the_host_is_measured_for_each_number_of_steps_in_a_program(monkeypatch):
    handed = []
    original = CompiledSteps.__call__

    def noted(self, state, *batches):
        handed.append(len(batches))
        return original(self, state, *batches)

    monkeypatch.setattr(CompiledSteps, "__call__", noted)
    found = overhead.measure_host("configs/siglip_b16.py", 1, 9, (1, 3))
    assert found.keys() == {"host_1_a_dispatch", "host_3_a_dispatch"}
    # Warm-up: the first by itself, and what is left at the end; then three programs of three.
    assert handed == [1, 3, 3, 3, 3, 1, 1, 3, 3, 3]
    for figures in found.values():
        parts = [figures[f"{name}_microseconds"] for name in ("dispatch", "report", "rest")]
        assert all(part > 0 for part in parts)
        assert figures["host_microseconds"] == pytest.approx(sum(parts))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--steps-per-dispatch", "10", "0"], "--steps-per-dispatch must be at least 1, not 0"),
        (["--json", "no/such/folder/x.json"], "its folder does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert overhead.main(arguments) == 2
    assert message in capsys.readouterr().err
