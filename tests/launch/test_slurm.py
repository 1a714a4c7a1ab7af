"""launch/slurm.sh: directives that sbatch knows, a job that restarts and requeues as it says."""

import json
import os
import re
import shlex
import subprocess

import pytest

from .conftest import ROOT

TRAIN = ["--config", "configs/clip_b16.py", "--workdir"]

# Options of sbatch that may be needed, each with the form of its value.
# https://slurm.schedmd.com/sbatch.html
TIME = r"(\d+-)?\d+(:\d\d){0,2}"
DIRECTIVES = {
    "account": r"\S+",
    "constraint": r"\S+",
    "cpus-per-task": r"[1-9]\d*",
    "exclusive": None,
    "gpus-per-node": r"([a-z0-9]+:)?[1-9]\d*",
    "job-name": r"\S+",
    "mem": r"\d+[KMGT]?",
    "nodes": r"[1-9]\d*(-\d+)?",
    "ntasks-per-node": r"[1-9]\d*",
    "open-mode": r"append|truncate",
    "output": r"/\S+",
    "partition": r"\S+",
    "qos": r"\S+",
    "requeue": None,
    "signal": r"([RB]:)?[A-Z0-9]+(@\d+)?",
    "time": TIME,
}


def directives(script):
    """The #SBATCH lines as sbatch reads them: up to the first command."""
    found = {}
    for number, line in enumerate(script.splitlines()):
        if number == 0:
            assert line.startswith("#!")
        elif line.startswith("#SBATCH "):
            name, equals, value = line.removeprefix("#SBATCH ").removeprefix("--").partition("=")
            assert name in DIRECTIVES, f"sbatch has no option {line}"
            assert name not in found, f"{name} twice"
            assert bool(equals) == (DIRECTIVES[name] is not None), line
            assert not equals or re.fullmatch(DIRECTIVES[name], value), line
            found[name] = value
        elif line.strip() and not line.startswith("#"):
            break
    assert script.count("\n#SBATCH") == len(found), "a directive after the first command"
    return found


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--nodes", "16", "--time", "2-00:00:00", "--partition", "gpu", "--account", "a-b"],
        ["--process-per=gpu", "--cpus-per-node=96", "--sbatch=--mem=0", "--sbatch=--qos=long"],
        ["--container", "r#vlp:gpu", "--container-mounts", "/data:/data", "--gpus-per-node", "4"],
    ],
)
def test_directives_are_those_of_sbatch(launcher, options):
    script = launcher("slurm.sh", "--dry-run", *options, "--", *TRAIN, "runs/x").stdout
    found = directives(script)
    assert found["signal"] == "TERM@300" and "requeue" in found and found["open-mode"] == "append"
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_options_arrive(launcher, tmp_path):
    def render(*options):
        options = ("--dry-run", "--state", "state", *options)
        return launcher("slurm.sh", *options, "--", *TRAIN, "runs/a b").stdout

    per_node = render("--nodes", "16")
    assert directives(per_node)["ntasks-per-node"] == "1"
    assert "--expect-processes\n  16\n" in per_node
    (workdir,) = [x for x in per_node.splitlines() if x.startswith("workdir=")]
    assert shlex.split(workdir) == [f"workdir={tmp_path}/runs/a b"]
    per_gpu = render("--nodes", "16", "--process-per", "gpu", "--cpus-per-node", "96")
    found = directives(per_gpu)
    assert (found["ntasks-per-node"], found["cpus-per-task"]) == ("8", "12")
    assert "--expect-processes\n  128\n" in per_gpu
    container = render("--container", "r#vlp:gpu", "--container-mounts", "/data:/data")
    assert "--container-image=r#vlp:gpu" in container
    mounts = re.search(r"--container-mounts=(\S+)", container)[1].replace("\\", "").split(",")
    folders = {ROOT, tmp_path, tmp_path / "state", tmp_path / "runs"}
    assert mounts[0] == "/data:/data" and set(mounts[1:]) == {f"{f}:{f}" for f in folders}
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--process-per", "core"], "'core'"),
        (["--nodes", "0"], "--nodes"),
        (["--gpu-per-node", "8"], "--gpu-per-node"),
        (["--accelerator", "gpu_x"], "gpu_hopper"),
        (["--state", "a b"], "--state"),
    ],
)
def test_mistakes(launcher, options, says):
    done = launcher("slurm.sh", "--dry-run", *options, "--", *TRAIN, "runs/x", check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr


# srun as far as the job needs it: two tasks on this machine, the first failure kills the step
SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
while [[ $1 == --* ]]; do shift; done
env | grep -E '^JAX_(LOCAL|COORD)' >> "$CALLS"
for i in 0 1; do
  SLURM_PROCID=$i setsid "$@" --process-id "$i" & pids+=($!)
done
status=0
for _ in 0 1; do
  wait -n -p ended "${pids[@]}"; s=$?
  pids=(${pids[@]/#$ended})
  if ((s)); then status=$s; for p in "${pids[@]}"; do kill -KILL -- "-$p"; done; fi
done 2>/dev/null
exit $status
"""
SCONTROL = '#!/bin/bash\necho "scontrol $*" >> "$CALLS"\nexit ${SCONTROL_STATUS:-0}\n'


@pytest.fixture
def cluster(launcher, tmp_path, fake_environment):
    """A function that writes a batch script and runs it as SLURM would on the first node."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sleep": "#!/bin/bash\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    options = ["--nodes", "2", "--gpus-per-node", "4", "--max-restarts-without-progress", "1"]

    def run(plan, restart_count=0):
        script = launcher(
            "slurm.sh", "--dry-run", *options, "--", *TRAIN, "run", env=fake_environment
        ).stdout
        environment = {
            **fake_environment,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "FAKE_PLAN": json.dumps(plan),
            "CALLS": str(calls),
            "SLURM_JOB_ID": "1234",
            "SLURM_RESTART_COUNT": str(restart_count),
        }
        done = subprocess.run(
            ["bash", "-s"],
            input=script,
            text=True,
            capture_output=True,
            env=environment,
            timeout=30,
        )
        return done.returncode, done.stderr

    run.calls = lambda word: [c for c in calls.read_text().splitlines() if c.startswith(word)]
    run.log = lambda: [json.loads(x) for x in (tmp_path / "run.restarts.jsonl").open()]
    return run


COMPLETE = [["save", 9], ["exit", 0]]


def test_a_failed_attempt_is_started_again_in_the_allocation(cluster):
    plan = [[[["wait_for", "x"], ["save", 4], ["exit", 1]], [["touch", "x"], ["sleep", 30]]]]
    status, errors = cluster([*plan, [COMPLETE, COMPLETE]])
    assert status == 0, errors
    first, second = cluster.log()
    assert first["statuses"] == [1, 137] and second["statuses"] == [0, 0]
    assert cluster.calls("scontrol") == []
    (srun, _) = cluster.calls("srun")
    assert "--kill-on-bad-exit=1 --wait=300" in srun
    assert cluster.calls("JAX_LOCAL") == ["JAX_LOCAL_DEVICE_IDS=0,1,2,3"] * 2
    assert len(set(cluster.calls("JAX_COORDINATOR_PORT"))) == 2


def test_the_others_are_not_killed_when_one_has_saved(cluster):
    """Before the time limit SLURM signals all; srun must not take 75 for a failure."""
    slow = [["sleep", 0.5], ["save", 7], ["exit", 75]]
    status, errors = cluster([[[["exit", 75]], slow]])
    assert status == 75, errors
    assert cluster.log()[0]["statuses"] == [75, 75]
    assert cluster.calls("scontrol") == ["scontrol requeue 1234"]


def test_a_mistake_ends_the_job(cluster):
    plan = [[[["wait_for", "x"], ["exit", 2]], [["touch", "x"], ["sleep", 30]]]]
    assert cluster(plan)[0] == 2
    assert cluster.calls("scontrol") == [] and len(cluster.calls("srun")) == 1


def test_requeues_that_lead_nowhere_end(cluster):
    """Each start saves nothing before the limit; one restart without progress is allowed."""
    plan = [[[["exit", 75]], [["exit", 75]]]]
    assert cluster(plan)[0] == 75 and len(cluster.calls("scontrol")) == 1
    status, errors = cluster(plan, restart_count=1)
    assert status == 75 and len(cluster.calls("scontrol")) == 1, "not requeued again"
    assert "not restarted" in errors
    status, errors = cluster(plan, restart_count=2)
    assert status == 1 and "led nowhere" in errors and len(cluster.calls("srun")) == 2


def test_a_submission_writes_the_script_that_it_shows(launcher, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text('#!/bin/bash\necho "Submitted $1"\n')
    (programs / "sbatch").chmod(0o755)
    arguments = ["--nodes", "2", "--", *TRAIN, "run"]
    shown = launcher("slurm.sh", "--dry-run", *arguments).stdout
    env = {"PATH": f"{programs}:{os.environ['PATH']}"}
    done = launcher("slurm.sh", *arguments, env=env)
    script = tmp_path / "run.slurm" / "job.sh"
    assert done.stdout == f"Submitted {script}\n" and script.read_text() == shown
