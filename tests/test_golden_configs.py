"""Every config is built, sharded and traced on 8 devices; its parameters are as agreed upon.

A file of `golden/` has the table that show-sharding prints: the path, dimensions, mesh axes and
bytes of each parameter. A change of a model, a config or a sharding rule shows as a difference.
"""

from pathlib import Path

import jax
import pytest

from vlp_jax.commands import show_sharding
from vlp_jax.parallel import rules
from vlp_jax.parallel.mesh import make_mesh
from vlp_jax.training.abstract_setup import abstract_setup

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("golden")
# finetune.py has no model until it has a source of weights: tests/interop/test_finetune.py.
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py") if path.stem != "finetune")
CASES = {
    **{name: [name, "--config.mesh.preset=fsdp"] for name in NAMES if name != "mae_then_clip"},
    **{
        f"mae_then_clip_{stage}": [f"mae_then_clip:{stage}", "--config.mesh.preset=fsdp"]
        for stage in ("mae", "clip")
    },
    "clip_l14_fsdp_tp": ["clip_l14", "--config.mesh.preset=fsdp_tp", "--config.mesh.tensor=2"],
}


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_shardings_are_those_agreed_upon_and_the_step_is_traced(case):
    name, *overrides = CASES[case]
    command = ["--config", name, *overrides, "--devices", "8"]
    arguments, config = show_sharding.parse(command)
    mesh = make_mesh(config.mesh, jax.devices()[:8])
    setup = abstract_setup(config, mesh, show_sharding.ANY_EPOCH)

    found = show_sharding.text(show_sharding.make_report(arguments.config, setup)).splitlines()
    file = GOLDEN / f"{case}.txt"
    expected = file.read_text().splitlines() if file.exists() else []
    changed = [
        f"{sign} {line}"
        for sign, lines, others in (("-", expected, found), ("+", found, expected))
        for line in lines
        if line not in others
    ]
    assert found == expected, (
        "the parameters or their shardings have changed:\n"
        + "\n".join(changed)
        + f"\nIf that is meant: vlp-jax show-sharding {' '.join(command)} "
        + f"> {file.relative_to(ROOT)}"
    )

    with rules.use_mesh(mesh):
        state, metrics = jax.eval_shape(setup.step, setup.abstract, setup.batch_spec)
    assert "loss" in metrics

    def shapes(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert shapes(state) == shapes(setup.abstract)


def test_every_golden_file_has_its_config():
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)
