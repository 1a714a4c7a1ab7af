"""The narrow form of a config that is measured for the work of the host."""

import pytest

from tools import bench_overhead


@pytest.mark.parametrize(
    ("name", "depths"),
    [
        ("clip_l14", {"image": 24, "text": 12}),
        ("siglip_b16", {"image": 12, "text": 12}),
        ("mae_l16", {"image": 24, "decoder": 8}),
    ],
)
def test_it_has_the_layers_of_the_config(name, depths):
    narrow = bench_overhead.narrow_config(f"configs/{name}.py", None).objective
    assert {tower: narrow[tower].depth for tower in depths} == depths
    assert narrow.image.width == 32
    narrow = bench_overhead.narrow_config(f"configs/{name}.py", 6).objective
    assert {narrow[tower].depth for tower in depths} == {6}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is at least 1, not 0"),
        (["--json", "no/such/folder/x.json"], "its folder does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert bench_overhead.main(arguments) == 2
    assert message in capsys.readouterr().err
