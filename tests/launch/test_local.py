"""launch/local.sh with programs that end in every way a training process can end."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest

from .conftest import LAUNCH

COMPLETE = [["save", 9], ["exit", 0]]
# In front of bash: wherever it would wait for its queue (9), it says so and begins 0.4 s later, as
# may happen on a busy machine. A signal in this time does not end the waiting.
LATE_TO_WAIT = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/select.h>
#include <time.h>
#include <unistd.h>

static void be_late(void) {
  struct pollfd queue = {9, POLLIN, 0};
  if (poll(&queue, 1, 0)) return;
  int said = open(getenv("LATE_FILE"), O_WRONLY | O_APPEND | O_CREAT, 0600);
  if (said >= 0 && write(said, ".", 1)) close(said);
  struct timespec left = {0, 400000000};
  while (nanosleep(&left, &left)) {}
}

ssize_t read(int file, void *buffer, size_t count) {
  ssize_t (*original)(int, void *, size_t) = dlsym(RTLD_NEXT, "read");
  if (file == 9) be_late();
  return original(file, buffer, count);
}

int select(int count, fd_set *in, fd_set *out, fd_set *other, struct timeval *time) {
  int (*original)(int, fd_set *, fd_set *, fd_set *, struct timeval *) = dlsym(RTLD_NEXT, "select");
  if (in && count > 9 && FD_ISSET(9, in)) be_late();
  return original(count, in, out, other, time);
}

int pselect(int count, fd_set *in, fd_set *out, fd_set *other, const struct timespec *time,
            const sigset_t *mask) {
  int (*original)(int, fd_set *, fd_set *, fd_set *, const struct timespec *, const sigset_t *) =
      dlsym(RTLD_NEXT, "pselect");
  if (in && count > 9 && FD_ISSET(9, in)) be_late();
  return original(count, in, out, other, time, mask);
}
"""


@pytest.fixture
def job(tmp_path, fake_environment):
    """A function that starts local.sh on a plan (see fake_train.py) and gives the process."""
    workdir = tmp_path / "run"

    def start(plan, *options, processes=1):
        return subprocess.Popen(
            [str(LAUNCH / "local.sh"), "--processes", str(processes), "--backoff", "0"]
            + ["--grace", "1", "--save-grace", "5", *options]
            + ["--", "--config", "some.py", "--workdir", str(workdir), "--config.note=two words"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Tests in the background of a script ignore SIGINT, and bash cannot take that back.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env={**fake_environment, "FAKE_PLAN": json.dumps(plan)},
        )

    start.workdir = workdir
    return start


def finish(process):
    """Waits; returns (exit status, stdout, stderr)."""
    out, errors = process.communicate(timeout=30)
    return process.returncode, out, errors


def log_of(workdir):
    lines = workdir.with_name(workdir.name + ".restarts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def starts(workdir, process=0):
    """What each start of a process was given: its arguments and environment."""
    return [json.loads(line) for line in (workdir / f"arguments.{process}").open()]


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_success_is_not_repeated_and_arguments_arrive(job):
    status, out, _ = finish(job([[COMPLETE]], "--devices-per-process", "4"))
    assert status == 0
    assert out == "[0] attempt 0 of process 0\n"
    (given,) = starts(job.workdir)
    assert given["argv"][-3:] == ["--config.note=two words", "--expect-processes", "1"]
    assert given["env"]["JAX_NUM_CPU_DEVICES"] == "4"
    (record,) = log_of(job.workdir)
    assert record["statuses"] == [0] and record["restarted"] is False
    assert record["checkpoint_before"] is None and record["checkpoint_after"] == 9


def test_a_mistake_of_the_user_is_never_restarted(job):
    status, _, errors = finish(job([[[["exit", 2]]]]))
    assert status == 2 and len(starts(job.workdir)) == 1
    assert "not restarted" in errors


def test_a_mistake_counts_more_than_its_consequences(job):
    """Process 1 finds the mistake, the other one then loses its peer."""
    plan = [[[["wait_for", "told"], ["exit", 76]], [["touch", "told"], ["exit", 2]]]]
    status, *_ = finish(job(plan, processes=2))
    assert status == 2 and len(starts(job.workdir)) == 1


def test_crash_then_success(job):
    plan = [[[["save", 100], ["crash"]]], [COMPLETE]]
    (job.workdir / "checkpoints" / "9.orbax-checkpoint-tmp-0").mkdir(parents=True)
    status, *_ = finish(job(plan))
    assert status == 0
    first, second = log_of(job.workdir)
    assert first["statuses"] == [134] and first["restarted"] is True
    assert (first["checkpoint_before"], first["checkpoint_after"]) == (None, 100)
    assert second["checkpoint_before"] == 100 and second["attempt"] == 2


def test_restarts_without_progress_are_capped(job):
    status, _, errors = finish(job([[[["exit", 70]]]], "--max-restarts-without-progress", "2"))
    assert status == 70 and len(starts(job.workdir)) == 3
    assert "no newer checkpoint" in errors
    assert [r["restarted"] for r in log_of(job.workdir)] == [True, True, False]


def test_progress_resets_the_count(job):
    crash = [["exit", 1]]
    plan = [[crash], [[["save", 5], *crash]], [crash], [[["save", 8], *crash]], [crash], [COMPLETE]]
    status, *_ = finish(job(plan, "--max-restarts-without-progress", "1"))
    assert status == 0 and len(starts(job.workdir)) == 6


def test_restarts_wait_longer_without_progress(job):
    """1 s after a crash with progress or the first without, 2 s after the second, none after 75."""
    crash, saved = [["exit", 1]], [["save", 5], ["exit", 1]]
    plan = [[saved], [crash], [crash], [[["save", 6], ["exit", 75]]], [COMPLETE]]
    _, _, errors = finish(job(plan, "--backoff", "1"))
    delays = re.findall(r"starting again in (\d+) s", errors)
    assert delays == ["1", "1", "2", "0"]


def test_told_to_stop_goes_on_until_nothing_is_saved_in_between(job):
    """Status 75 without the launcher being told, as after maintenance of a host."""
    plan = [[[["save", 1], ["exit", 75]]], [[["save", 2], ["exit", 75]]], [[["exit", 75]]]]
    status, *_ = finish(job(plan, "--max-restarts-without-progress", "1"))
    assert status == 75 and len(starts(job.workdir)) == 4


def test_a_process_that_hangs_is_killed_and_all_start_again(job):
    plan = [
        [[["wait_for", "stopped"], ["exit", 70]], [["touch", "stopped"], ["stop"]]],
        [COMPLETE, COMPLETE],
    ]
    status, *_ = finish(job(plan, processes=2))
    assert status == 0
    first, second = log_of(job.workdir)
    assert first["statuses"] == [70, 137] and second["statuses"] == [0, 0]
    assert 1.9 < first["seconds_to_stop"] < 5, "SIGTERM comes after 1 s, SIGKILL after --grace"


def test_the_others_get_time_to_save_after_75(job):
    """Longer than --grace, which is 1 s here: they are neither told again nor killed."""
    slow = [["on_term", 99, None], ["sleep", 1.6], ["save", 7], ["exit", 75]]
    plan = [[[["exit", 75]], slow], [COMPLETE, COMPLETE]]
    status, *_ = finish(job(plan, processes=2))
    assert status == 0
    assert log_of(job.workdir)[0]["statuses"] == [75, 75]


def test_each_attempt_has_a_port_of_its_own_and_the_right_ids(job):
    crash = [["wait_for", "started"], ["exit", 1]]
    plan = [[crash, [["touch", "started"], *crash]], [COMPLETE, COMPLETE]]
    assert finish(job(plan, processes=2))[0] == 0
    coordinators = []
    for process in (0, 1):
        runs = [start["argv"] for start in starts(job.workdir, process)]
        for argv in runs:
            assert argv[argv.index("--processes") + 1] == "2"
            assert argv[argv.index("--expect-processes") + 1] == "2"
            assert argv[argv.index("--process-id") + 1] == str(process)
        coordinators.append([argv[argv.index("--coordinator") + 1] for argv in runs])
    assert coordinators[0] == coordinators[1] and len(set(coordinators[0])) == 2
    assert all(c.startswith("127.0.0.1:") for c in coordinators[0])


def test_sigterm_reaches_every_process_once_and_ends_the_launcher(job):
    plan = [
        [
            [["on_term", 75, 3], ["touch", "ready.0"], ["sleep", 60]],
            [["on_term", 75, 3], ["touch", "ready.1"], ["sleep", 60]],
        ]
    ]
    process = job(plan, processes=2)
    wait_for(job.workdir / "ready.0")
    wait_for(job.workdir / "ready.1")
    process.send_signal(signal.SIGTERM)
    status, out, _ = finish(process)
    assert status == 75
    assert out.count("told to stop") == 2
    (record,) = log_of(job.workdir)
    assert record["statuses"] == [75, 75] and record["restarted"] is False
    assert record["checkpoint_after"] == 3


def test_ctrl_c_in_a_terminal_lets_the_processes_save(job):
    """The terminal sends SIGINT to the launcher's whole process group."""
    plan = [[[["on_term", 75, 3], ["touch", "ready"], ["sleep", 60]]]]
    process = job(plan)
    wait_for(job.workdir / "ready")
    os.killpg(process.pid, signal.SIGINT)
    status, out, _ = finish(process)
    assert status == 75 and "told to stop" in out
    assert log_of(job.workdir)[0]["statuses"] == [75]


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_signal_that_comes_before_the_launcher_waits_is_not_lost(job, tmp_path, fake_environment):
    (tmp_path / "late.c").write_text(LATE_TO_WAIT)
    library, said = tmp_path / "late.so", tmp_path / "late"
    command = ["cc", "-shared", "-fPIC", "-o", library, tmp_path / "late.c", "-ldl"]
    subprocess.run(command, check=True)
    fake_environment.update(LD_PRELOAD=str(library), LATE_FILE=str(said))
    process = job([[[["on_term", 75, 3], ["touch", "ready"], ["sleep", 60]]]])
    wait_for(job.workdir / "ready")
    before = said.stat().st_size if said.exists() else 0
    deadline = time.monotonic() + 20
    while not said.exists() or said.stat().st_size == before:
        assert time.monotonic() < deadline, "the launcher does not wait anew"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75


def test_a_second_signal_kills(job):
    plan = [[[["on_term", 75, None], ["touch", "ready"], ["stop"]]]]
    process = job(plan, "--save-grace", "60")
    wait_for(job.workdir / "ready")
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    status, *_ = finish(process)
    assert status == 137 and log_of(job.workdir)[0]["statuses"] == [137]


def test_sigterm_during_the_back_off_ends_the_launcher(job):
    process = job([[[["exit", 1]]]], "--backoff", "60")
    wait_for(job.workdir.with_name("run.restarts.jsonl"))
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75
    assert len(starts(job.workdir)) == 1


def test_no_process_is_left_behind(job):
    plan = [[[["wait_for", "stopping"], ["exit", 1]], [["touch", "stopping"], ["stop"]]]]
    status, *_ = finish(job(plan, "--max-restarts-without-progress", "0", processes=2))
    assert status == 1
    for process in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(starts(job.workdir, process)[0]["pid"], 0)


def test_the_launcher_may_be_replaced_while_it_runs(tmp_path, fake_environment):
    """bash reads a script as it goes; a new version in its place must not reach a running job."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    script = tmp_path / "launch" / "local.sh"
    plan = [[[["touch", "ready"], ["wait_for", "go"], ["save", 1], ["exit", 1]]], [COMPLETE]]
    process = subprocess.Popen(
        [
            str(script),
            "--backoff",
            "0",
            "--",
            "--config",
            "c.py",
            "--workdir",
            str(tmp_path / "run"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**fake_environment, "FAKE_PLAN": json.dumps(plan)},
    )
    wait_for(tmp_path / "run" / "ready")
    with script.open("r+") as file:  # in place: the same inode
        file.write("echo replaced)\n" * 2000)
    (tmp_path / "run" / "go").touch()
    status, out, errors = finish(process)
    assert status == 0 and "replaced" not in out + errors, errors


def test_two_jobs_never_share_a_workdir(job):
    """Also if the launcher of the first was killed and its processes go on."""
    first = job([[[["on_term", 0, 1], ["touch", "ready"], ["sleep", 60]]]])
    wait_for(job.workdir / "ready")
    first.kill()
    first.wait()
    status, _, errors = finish(job([[COMPLETE]]))
    assert status == 2 and "another job" in errors
    os.kill(starts(job.workdir)[0]["pid"], signal.SIGTERM)
    first.communicate(timeout=20)
    assert finish(job([[COMPLETE]]))[0] == 0


def test_output_is_kept_by_process_and_attempt(job, tmp_path):
    crash = [["wait_for", "started"], ["exit", 1]]
    plan = [[crash, [["touch", "started"], *crash]], [COMPLETE, COMPLETE]]
    assert finish(job(plan, "--logs", str(tmp_path / "logs"), processes=2))[0] == 0
    kept = {p.name: p.read_text() for p in (tmp_path / "logs").iterdir()}
    assert kept == {
        f"attempt-{attempt + 1}.process-{process}.log": f"attempt {attempt} of process {process}\n"
        for attempt in (0, 1)
        for process in (0, 1)
    }


def test_dry_run_prints_what_would_run(launcher, tmp_path):
    arguments = ["--", "--config", "c.py:x", "--workdir", "runs/a b", "--config.x=(1, 2)"]
    options = ["--processes", "2", "--accelerator", "cpu", "--devices-per-process", "2"]
    done = launcher("local.sh", *options, "--dry-run", *arguments)
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert ["export", "JAX_NUM_CPU_DEVICES=2"] in commands
    assert ["export", "JAX_PLATFORMS=cpu"] in commands
    processes = [command for command in commands if "-m" in command]
    assert len(processes) == 2
    for index, command in enumerate(processes):
        assert command[1:8] == ["-m", "vlp_jax.train", *arguments[1:6]]
        assert command[-1] == str(index)
    assert not (tmp_path / "runs").exists()


def test_one_gpu_for_each_of_several_processes(launcher):
    options = ["--processes", "2", "--accelerator", "gpu_hopper", "--dry-run"]
    done = launcher("local.sh", *options, "--", "--config", "c.py", "--workdir", "w")
    assert "env JAX_LOCAL_DEVICE_IDS=1 " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--proceses", "2"], "--proceses"),
        (["--processes", "two", "--"], "whole number"),
        (["--processes"], "needs a value"),
        (["--", "--config", "c.py"], "--workdir"),
        (["--accelerator", "gpu_hoper", "--", "--workdir", "w"], "gpu_hopper"),
        (["--", "--workdir", "s3://b/w"], "s3://b/w"),
        ([], "no arguments"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(launcher, arguments, says):
    done = launcher("local.sh", *arguments, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr


@pytest.mark.parametrize("name", ["local.sh", "slurm.sh", "tpu_vm.sh", "gke.sh"])
def test_help_is_enough(launcher, name):
    text = launcher(name, "--help").stdout
    assert text.startswith(("Trains", "Runs")) and "--dry-run" in text
    assert "#!" not in text and "shellcheck" not in text
    assert os.access(LAUNCH / name, os.X_OK)
