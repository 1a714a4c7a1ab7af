import json

from vlp_jax.observe.accelerators import PeakFlops
from vlp_jax.observe.compilation import Compiled
from vlp_jax.observe.goodput import RunTime
from vlp_jax.observe.summary import RunSummary

SPEED = {
    "perf/examples_per_second": 12_345.6,
    "perf/steps_per_second": 3.014,
    "perf/mfu": 0.4219,
}
SECONDS = {"start": 20.0, "useful": 150.0, "compile": 25.0, "down": 0.0, "odd": 5.0}


def summary(**overrides):
    values = dict(
        outcome="complete",
        first_step=0,
        last_step=1000,
        total_steps=1000,
        examples=4_096_000,
        speed=SPEED,
        peak=PeakFlops(197e12, "table"),
        step_compiled=Compiled(1, 0.4, 1, 1, 30.0),
        step_seconds=0.5,
        compiled=Compiled(9, 3.0, 9, 7, 40.0),
        cache="/cache",
        memory={
            "memory/bytes_in_use": 2.0**32,
            "memory/peak_bytes_in_use": 3 * 2.0**32,
            "memory/limit": 2.0**34,
            "memory/host_rss_bytes": 2.0**30,
        },
        seconds=SECONDS,
        run=RunTime(0.0, 200.0, 1, dict(SECONDS), 1000, 1000, 0, [(0, 0.0)], "complete"),
        notes={},
        files={"metrics": "/w/metrics.jsonl"},
    )
    return RunSummary(**{**values, **overrides})


def test_more_than_a_peak_is_not_told_as_a_share_of_it():
    speed = {key: value for key, value in SPEED.items() if key != "perf/mfu"}
    text = summary(speed=speed, peak=PeakFlops(2e9, "measured")).text()
    assert "MFU not known: above 0.002 TFLOP/s a device (measured)" in text


def test_of_one_start():
    assert summary(notes={"skipped steps": 2}).text().splitlines() == [
        "summary: complete",
        "  steps         1,000 of 1,000; this start did 1,000 with 4,096,000 examples",
        "  speed         12,345.6 examples/s, 3.01 steps/s, MFU 42.2% of 197 TFLOP/s a device "
        "(table)",
        "  compiled      the step in 0.5 s, from the persistent cache, which saved 30.0 s; "
        "7 of 9 programs came from it",
        "  memory        device 12.00 GiB at most of 16.00 GiB, host 1.00 GiB",
        "  compile cache /cache",
        "  skipped steps 2",
        "  time               this start",
        "    useful        2m30s   75.0%",
        "    start        20.00s   10.0%",
        "    compile      25.00s   12.5%",
        "    odd           5.00s    2.5%",
        "    total         3m20s  100.0%",
        "  metrics       /w/metrics.jsonl",
    ]


def test_of_a_start_that_is_not_the_first():
    run = RunTime(0.0, 400.0, 3, {**SECONDS, "lost work": 100.0, "down": 100.0}, 900, 950, 50)
    text = summary(first_step=400, last_step=900, run=run, outcome="told to stop").text()
    lines = text.splitlines()
    assert lines[0] == "summary: told to stop"
    assert "900 of 1,000; this start did 500 with" in lines[1]
    assert lines[1].endswith("50 of earlier starts were lost and done again")
    (head,) = [line for line in lines if line.startswith("  time")]
    assert head.split() == ["time", "this", "start", "all", "3", "starts"]
    rows = {line[4:16].strip(): line[16:].split() for line in lines if line.startswith("    ")}
    assert rows["lost work"] == ["0.00s", "0.0%", "1m40s", "25.0%"]
    assert rows["useful"] == ["2m30s", "75.0%", "2m30s", "37.5%"]
    assert rows["total"] == ["3m20s", "100.0%", "6m40s", "100.0%"]


def test_what_is_not_known_is_left_out():
    text = summary(speed={}, memory={"memory/host_rss_bytes": 2.0**30}, cache=None).text()
    assert "speed" not in text and "device" not in text and "compile cache" not in text
    assert "  memory        host 1.00 GiB" in text
    assert "memory" not in summary(memory={}).text()


def test_as_json():
    record = json.loads(summary(notes={"skipped steps": 2}).to_json())
    assert record["peak"] == {"flops": 197e12, "source": "table"}
    assert record["step_from_cache"] is True and "marks" not in record["run"]
    assert list(record["seconds"]) == ["useful", "start", "compile", "odd", "down"]
    assert record["run"]["steps_done"] == 1000 and record["notes"] == {"skipped steps": 2}
