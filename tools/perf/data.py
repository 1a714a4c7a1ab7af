"""Images per second of each source, beside tf.data at its best and beside PyTorch.

    python -m tools.perf.data --corpus DIR [--sources folder,webdataset] [--antialias both]

All decode the same JPEG files, cut out a random rectangle and resize it to uint8: our pipeline on
each source; tf.data alone on bytes in memory and known rectangles ("tf.data limit"); PyTorch's
DataLoader on the files, with Pillow and with its own resizing; WebDataset's loader on tar shards.
They run in turns, in rounds; a ratio is the median over the rounds. Whether a resize antialiases is
said with every figure: it costs more than decoding does.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from tools.perf import harness
from tools.perf.corpus import NAMES, Corpus, data_config
from tools.perf.loaders import DecodeLimit, Loader, PipelineLoader, Speed, Task, Turn, peak_memory
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.errors import UserError, unknown_key_message

LIMIT, PILLOW, TORCH, WEBDATASET = "tf.data limit", "torch+pillow", "torch", "webdataset"
WARM_UP_IMAGES = 384  # images that may wait in buffers: of two workers of PyTorch, 4 batches of 64
BUSY = 0.8  # of our throughput: the share that training uses where its waiting is measured
LEGEND = (
    "/core: images a second and core, median of {rounds} rounds. /cpu-s: images for a second that "
    "a core worked, which other jobs on the machine disturb far less. /limit and /PIL: medians of "
    "the ratios of the rounds by the clock, (cpu) by the work. PIL: Pillow decodes in the "
    "workers of PyTorch, and with antialiasing resizes too; without it PyTorch resizes, which is "
    "faster than Pillow can (/Pillow: Pillow does both). waits: the share of its time that "
    "training waits for data while its "
    f"steps take {1 / BUSY:.2f} times as long as the data of a step. MiB: peak memory of a process "
    "that reads the source, above its imports."
)
COLUMNS = {
    "/core": ("images_per_second_per_core", ",.0f"),
    "/cpu-s": ("images_per_cpu_second", ",.0f"),
    "/limit": ("ratio_to_decode", ".2f"),
    "(cpu)": ("cpu_ratio_to_decode", ".2f"),
    "/PIL": ("ratio_to_pil", ".2f"),
    "/Pillow": ("ratio_to_pillow", ".2f"),
    "waits": ("wait_share", ".1%"),
    "MiB": ("peak_mib", ",.0f"),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments.

    Raises:
      UserError: a number out of its range.
    """
    parser = harness.make_parser("data", __doc__, rounds=5)
    add, number = parser.add_argument, {"type": int, "metavar": "N"}
    add("--sources", default="all", help=f"some of {','.join(NAMES)}; default: all")
    add("--corpus", type=Path, metavar="DIR", help="keeps the photos for next time")
    add("--images", default=512, help="photos of the corpus (default: %(default)s)", **number)
    add("--turn", default=1024, help="images that are timed in a turn", **number)
    add("--batch-size", default=64, help="default: %(default)s", **number)
    add("--size", default=224, help="side of the images that come out", **number)
    add("--min-scale", type=float, default=0.5, help="least area of a crop (default: 0.5)")
    add("--method", choices=("bilinear", "bicubic"), default="bilinear")
    add("--antialias", choices=("on", "off", "both"), default="both")
    add("--cores", help="use so many (default: all that this process may)", **number)
    add("--seed", default=0, help="of the photos and of the crops", **number)
    add("--peers", choices=("on", "off"), default="on", help="PyTorch and WebDataset")
    counts = ("images", "turn", "rounds", "batch_size", "size")
    arguments, _ = parse_with_overrides(parser, argv, *counts)
    if not 0 < arguments.min_scale <= 1:
        raise UserError(f"--min-scale {arguments.min_scale} is not in (0, 1]")
    most = len(os.sched_getaffinity(0))
    if arguments.cores is not None and not 1 <= arguments.cores <= most:
        raise UserError(f"--cores {arguments.cores} is not from 1 to {most}, which this may use")
    return arguments


def say(status: Status, text: str) -> None:
    """Tells the task at hand: in place on a terminal, else by a line."""
    status.update(text)
    if not status.console.is_terminal:
        status.console.print(text, highlight=False)


def chosen_sources(text: str) -> list[str]:
    """Returns the names of a list with commas.

    Raises:
      UserError: a name that is not known.
    """
    names = list(NAMES) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in NAMES:
            raise UserError(f"--sources: {unknown_key_message(name, NAMES, 'the sources')}")
    return names


@contextlib.contextmanager
def pinned(cores: int | None) -> Iterator[int]:
    """Holds this process and those it starts to so many cores; gives their number."""
    before = os.sched_getaffinity(0)
    # Threads of TensorFlow and workers of PyTorch inherit it: both have the same cores.
    chosen = sorted(before)[:cores]
    os.sched_setaffinity(0, chosen)
    try:
        yield len(chosen)
    finally:
        os.sched_setaffinity(0, before)


def make_turn(arguments: argparse.Namespace, cores: int) -> Turn:
    """Makes a turn of `--turn` images at least, in as many batches for every worker."""
    size = arguments.batch_size

    def batches(images: int) -> int:
        return math.ceil(images / size / cores) * cores

    # PyTorch's workers prepare two batches each, tf.data's threads one and two more.
    warm_up = max(batches(WARM_UP_IMAGES), 3 * cores)
    return Turn(warm_up=warm_up, timed=batches(arguments.turn), rest=2 * cores)


def open_peers(corpus: Corpus, task: Task, turn: Turn, status: Status) -> dict:
    """Opens the loaders of others; says which are not installed."""
    try:
        from tools.perf import torch_loaders
    except ImportError:
        status.console.print("PyTorch is not installed: no comparison with it")
        return {}
    common = {"batch_size": task.batch_size, "workers": task.cores, "batches": turn.total}

    def transform(resize: str) -> torch_loaders.Transform:
        return torch_loaders.Transform(
            task.size, task.min_scale, task.method, task.antialias, resize
        )

    loaders = {
        TORCH: torch_loaders.files_loader(corpus.files, transform("torch"), **common),
        PILLOW: torch_loaders.files_loader(corpus.files, transform("pillow"), **common),
    }
    # WebDataset's loader gets the better of the two ways to resize.
    fastest = "pillow" if task.antialias else "torch"
    try:
        shards = sorted(str(path) for path in corpus.path("webdataset").iterdir())
        loaders[WEBDATASET] = torch_loaders.webdataset_loader(shards, transform(fastest), **common)
    except ImportError:
        status.console.print("webdataset is not installed: no comparison with it")
    return loaders


def measure(
    loaders: Mapping[str, Loader],
    turn: Turn,
    batch_size: int,
    rounds: int,
    status: Status,
) -> dict[str, list[Speed]]:
    """Returns the speed of each loader in each round; another one begins each round."""
    turns = {n: functools.partial(turn.speed, one, batch_size) for n, one in loaders.items()}
    told = lambda number, name: say(status, f"round {number + 1} of {rounds}: {name}")  # noqa: E731
    return harness.in_turns(turns, rounds, before=told)


def entry(name: str, speeds: Mapping[str, list[Speed]], task: Task) -> dict[str, Any]:
    """Returns the figures of one loader, as they stand in the JSON file."""
    by_clock = {n: [speed.second for speed in found] for n, found in speeds.items()}
    by_cpu = {n: [speed.cpu_second for speed in found] for n, found in speeds.items()}
    own = by_clock[name]
    figures: dict[str, Any] = {
        "name": name,
        "antialias": task.antialias,
        "method": task.method,
        "images_per_second": statistics.median(own),
        "images_per_second_per_core": statistics.median(own) / task.cores,
        "images_per_cpu_second": statistics.median(by_cpu[name]),
        "images_per_second_by_round": own,
    }
    for key, other in {
        "decode": LIMIT,
        # Without antialiasing, Pillow decodes and PyTorch resizes: there is nothing faster.
        "pil": PILLOW if task.antialias else TORCH,
        "pillow": PILLOW,
        "torch_tensor": TORCH,
        "webdataset": WEBDATASET,
    }.items():
        clock = other in speeds and harness.ratio(own, by_clock[other])
        cpu = other in speeds and harness.ratio(by_cpu[name], by_cpu[other])
        figures |= {
            f"ratio_to_{key}": clock.median if clock else None,
            f"ratio_to_{key}_range": [min(clock.rounds), max(clock.rounds)] if clock else None,
            f"cpu_ratio_to_{key}": cpu.median if cpu else None,
        }
    return figures


def bench(
    corpus: Corpus, names: Sequence[str], task: Task, arguments: argparse.Namespace, status: Status
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the figures of our sources and of the loaders of others, for one way to resize."""
    turn = make_turn(arguments, task.cores)
    ours: dict[str, Loader] = {
        name: PipelineLoader(data_config(name, corpus, task.preprocess), task) for name in names
    }
    others: dict[str, Loader] = {LIMIT: DecodeLimit(corpus.photos, task)}
    if arguments.peers == "on":
        others |= open_peers(corpus, task, turn, status)
    # Ours may have the name of another's: the source webdataset and the library.
    loaders = {f"source {name}": loader for name, loader in ours.items()} | others
    try:
        speeds = measure(loaders, turn, task.batch_size, arguments.rounds, status)
    finally:
        for loader in others.values():
            loader.close()
    sources = []
    for name, loader in ours.items():
        figures = {**entry(f"source {name}", speeds, task), "name": name}
        say(status, f"waiting for data: {name}")
        # A step a little longer than its data: a source that delivers evenly makes nobody wait.
        step = task.batch_size / (BUSY * figures["images_per_second"])
        figures["wait_share"] = turn.wait_share(loader, step)
        sources.append(figures)
    return sources, [entry(name, speeds, task) for name in others]


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints a table for each way to resize, and the meaning of its columns."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for antialias in result["settings"]["antialias"]:
        way = f"{result['settings']['method']}, {'' if antialias else 'not '}antialiased"
        rows = [
            (one["name"], *(cell(one.get(key), form) for key, form in COLUMNS.values()))
            for kind in ("sources", "others")
            for one in result[kind]
            if one["antialias"] == antialias
        ]
        title = f"{way}; {result['settings']['cores_used']} cores"
        console.print(harness.make_table(title, ("loader", *COLUMNS), rows))
    console.print(LEGEND.format(rounds=result["settings"]["rounds"]), highlight=False)


def run(arguments: argparse.Namespace, folder: Path, cores: int, status: Status) -> dict[str, Any]:
    """Returns all that is measured, as it stands in the JSON file."""
    names = chosen_sources(arguments.sources)
    corpus = Corpus(folder, arguments.images, arguments.seed)
    say(status, f"{arguments.images} photos in {folder}")
    ways = {"on": [True], "off": [False], "both": [False, True]}[arguments.antialias]
    result: dict[str, Any] = {
        "settings": {
            "images": arguments.images,
            "mean_image_bytes": statistics.mean(map(len, corpus.photos)),
            "images_per_turn": arguments.turn,
            "rounds": arguments.rounds,
            "batch_size": arguments.batch_size,
            "size": arguments.size,
            "crop_area": [arguments.min_scale, 1.0],
            "method": arguments.method,
            "antialias": ways,
            "seed": arguments.seed,
            "cores_used": cores,
        },
        "sources": [],
        "others": [],
    }
    for antialias in ways:
        task = Task(
            arguments.size,
            arguments.batch_size,
            arguments.min_scale,
            arguments.method,
            antialias,
            cores,
            arguments.seed,
        )
        sources, others = bench(corpus, names, task, arguments, status)
        result["sources"] += sources
        result["others"] += others
    for name in names:  # the same, however images are resized
        say(status, f"memory: {name}")
        peak = peak_memory(name, corpus, task, make_turn(arguments, cores).total)
        for figures in result["sources"]:
            figures |= {"peak_mib": peak} if figures["name"] == name else {}
    return result


def command(argv: list[str]) -> None:
    """Measures, prints and writes."""
    arguments = parse(argv)
    progress = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        cores = stack.enter_context(pinned(arguments.cores))
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="vlp_jax_bench_"))
        folder = arguments.corpus or Path(temporary)
        status = progress.status("writing the photos", refresh_per_second=2)
        stack.enter_context(status)
        result = run(arguments, folder, cores, status)
    show(result, Console())
    harness.write_json(arguments.json, "data", argv, result)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
