import io
import math
import re

import pytest

from vlp_jax.observe.progress import NullProgress, Progress, format_duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    """A stream that is a TTY, and what a VT100 would show of it."""

    def isatty(self):
        return True

    def screen(self, columns=80):
        lines, row, column = [[]], 0, 0
        tokens = re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]", self.getvalue())
        for token in tokens:
            if token == "\n":
                row, column = row + 1, 0
            elif token == "\r":
                column = 0
            elif token == "\x1b[2K":
                lines[row] = []
            elif re.fullmatch(r"\x1b\[\d+A", token):
                row -= int(token[2:-1])
            elif token.startswith("\x1b"):
                assert token[-1] in "mhl", f"unexpected sequence {token!r}"
            else:
                if column == columns:
                    row, column = row + 1, 0
                _put(lines, row, column, token)
                column += 1
            while len(lines) <= row:
                lines.append([])
        return ["".join(line).rstrip() for line in lines]


def _put(lines, row, column, character):
    while len(lines) <= row:
        lines.append([])
    line = lines[row]
    line.extend(" " * (column + 1 - len(line)))
    line[column] = character


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (190, "3m10s"),
        (3599.7, "1h00m"),
        (3725, "1h02m"),
        (51 * 3600, "2d03h"),
        (24 * 3600 - 1, "1d00h"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def _plain(total=600, interval=10.0):
    stream, clock = io.StringIO(), Clock()
    return Progress(total, interval=interval, stream=stream, time_fn=clock), stream, clock


def test_plain_lines_come_first_last_and_every_interval():
    progress, stream, clock = _plain()
    with progress:
        clock.now += 60  # compilation
        for step in range(1, 601):
            clock.now += 0.25
            progress.update(step, 1.234, 1310.4)
    lines = stream.getvalue().splitlines()
    steps = [int(re.search(r"step (\d+)/600", line).group(1)) for line in lines]
    assert steps == [1, *range(41, 600, 40), 600]
    assert lines[3] == "step 121/600  20%  loss 1.234  1,310 examples/s  left 2m00s"
    assert lines[-1].endswith("took 3m30s")


def test_time_left_excludes_compilation_and_pauses():
    progress, stream, clock = _plain(total=100, interval=0.0)
    with progress:
        clock.now += 500
        progress.update(1, 1.0, math.nan)
        for step in range(2, 12):
            clock.now += 1
            if step == 8:
                with progress.paused():
                    clock.now += 1000
            progress.update(step, 1.0, 8.0)
    lines = stream.getvalue().splitlines()
    assert "left" not in lines[0] and "examples/s" not in lines[0]
    assert lines[-1].endswith("left 1m29s")


def test_time_left_follows_the_recent_pace():
    progress, stream, clock = _plain(total=1000, interval=0.0)
    with progress:
        for step in range(1, 301):
            clock.now += 0.1 if step <= 200 else 1.0
            progress.update(step, 1.0, 8.0)
    assert stream.getvalue().splitlines()[-1].endswith("left 11m40s")


def test_messages_and_nonfinite_loss_in_a_log():
    progress, stream, clock = _plain(total=3)
    with progress:
        progress.update(1, math.nan, 2.5)
        progress.print("eval [zero_shot] 0.5")
        clock.now += 1
        progress.update(3, 2e-5, 2.5)
    first, message, last = stream.getvalue().splitlines()
    assert "loss nan" in first and "2.50 examples/s" in first
    assert message == "eval [zero_shot] 0.5"
    assert "loss 2.00e-05" in last


def test_an_interrupted_log_ends_with_its_last_step():
    progress, stream, clock = _plain()
    with pytest.raises(KeyboardInterrupt), progress:
        for step in range(1, 8):
            clock.now += 0.1
            progress.update(step, 1.0, 8.0)
        raise KeyboardInterrupt
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/600", "7/600"]


def _live(width, total=100, description="demo"):
    stream, clock = Terminal(), Clock()
    progress = Progress(total, description, stream=stream, time_fn=clock, width=width)
    return progress, stream, clock


def test_the_terminal_shows_one_line_and_the_messages_above_it():
    progress, stream, clock = _live(80)
    with progress:
        for step in range(1, 101):
            clock.now += 0.5
            progress.update(step, 5 / step, 1000.0)
            if step == 50:
                progress.print("saved checkpoint 50")
                assert "step 50/100" in stream.screen()[1]
        progress.print("eval [b]accuracy[/b] 0.9")
    screen = [line for line in stream.screen() if line]
    assert screen[:2] == ["saved checkpoint 50", "eval [b]accuracy[/b] 0.9"]
    (line,) = screen[2:]
    assert line.startswith("demo  step 100/100  100%  ━━━") and "loss 0.050" in line
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is visible again


def test_the_bar_fills_with_the_steps():
    progress, stream, clock = _live(80)
    bars = []
    with progress:
        for step in (10, 50, 90):
            clock.now += 1
            progress.update(step, 1.0, 10.0)
            bars.append(stream.screen()[0].count("━") / 17)
    assert bars == sorted(bars) and len(set(bars)) == 3


@pytest.mark.parametrize("width", [12, 20, 30, 40, 60, 79, 120, 300])
def test_the_live_line_never_wraps(width):
    progress, stream, clock = _live(width, total=123456, description="a long description")
    with progress:
        for step in (1, 60000, 100000):
            clock.now += 3600
            progress.update(step, 1.5, 12345.0)
    lines = [line for line in stream.screen(width) if line]
    assert len(lines) == 1 and len(lines[0]) < width
    assert "step" in lines[0]
    assert ("examples/s" in lines[0]) == (width >= 120)


def test_redraws_are_limited():
    progress, stream, clock = _live(80, total=10_000)
    with progress:
        for step in range(1, 1001):
            clock.now += 0.001
            progress.update(step, 1.0, 10.0)
    redraws = stream.getvalue().count("\x1b[2K")
    assert 5 <= redraws <= 20


def test_a_run_that_fails_before_its_first_step_leaves_nothing():
    progress, stream, _ = _live(80)
    with pytest.raises(RuntimeError), progress:
        raise RuntimeError
    assert not any(stream.screen())
    rows_up = sum(int(n) for n in re.findall(r"\x1b\[(\d+)A", stream.getvalue()))
    assert stream.getvalue().count("\n") == rows_up  # the cursor is back where it was


def test_ascii_terminals_get_an_ascii_bar():
    class AsciiTerminal(Terminal):
        encoding = "ascii"

    stream, clock = AsciiTerminal(), Clock()
    with Progress(10, stream=stream, time_fn=clock, width=90) as progress:
        progress.update(5, 1.0, 10.0)
    assert "#" in stream.getvalue() and stream.getvalue().isascii()


def test_null_progress_accepts_everything(capsys):
    with NullProgress() as progress:
        progress.update(1, 2.0, 3.0)
        progress.print("hello")
        with progress.paused():
            pass
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
