"""tools.show_sharding: what it says of a config on a mesh, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import fake_devices
import jax
import numpy as np
import pytest
import runs
from recipe_shapes import count, load, shapes_of

from vlp_jax.commands import show_sharding
from vlp_jax.parallel import rules
from vlp_jax.training.abstract_setup import abstract_setup

ROOT = Path(__file__).resolve().parent.parent


def test_the_command_adds_up_and_needs_no_devices_of_its_own(tmp_path):
    arguments = ["--config", "configs/clip_shapes.py", "--devices", "16", "--json", "o.json"]
    overrides = ["--config.mesh.preset=fsdp_tp", "--config.mesh.tensor=4"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.show_sharding", *arguments[:-1], tmp_path / "o.json"]
        + overrides,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["mesh"] == {"replica": 1, "fsdp": 4, "tensor": 4}
    shapes = shapes_of(load("clip_shapes"))
    assert {row["path"]: tuple(row["shape"]) for row in found["rows"]} == {
        path: leaf.shape for path, leaf in shapes.items()
    }
    assert found["params"]["total"] == 4 * count(shapes)
    assert found["params"]["per_device"] == sum(row["bytes_per_device"] for row in found["rows"])
    whole = {row["path"] for row in found["rows"] if not any(row["spec"])}
    assert set(found["whole"]) == whole >= {"logit_scale"}
    assert f"{count(shapes):,} parameters in {len(shapes)} arrays" in done.stdout
    kernel = next(
        line for line in done.stdout.splitlines() if "image/encoder/layers/mlp/up/k" in line
    )
    assert "embed=192/fsdp mlp=768/tensor" in kernel or "/fsdp mlp=" in kernel
    assert kernel.split()[-1].replace(",", "") == str(
        4 * np.prod(shapes["image/encoder/layers/mlp/up/kernel"].shape) // 16
    )


def warnings_on(name, *shape):
    setup = abstract_setup(load(name), fake_devices.mesh(*shape), 1000)
    report = show_sharding.make_report(name, setup)
    return report, "\n".join(report.warnings)


def test_a_tensor_axis_that_divides_no_heads_is_warned_of():
    report, text = warnings_on("siglip_b16", 1, 2, 8)
    # Of three attentions: kernels and biases of query, key and value, and the kernel of out.
    assert "tensor 8 does not divide 12 heads: 21 parameters lie whole along them" in text
    assert "12 heads" not in warnings_on("siglip_b16", 1, 2, 4)[1]
    assert report.mesh["tensor"] == 8


def test_what_lies_whole_is_named_only_where_the_mesh_shards():
    report, text = warnings_on("siglip_b16", 1, 256, 1)
    assert "image/encoder/layers/attention/query/bias" in report.whole  # neither 12 nor 64
    assert "logit_scale" in report.whole and "norm" not in " ".join(report.whole)
    assert f"on every device: {len(report.whole)}, of" in text and report.state.ratio > 1.05
    assert "\n  logit_scale" in show_sharding.text(report)
    report, text = warnings_on("siglip_b16", 16, 1, 1)
    assert report.whole == [] and text == "" and report.state.ratio == 1


def test_a_row_per_parameter_and_the_totals_of_a_spread():
    setup = abstract_setup(load("clip_shapes"), fake_devices.mesh(2, 4, 1), 1000)
    spread = rules.spread({"a": setup.abstract.params["logit_scale"]}, setup.mesh)
    assert (spread.total, spread.per_device, spread.ratio) == (4, 4, 4.0)
    kernel = setup.abstract.params["image_projection"]["kernel"]
    assert rules.spread(kernel, setup.mesh).ratio == 1.0  # replicas are no waste
    assert rules.spread({}, setup.mesh).ratio == 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "configs/none.py"], "configs/none.py does not exist"),
        (["--devices", "0"], "--devices must be at least 1"),
        (["--slices", "2"], "--slices needs --topology"),
        (["--topology", "v5e:3x3"], "'v5e:3x3' does not exist; those of v5e: v5e:1x1,"),
        (["--config.mesh.preset=fsdpp"], "did you mean 'fsdp'"),
        (["--config.mesh.replica=3"], "does not fit the 8 devices"),
        (["--config.tokenizer.vocab_size=None"], "set --config.tokenizer.vocab_size"),
        (["--json", "no/such/folder/o.json"], "--json no/such/folder/o.json: "),
    ],
)
def test_mistakes(arguments, words, capsys):
    if "--config" not in arguments:
        arguments = ["--config", "configs/debug_gpu.py", *arguments]
    assert show_sharding.main([*arguments]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_config_that_takes_its_model_from_weights_has_it(tmp_path, monkeypatch, capsys):
    preprocess = {"decode_image": {}, "resize": {"size": 24}}
    runs.write_run(runs.run_config(runs.CLIP, runs.SUBWORD, preprocess), tmp_path)
    monkeypatch.setattr(show_sharding, "find_devices", lambda arguments: jax.devices()[:2])
    source = f"--config.init_from.source={tmp_path}"
    assert show_sharding.main(["--config", "finetune", source]) == 0
    assert "text/encoder/layers/attention" in capsys.readouterr().out
