"""launch/tpu_vm.sh against a gcloud that records what it is asked for."""

import json
import os
import shlex
import subprocess
import time

import pytest

from .conftest import LAUNCH

SLICE = ["--name", "vlp", "--zone", "us-west4-a", "--topology", "v5e:16x16"]
TRAIN = ["--config", "configs/clip_b16.py", "--workdir", "gs://bucket/run"]


@pytest.fixture
def commands(launcher):
    """A function that gives the commands of a dry run, each as a list of words."""

    def dry_run(*arguments):
        text = launcher("tpu_vm.sh", *arguments[:1], "--dry-run", *arguments[1:]).stdout
        return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]

    return dry_run


# https://docs.cloud.google.com/tpu/docs/v4 /v5e /v5p /v6e and /runtimes
@pytest.mark.parametrize(
    ("topology", "shape", "runtime", "hosts"),
    [
        ("v4:2x2x4", ["--type=v4", "--topology=2x2x4"], "tpu-ubuntu2204-base", 4),
        ("v5e:16x16", ["--accelerator-type=v5litepod-256"], "v2-alpha-tpuv5-lite", 64),
        ("v5e:2x4", ["--accelerator-type=v5litepod-8"], "v2-alpha-tpuv5-lite", 1),
        ("v5p:4x4x8", ["--type=v5p", "--topology=4x4x8"], "v2-alpha-tpuv5", 32),
        ("v6e:16x16", ["--accelerator-type=v6e-256"], "v2-alpha-tpuv6e", 64),
    ],
)
def test_slices_of_every_generation(commands, topology, shape, runtime, hosts):
    where = ["--name", "vlp", "--zone", "z", "--topology", topology]
    (create,) = commands("create", *where, "--spot", "--project", "p")
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "vlp"]
    options = {"--zone=z", "--project=p", "--spot", "--node-id=vlp", f"--runtime-version={runtime}"}
    assert set(create[6:]) == {*options, *shape}
    (start,) = commands("start", *where, "--", *TRAIN)
    remote = shlex.split(start[-1].removeprefix("--command="))
    assert remote[-2:] == ["--expect-processes", str(hosts)]
    assert remote[remote.index("--accelerator") + 1] == "tpu_" + topology.split(":")[0]
    assert "--worker=all" in start


def test_several_slices(commands):
    (create,) = commands("create", *SLICE, "--slices", "2")
    assert {"--node-count=2", "--node-prefix=vlp"} <= set(create)
    assert not [word for word in create if word.startswith("--node-id")]
    starts = commands("start", *SLICE, "--slices", "2", "--", *TRAIN)
    assert [command[5] for command in starts] == ["vlp-0", "vlp-1"]
    assert all(command[-1].endswith("--expect-processes 128") for command in starts)


def test_arguments_survive_two_shells(commands):
    words = ["--config.a=(1, 'two')", '--config.b="x\\y $HOME"']
    (start,) = commands("start", *SLICE, "--", *TRAIN, *words)
    remote = shlex.split(start[-1].removeprefix("--command="))
    assert remote[remote.index("--") + 1 : -2] == [*TRAIN, *words]


def test_watch_shows_the_whole_way(commands):
    steps = commands("watch", *SLICE, "--spot", "--", *TRAIN)
    assert [next(w for w in s if w in WORDS) for s in steps] == [
        *("create", "describe", "archive", "scp", "ssh", "ssh", "describe")
    ]


WORDS = {"create", "describe", "archive", "scp", "ssh", "delete"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create", *SLICE[:4]], "--topology"),
        (
            ["create", "--name", "x", "--zone", "z", "--topology", "v5e:3x3"],
            "whole number of hosts",
        ),
        (["restart", *SLICE], "'restart'"),
        (["start", *SLICE], "no arguments"),
        (["start", *SLICE, "--", "--config", "c", "--workdir", "runs/x"], "gs://"),
        (["start", *SLICE, "--prempt", "1"], "--prempt"),
    ],
)
def test_mistakes(launcher, arguments, says):
    done = launcher("tpu_vm.sh", *arguments[:1], "--dry-run", *arguments[1:], check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr


# The answers of gcloud: STATES has a state per line, the last one stays; the outcome of the worker
# is in OUTCOME; checkpoints are in CHECKPOINTS.
GCLOUD = """#!/bin/bash
echo "$*" >> "$FOLDER/calls"
case "$*" in
  *"queued-resources describe"*)
    head -n 1 "$FOLDER/states"
    (($(wc -l < "$FOLDER/states") == 1)) || sed -i 1d "$FOLDER/states" ;;
  *"tpu_worker.sh outcome"*) cat "$FOLDER/outcome" ;;
  "storage ls"*) [ -s "$FOLDER/checkpoints" ] ||
      { echo "ERROR: One or more URLs matched no objects." >&2; exit 1; }
    cat "$FOLDER/checkpoints" ;;
esac
"""


@pytest.fixture
def cloud(launcher, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gcloud").write_text(GCLOUD)
    (programs / "gcloud").chmod(0o755)
    (programs / "git").write_text("#!/bin/bash\n")
    (programs / "git").chmod(0o755)

    def watch(states, outcome, checkpoints=""):
        (tmp_path / "states").write_text("".join(state + "\n" for state in states))
        (tmp_path / "outcome").write_text(outcome)
        (tmp_path / "checkpoints").write_text(checkpoints)
        options = [*SLICE, "--spot", "--poll", "0", "--max-restarts-without-progress", "1"]
        done = launcher(
            "tpu_vm.sh",
            *("watch", *options, "--", *TRAIN),
            check=False,
            env={"PATH": f"{programs}:{os.environ['PATH']}", "FOLDER": str(tmp_path)},
        )
        calls = (tmp_path / "calls").read_text().splitlines()
        verbs = [
            call.split("queued-resources ")[1].split()[0] for call in calls if "queued" in call
        ]
        return done, [verb for verb in verbs if verb != "describe"], calls

    return watch


def test_watch_creates_again_what_was_taken_away(cloud):
    states = ["SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE"]
    done, verbs, calls = cloud(states, "0")
    assert done.returncode == 0, done.stderr
    assert verbs == ["delete", "create"]
    assert sum("tpu_worker.sh start" in call for call in calls) == 1
    assert "delete" in done.stderr, "it says that the slices still cost money"


def test_watch_gives_up_without_progress(cloud):
    states = ["SUSPENDED", "ACTIVE", "SUSPENDED", "ACTIVE", "SUSPENDED"]
    done, verbs, _ = cloud(states, "running", "gs://bucket/run/checkpoints/500/\n")
    assert done.returncode == 1 and "newer than 500" in done.stderr
    assert verbs == ["delete", "create"]


def test_watch_ends_with_the_status_of_training(cloud):
    done, verbs, _ = cloud(["ACTIVE"], "2")
    assert done.returncode == 2 and verbs == []


def test_a_worker_starts_once_stops_and_tells_its_outcome(tmp_path, fake_environment):
    plan = [[[["on_term", 75, 5], ["touch", "ready"], ["sleep", 60]]]]
    env = {**fake_environment, "FAKE_PLAN": json.dumps(plan), "HOME": str(tmp_path)}

    def worker(*arguments):
        return subprocess.run(
            [str(LAUNCH / "tpu_worker.sh"), *arguments],
            capture_output=True,
            text=True,
            env=env,
            timeout=30,
            check=True,
        ).stdout

    assert worker("outcome") == "gone\n"
    workdir = tmp_path / "run"
    start = [
        "start",
        "--",
        "--config",
        "c.py",
        "--workdir",
        str(workdir),
        "--expect-processes",
        "9",
    ]
    worker(*start)
    deadline = time.monotonic() + 20
    while not (workdir / "ready").exists():
        assert time.monotonic() < deadline, (tmp_path / "vlp_jax.log").read_text()
        time.sleep(0.02)
    assert worker("outcome") == "running\n" and "already" in worker(*start)
    assert worker("stop", "20").endswith(": 75\n")
    assert worker("outcome") == "75\n" and '"checkpoint_after": 5' in worker("status")
    given = json.loads((workdir / "arguments.0").read_text())["argv"]
    assert given[-2:] == ["--expect-processes", "9"] and "--coordinator" not in given
