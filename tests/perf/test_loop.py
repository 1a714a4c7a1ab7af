"""What the benchmark of the loop makes of its times."""

from tools.perf.loop import figures, report


def test_the_slower_part_bounds_the_loop():
    times = {"loop": [2.0, 4.0], "fixed": [1.9, 3.6], "input": [0.5, 1.0], "host": [0.1, 0.3]}
    found = figures(times, steps=4, examples=100, on_cpu=False)
    assert found["bound_by"] == "the step" and found["host_microseconds_per_step"] == 50_000
    assert found["fixed_batch_examples_per_second"] == 100 / 2.75
    assert found["ratios"]["of_fixed_batch"]["rounds"] == [0.95, 0.9]
    assert found["ratios"]["of_the_bound"] == found["ratios"]["of_fixed_batch"]
    assert "of_the_shared_bound" not in found["ratios"]


def test_on_cpu_the_step_and_the_input_share_the_cores():
    times = {"loop": [4.0], "fixed": [1.0], "input": [3.0], "host": [0.5]}
    found = figures(times, steps=2, examples=8, on_cpu=True)
    assert found["bound_by"] == "the input" and found["input_share"] == 0.75
    ratios = {name: ratio["median"] for name, ratio in found["ratios"].items()}
    assert ratios == {"of_fixed_batch": 0.25, "of_the_bound": 0.75, "of_the_shared_bound": 1.0}
    text = "\n".join(report(found, 1))
    assert "the input bounds the loop: the input is 75.0%" in text
    assert "loop / sum of both parts         1.000" in text
