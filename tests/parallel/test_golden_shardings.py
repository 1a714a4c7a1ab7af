"""Sharding tables as text, so that a change of the rules or of a model is seen."""

from pathlib import Path

import pytest

from vlp_jax.commands import show_sharding

GOLDEN = Path(__file__).with_name("golden")
CASES = {
    **{
        f"{name}_fsdp": [f"configs/{name}.py", "--config.mesh.preset=fsdp"]
        for name in ("mae_b16", "vqa_shapes")
    },
    "siglip_b16_fsdp": ["configs/siglip_b16.py", "--config.mesh.preset=fsdp"],
    "clip_l14_fsdp_tp": [
        "configs/clip_l14.py",
        "--config.mesh.preset=fsdp_tp",
        "--config.mesh.tensor=2",
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_sharding_tables_are_those_that_were_agreed_on(name, capsys):
    config, *overrides = CASES[name]
    file = GOLDEN / f"{name}.txt"
    assert show_sharding.main(["--config", config, *overrides, "--devices", "8"]) == 0
    found = capsys.readouterr().out.splitlines()
    expected = file.read_text().splitlines()
    changed = [
        f"{sign} {line}"
        for sign, lines, others in (("-", expected, found), ("+", found, expected))
        for line in lines
        if line not in others
    ]
    command = f"python -m tools.show_sharding --config {config} {' '.join(overrides)} --devices 8"
    assert found == expected, (
        "the sharding table has changed:\n"
        + "\n".join(changed)
        + f"\nIf that is meant: {command} > tests/parallel/golden/{file.name}"
    )
