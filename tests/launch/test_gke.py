"""launch/gke.sh: manifests that the API server would take, and pods that do what they say."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from .conftest import LAUNCH

SCHEMA = json.loads((Path(__file__).parent / "schemas" / "jobset.json").read_text())
TPU = ["--name", "vlp", "--topology", "v5e:16x16", "--image", "r/i:tpu"]
GPU = ["--name", "vlp", "--gpu", "nvidia-a100-80gb", "--nodes", "4", "--image", "r/i:gpu"]
TRAIN = ["--config", "configs/clip_b16.py", "--workdir", "gs://bucket/run"]
CASES = {
    "tpu": TPU,
    "tpu one host": ["--name", "vlp", "--topology", "v6e:2x4", "--image", "r/i"],
    "tpu slices spot": [*TPU, "--slices", "4", "--spot", "--compilation-cache", "gs://b/xla"],
    "gpu": GPU,
    "gpu spot": [*GPU, "--spot", "--gpus-per-node", "16"],
}


def errors(manifest):
    return [
        error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest)
    ]


@pytest.fixture
def manifest(launcher):
    """A function that renders and reads a manifest, after checking it."""

    def render(options, train=TRAIN):
        text = launcher("gke.sh", "start", "--dry-run", *options, "--", *train).stdout
        assert not re.search(r"@[A-Z_]+@", text.replace("@NOT_OURS@", ""))
        read = yaml.safe_load(text)
        assert errors(read) == []
        return read

    return render


def job_of(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["replicas"], replicated["template"]["spec"]


def pod_of(manifest):
    return job_of(manifest)[1]["template"]["spec"]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_manifests_fit_the_schema_and_stop_and_restart_as_they_should(manifest, options):
    rendered = manifest(options)
    _, job = job_of(rendered)
    pod = pod_of(rendered)
    assert job["backoffLimit"] == 0 and job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 300
    spot = pod["nodeSelector"].get("cloud.google.com/gke-spot")
    assert (spot == "true") == ("--spot" in options)
    assert any(t["key"] == "cloud.google.com/gke-spot" for t in pod["tolerations"]) == bool(spot)


@pytest.mark.parametrize("name", ["jobset_tpu.yaml", "jobset_gpu.yaml"])
@pytest.mark.parametrize(
    "change",
    [
        ("maxRestarts:", "maxRestart:"),
        ("action: FailJobSet", "action: FailJobset"),
        ("hostNetwork: true", "hostNetwork: yes please"),
        ("containerName: train", "container: train"),
        ("values: [2, 75]", "values: [0, 75]"),
    ],
)
def test_the_schema_finds_mistakes(launcher, name, change):
    text = launcher(
        "gke.sh", "start", "--dry-run", *(TPU if "tpu" in name else GPU), "--", *TRAIN
    ).stdout
    assert errors(yaml.safe_load(text)) == []
    assert change[0] in text and errors(yaml.safe_load(text.replace(*change)))


def test_a_slice_has_a_pod_per_host(manifest):
    slices, job = job_of(manifest(CASES["tpu slices spot"]))
    pod = job["template"]["spec"]
    assert (slices, job["parallelism"]) == (4, 64)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    arguments = container["args"]
    assert arguments[arguments.index("--processes") + 1] == "256"
    assert arguments[arguments.index("--accelerator") + 1] == "tpu_v5e"
    assert {"name": "JAX_COMPILATION_CACHE_DIR", "value": "gs://b/xla"} in container["env"]
    one_host = pod_of(manifest(CASES["tpu one host"]))
    assert one_host["containers"][0]["resources"]["limits"] == {"google.com/tpu": 8}


def test_gpu_pods_know_their_coordinator(manifest):
    _, job = job_of(manifest(GPU))
    container = job["template"]["spec"]["containers"][0]
    arguments = container["args"]
    # JobSet's names of pods: https://jobset.sigs.k8s.io/docs/concepts/
    assert arguments[arguments.index("--coordinator") + 1] == "vlp-worker-0-0.vlp:8476"
    assert arguments[arguments.index("--accelerator") + 1] == "gpu_ampere"
    assert job["parallelism"] == 4
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_arguments_arrive_as_they_are(manifest):
    words = [
        "--config.a=(1, 'two')",
        '--config.b="x\\y"',
        "--config.c=@NOT_OURS@: - {z}",
        "--x=é #",
    ]
    container = pod_of(manifest(TPU, [*TRAIN, *words]))["containers"][0]
    arguments = container["args"]
    assert arguments[arguments.index("--") + 1 :] == [*TRAIN, *words]


# What the Job controller writes: pkg/controller/job/pod_failure_policy.go of Kubernetes
EXIT = "Container train for pod default/vlp-slice-0-3-x2 failed with exit code {} matching FailJob"
LOST = "Pod default/vlp-slice-0-3-x2 has condition DisruptionTarget matching FailJob"


@pytest.mark.parametrize("options", [TPU, GPU], ids=["tpu", "gpu"])
@pytest.mark.parametrize(
    ("reason", "message", "action"),
    [
        ("PodFailurePolicy", EXIT.format(2), "FailJobSet"),
        ("PodFailurePolicy", EXIT.format(75), "RestartJobSetAndIgnoreMaxRestarts"),
        ("PodFailurePolicy", LOST, "RestartJobSetAndIgnoreMaxRestarts"),
        ("BackoffLimitExceeded", "Job has reached the specified backoff limit", None),
    ],
)
def test_what_jobset_does_when_a_job_fails(manifest, options, reason, message, action):
    """As JobSet chooses: the first rule that fits; None stands for a restart that counts."""
    chosen = [
        rule["action"]
        for rule in manifest(options)["spec"]["failurePolicy"]["rules"]
        if reason in rule["onJobFailureReasons"]
        and any(
            re.search(p, message + " rule at index 0") for p in rule["onJobFailureMessagePatterns"]
        )
    ]
    assert (chosen or [None])[0] == action


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (TPU[:4], "--image"),
        (["--name", "vlp", "--image", "i"], "--topology"),
        (["--name", "vlp", "--topology", "v5e:16", "--image", "i"], "v5e:16"),
        (["--name", "vlp", "--topology", "v7:2x2", "--image", "i"], "'v7'"),
        (["--name", "vlp", "--topology", "v5p:4x4", "--image", "i"], "three dimensions"),
        (
            ["--name", "vlp", "--topology", "v5e:2x2", "--slices", "2", "--image", "i"],
            "several hosts",
        ),
        (["--name", "Vlp", "--topology", "v5e:4x4", "--image", "i"], "'Vlp'"),
    ],
)
def test_mistakes(launcher, options, says):
    done = launcher("gke.sh", "start", "--dry-run", *options, "--", *TRAIN, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and says in done.stderr


def test_a_workdir_on_a_pods_disk_is_a_mistake(launcher):
    train = ["--config", "c.py", "--workdir", "runs/x"]
    done = launcher("gke.sh", "start", "--dry-run", *TPU, "--", *train, check=False)
    assert done.returncode == 2 and "gs://" in done.stderr


def test_the_other_commands(launcher):
    def commands(*arguments):
        return launcher("gke.sh", *arguments, "--dry-run").stdout.splitlines()

    where = ["--cluster", "c", "--location", "us-west4-a"]
    pools = commands("nodes", *TPU, "--slices", "2", *where, "--spot")
    assert [shlex.split(line)[4] for line in pools] == ["vlp-0", "vlp-1"]
    for word in (
        "--machine-type=ct5lp-hightpu-4t",
        "--tpu-topology=16x16",
        "--num-nodes=64",
        "--spot",
    ):
        assert word in pools[0].split()
    (stop,) = commands("stop", "--name", "vlp")
    assert shlex.split(stop)[-1] == '{"spec":{"suspend":true}}'
    assert '"suspend":false' in commands("resume", "--name", "vlp")[0]
    assert len(commands("delete", "--name", "vlp")) == 1
    assert len(commands("delete", "--name", "vlp", "--node-pools", "--slices", "2", *where)) == 3
    assert "job-completion-index=0" in commands("logs", "--name", "vlp")[0]


# The pods' program


@pytest.fixture
def pod(tmp_path, fake_environment):
    """A function that runs launch/pod.sh as one pod of a job would be run."""

    def run(index=0, plan=((("exit", 0),),), options=(), **environment):
        return subprocess.run(
            [str(LAUNCH / "pod.sh"), "--processes", "2", "--starts", str(tmp_path / "run.starts")]
            + [*options, "--max-restarts-without-progress", "2", "--accelerator", "cpu"]
            + ["--", "--config", "c.py", "--workdir", str(tmp_path / "run")],
            capture_output=True,
            text=True,
            timeout=30,
            env={
                **fake_environment,
                "FAKE_PLAN": json.dumps([plan]),
                "JOB_COMPLETION_INDEX": str(index),
                "LAUNCH_ID": "uid-1",
                **environment,
            },
        )

    return run


def test_a_pod_becomes_the_training_process(pod, tmp_path):
    done = pod(1, ((), (("exit", 74),)), ["--coordinator", "vlp-worker-0-0.vlp:8476"])
    assert done.returncode == 74, done.stderr
    given = json.loads((tmp_path / "run" / "arguments.1").read_text())
    several = "--coordinator vlp-worker-0-0.vlp:8476 --processes 2 --process-id 1"
    assert " ".join(given["argv"]).endswith(f"--expect-processes 2 {several}")
    assert given["env"]["JAX_PLATFORMS"] == "cpu"
    assert not (tmp_path / "run.starts").exists(), "the first pod alone counts"


def test_the_first_pod_ends_restarts_that_lead_nowhere(pod, tmp_path):
    crash = ((("exit", 1),),)
    assert [pod(0, crash).returncode for _ in range(4)] == [1, 1, 1, 2]
    assert "led nowhere" in pod(0, crash).stderr
    (tmp_path / "run" / "checkpoints" / "100").mkdir(parents=True)
    assert [pod(0, crash).returncode for _ in range(4)] == [1, 1, 1, 2]
    assert pod(0, crash, LAUNCH_ID="uid-2").returncode == 1, "another JobSet starts afresh"
    assert pod(0, crash, SLICE="1").returncode == 1, "the first slice alone counts"


FAKE_GCLOUD = """#!/bin/bash
# gcloud storage on a folder: gs://X is $BUCKETS/X
path() { echo "$BUCKETS/${1#gs://}"; }
case "$1 $2" in
  "storage ls") cd "$(path "$3")" 2>/dev/null && ls -d */ >/dev/null 2>&1 ||
    { echo "ERROR: (gcloud.storage.ls) One or more URLs matched no objects." >&2; exit 1; }
    for f in */; do echo "$3$f"; done ;;
  "storage cat") cat "$(path "$3")" ;;
  "storage cp") mkdir -p "$(dirname "$(path "$4")")"; cat > "$(path "$4").new"
    mv "$(path "$4").new" "$(path "$4")" ;;
  *) exit 3 ;;
esac
"""


def test_checkpoints_and_starts_on_a_bucket(tmp_path, fake_environment):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gcloud").write_text(FAKE_GCLOUD)
    (programs / "gcloud").chmod(0o755)
    env = {
        **fake_environment,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "BUCKETS": str(tmp_path / "buckets"),
        "VLP_TRAIN_COMMAND": "false",
        "JOB_COMPLETION_INDEX": "0",
        "LAUNCH_ID": "u",
    }
    command = [str(LAUNCH / "pod.sh"), "--processes", "1", "--starts", "gs://b/run.starts"]
    command += ["--max-restarts-without-progress", "1", "--", "--workdir", "gs://b/run"]

    def statuses(count):
        return [subprocess.run(command, env=env, timeout=30).returncode for _ in range(count)]

    assert statuses(3) == [1, 1, 2]
    for name in ("900", "1000", "2000.orbax-checkpoint-tmp-7"):
        (tmp_path / "buckets" / "b" / "run" / "checkpoints" / name).mkdir(parents=True)
    assert statuses(3) == [1, 1, 2]
    lines = (tmp_path / "buckets" / "b" / "run.starts").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [["u", "none"]] * 2 + [["u", "1000"]] * 2
