"""What can be said of launch/'s files without running them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import LAUNCH, ROOT

SHELL = sorted([*LAUNCH.glob("*.sh"), *(LAUNCH / "env").glob("*.sh")])


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [shellcheck, "--external-sources", f"--source-path={ROOT}", *SHELL],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", SHELL, ids=lambda f: f.name)
def test_sizes_keep_a_reader(file):
    lines = file.read_text().splitlines()
    assert len(lines) <= 400
    assert max(len(line) for line in lines if "https://" not in line) <= 120
    begin = None
    for number, line in enumerate(lines):
        if re.match(r"[a-z_]+\(\) [{(]", line) and not line.endswith("}"):
            begin = number
        elif line == "}" and begin is not None:
            assert number - begin < 60, f"{file}: {lines[begin]}"


def instructions(text):
    """(instruction, arguments) of a container file, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip():
            yield tuple(line.split(None, 1))


def test_the_container_file():
    """https://docs.docker.com/reference/dockerfile/"""
    found = list(instructions((LAUNCH / "Dockerfile").read_text()))
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENV", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in found} <= known and found[0][0] == "FROM"
    for name, rest in found:
        if name == "RUN":
            checked = subprocess.run(["sh", "-n"], input=rest, text=True, capture_output=True)
            assert checked.returncode == 0, (rest, checked.stderr)
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert list(ROOT.glob(source)), f"COPY {source}: there is no such file"
    last_user = [rest for name, rest in found if name == "USER"][-1]
    assert last_user not in ("root", "0")
    assert dict(found)["ENTRYPOINT"].startswith("[") and "tini" in dict(found)["ENTRYPOINT"]
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    for source in {s for n, r in found if n == "COPY" for s in r.split()[:-1]}:
        assert f"!{source.removeprefix('./')}" in ignored, f"{source} is not in the build context"


@pytest.mark.parametrize("name", ["cpu", "gpu", "tpu", "npu"])
def test_the_container_installs_what_an_accelerator_needs(name, tmp_path):
    """Runs the instruction that installs, with a pip that says what it is asked for."""
    runs = [
        rest for kind, rest in instructions((LAUNCH / "Dockerfile").read_text()) if kind == "RUN"
    ]
    (install,) = [rest for rest in runs if "requirements.txt" in rest]
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ACCELERATOR": name}
    done = subprocess.run(["sh", "-c", install], capture_output=True, text=True, env=env)
    if name == "npu":
        assert done.returncode == 2 and "npu" in done.stderr
        return
    files = re.findall(r"requirements\S*\.txt", done.stdout)
    assert files == ["requirements.txt", *([f"requirements-{name}.txt"] if name != "cpu" else [])]
    assert all((ROOT / file).exists() for file in files)


def test_the_readme_names_what_there_is():
    """Every launcher and option that launch/README.md names exists, and every launcher is named."""
    text = (LAUNCH / "README.md").read_text()
    for name in set(re.findall(r"launch/([a-z_]+\.sh)", text)):
        assert (LAUNCH / name).exists(), name
    options = "".join(file.read_text() for file in SHELL)
    for line in re.findall(r"launch/(?:local|slurm|tpu_vm|gke)\.sh.*(?:\\\n.*)*", text):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line.split(" -- ")[0]):
            assert option in options, f"{option} in: {line}"
    for name in ("local.sh", "slurm.sh", "tpu_vm.sh", "gke.sh", "Dockerfile", "env/"):
        assert name in text
