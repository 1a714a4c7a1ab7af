"""Which code runs: versions of packages, and the commit."""

import shutil
import subprocess
import sys

import jax

from vlp_jax import versions

PRINT = "from vlp_jax.versions import commit; print(commit())"


def test_versions():
    found = versions.versions(["jax", "no-such-package"])
    assert found["jax"] == jax.__version__ and set(found) == {"python", "vlp_jax", "jax"}
    assert sys.version.startswith(found["python"])


def test_commit(tmp_path):
    package = tmp_path / "vlp_jax"
    package.mkdir()
    shutil.copy(versions.__file__, package)

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def printed():
        command = [sys.executable, "-c", PRINT]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout.strip()

    assert printed() == "None"
    git("init", "-q")
    (tmp_path / "other").write_text("a")
    git("add", "other")
    git("commit", "-qm", "of somebody else")
    assert printed() == "None"
    git("add", "vlp_jax/versions.py")
    git("commit", "-qm", "ours")
    head = git("rev-parse", "HEAD")[: versions.DIGITS]
    assert printed() == head
    (tmp_path / "other").write_text("b")
    assert printed() == f"{head}+changes"
