"""`vlp-jax SUBCOMMAND`: from a checkout, and installed from a wheel outside of it."""

import importlib
import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from vlp_jax import config as config_lib
from vlp_jax.__main__ import COMMANDS, main
from vlp_jax.arguments import make_parser, parse_with_overrides
from vlp_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_help_lists_every_subcommand_with_a_line(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(COMMANDS) <= 14
    for name in COMMANDS:
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert len(line.split()) > 4 and len(line) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_has_a_main_and_a_module_of_a_checkout(name):
    assert callable(importlib.import_module(f"vlp_jax.{COMMANDS[name][0]}").main)
    if COMMANDS[name][0].startswith("commands."):
        entry = importlib.import_module(f"tools.{name.replace('-', '_')}")
        assert entry.main is importlib.import_module(f"vlp_jax.{COMMANDS[name][0]}").main


@pytest.mark.parametrize(("name", "words"), [("trian", "did you mean 'train'"), ("", "usage:")])
def test_mistakes(name, words, capsys):
    assert main([name] if name else []) == 2
    assert words in capsys.readouterr().err


def test_the_subcommand_gets_the_other_arguments(capsys):
    assert main(["plan", "--config", "no_such", "--topology", "cpu:8"]) == 2
    assert "unknown key 'no_such' in --config" in capsys.readouterr().err


def test_a_config_is_found_by_file_or_by_bare_name(tmp_path, monkeypatch):
    by_file = config_lib.load(str(ROOT / "configs" / "mae_then_clip.py:clip"))
    monkeypatch.chdir(tmp_path)
    assert config_lib.load("mae_then_clip:clip").to_dict() == by_file.to_dict()
    (tmp_path / "demo").write_text("def get_config(arg): return None")
    with pytest.raises((UserError, AttributeError)):  # a file comes first
        config_lib.load("demo")
    for name in ("dmo", "_recipes"):
        with pytest.raises(UserError, match=f"unknown key '{name}' in --config"):
            config_lib.load(name)


def test_overrides_are_no_abbreviations_and_mistakes_are_one_line():
    parser = make_parser("x", None, config=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[1])
    arguments, overrides = parse_with_overrides(
        parser, ["--config", "demo", "--config.a.b=1", "--steps", "2", "3"], "steps"
    )
    assert (arguments.config, arguments.steps, overrides) == ("demo", [2, 3], ["a.b=1"])
    for argv, words in (
        (["--config", "demo", "--step", "1"], "unknown argument '--step'"),
        (["--config", "demo", "--steps", "2", "0"], "--steps must be at least 1, not 0"),
    ):
        with pytest.raises(UserError, match=words):
            parse_with_overrides(parser, argv, "steps")


def test_the_wheel_has_the_configs_and_the_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"vlp-jax": "vlp_jax.__main__:main"}
    assert config_lib.INSTALLED.resolve() == ROOT / "configs"
    names = {file.suffix for file in (ROOT / "configs").iterdir() if file.is_file()}
    packed = {".py", *(p[1:] for p in project["tool"]["setuptools"]["package-data"][SHARE])}
    assert names <= packed


SHARE = "vlp_jax.share.configs"


@pytest.mark.slow
def test_it_runs_from_a_wheel_in_an_empty_folder(tmp_path):
    """A fresh environment that sees this one's packages, but not the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    wheels, environment, empty = (tmp_path / n for n in ("wheels", "environment", "empty"))
    build = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, tmp_path]
    for name in ("vlp_jax", "configs", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    for file in ROOT.glob("requirements*.txt"):
        (tmp_path / file.name).symlink_to(file)
    subprocess.run([sys.executable, "-m", *build], check=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    (wheel,) = wheels.glob("*.whl")
    python = environment / "bin" / "python"
    install = ["pip", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run([python, "-m", *install], check=True)
    here = Path(sysconfig.get_path("purelib"))
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "zz.pth").write_text(f"{here}\n")
    empty.mkdir()

    def run(*arguments):
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [environment / "bin" / "vlp-jax", *arguments],
            cwd=empty,
            capture_output=True,
            text=True,
            env={**variables, "JAX_PLATFORMS": "cpu"},
        )

    assert "inspect-data" in run("--help").stdout
    told = run("train", "--config", "demo", "--help")
    assert told.returncode == 0 and "--config.batch_size=128" in told.stdout
    found = run("plan", "--config", "debug_cpu", "--topology", "cpu:8", "--json", "plan.json")
    assert found.returncode == 0, found.stderr
    assert (empty / "plan.json").exists()
    code = "import vlp_jax, sys; sys.exit(str(vlp_jax.__file__))"
    where = subprocess.run([python, "-c", code], cwd=empty, capture_output=True, text=True)
    assert where.stderr.strip().startswith(str(environment))
