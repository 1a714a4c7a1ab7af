"""Images per second of each source, beside what tf.data can do at best and beside PyTorch.

    python -m tools.bench_data --corpus DIR [--sources folder,webdataset] [--antialias both]

All decode the same JPEG files, cut out a random rectangle and resize it to uint8: our pipeline on
each source; tf.data alone on bytes in memory and known rectangles ("tf.data limit"); PyTorch's
DataLoader on the files, with Pillow and with its own resizing; WebDataset's loader on tar shards.
They run in turns, in rounds; a ratio is the median of those of the rounds. Whether a resize
antialiases is said with every figure: it costs more than decoding does.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from rich.console import Console
from rich.status import Status
from rich.table import Table

from tools.bench_corpus import NAMES, Corpus, data_config
from tools.bench_loaders import DecodeLimit, Loader, PipelineLoader, Speed, Task, Turn, peak_memory
from vlp_jax.errors import UserError, unknown_key_message

LIMIT, PILLOW, TORCH, WEBDATASET = "tf.data limit", "torch+pillow", "torch", "webdataset"
WARM_UP_IMAGES = 384  # what may wait in buffers: of two workers of PyTorch, 4 batches of 64
BUSY = 0.8  # of our throughput: what training uses where its waiting is measured
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
PACKAGES = (
    "tensorflow-cpu",
    "tensorflow",
    "torch",
    "pillow",
    "webdataset",
    "numpy",
    "array_record",
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--sources", default="all", help=f"some of {','.join(NAMES)}; default: all")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="keeps the photos for next time")
    parser.add_argument("--images", default=512, help="photos of the corpus", **number)
    parser.add_argument("--turn", default=1024, help="images that are timed in a turn", **number)
    parser.add_argument("--rounds", default=5, help="turns of each", **number)
    parser.add_argument("--batch-size", default=64, **number)
    parser.add_argument("--size", default=224, help="side of the images that come out", **number)
    parser.add_argument("--min-scale", type=float, default=0.5, help="least area of a crop")
    parser.add_argument("--method", choices=("bilinear", "bicubic"), default="bilinear")
    parser.add_argument("--antialias", choices=("on", "off", "both"), default="both")
    parser.add_argument("--cores", help="use so many; default: all that this process may", **number)
    parser.add_argument("--seed", default=0, help="of the photos and of the crops", **number)
    parser.add_argument("--peers", choices=("on", "off"), default="on", help="PyTorch, WebDataset")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parser.parse_args(argv)


def say(status: Status, text: str) -> None:
    """What is going on: in place on a terminal, else a line."""
    status.update(text)
    if not status.console.is_terminal:
        status.console.print(text, highlight=False)


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for a number that makes no sense."""
    for name in ("images", "turn", "rounds", "batch_size", "size"):
        if getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(arguments, name)} must be at least 1")
    if not 0 < arguments.min_scale <= 1:
        raise UserError(f"--min-scale {arguments.min_scale} is not in (0, 1]")
    if arguments.cores is not None and not 1 <= arguments.cores <= len(os.sched_getaffinity(0)):
        most = len(os.sched_getaffinity(0))
        raise UserError(f"--cores {arguments.cores} is not from 1 to {most}, which this may use")


def chosen_sources(text: str) -> list[str]:
    """The names of a list with commas.

    Raises:
      UserError: one that is not known.
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
    chosen = sorted(before)[:cores]
    os.sched_setaffinity(0, chosen)
    try:
        yield len(chosen)
    finally:
        os.sched_setaffinity(0, before)


def make_turn(arguments: argparse.Namespace, cores: int) -> Turn:
    """A turn of `--turn` images at least, in as many batches for every worker."""
    size = arguments.batch_size

    def batches(images: int) -> int:
        return math.ceil(images / size / cores) * cores

    # PyTorch's workers prepare two batches each, tf.data's threads one and two more.
    warm_up = max(batches(WARM_UP_IMAGES), 3 * cores)
    return Turn(warm_up=warm_up, timed=batches(arguments.turn), rest=2 * cores)


def open_peers(corpus: Corpus, task: Task, turn: Turn, status: Status) -> dict:
    """The loaders of others; says which are not installed."""
    try:
        from tools import bench_peers
    except ImportError:
        status.console.print("PyTorch is not installed: no comparison with it")
        return {}
    common = {"batch_size": task.batch_size, "workers": task.cores, "batches": turn.total}

    def transform(resize: str) -> bench_peers.Transform:
        return bench_peers.Transform(task.size, task.min_scale, task.method, task.antialias, resize)

    loaders = {
        TORCH: bench_peers.files_loader(corpus.files, transform("torch"), **common),
        PILLOW: bench_peers.files_loader(corpus.files, transform("pillow"), **common),
    }
    fastest = "pillow" if task.antialias else "torch"
    try:
        shards = sorted(str(path) for path in corpus.path("webdataset").iterdir())
        loaders[WEBDATASET] = bench_peers.webdataset_loader(shards, transform(fastest), **common)
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
    """The speed of each loader in each round; another one begins each round."""
    speeds: dict[str, list[Speed]] = {name: [] for name in loaders}
    names = list(loaders)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            say(status, f"round {number + 1} of {rounds}: {name}")
            speeds[name].append(turn.speed(loaders[name], batch_size))
    return speeds


def ratio(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the ratios of the rounds."""
    values = [mine / theirs for mine, theirs in zip(own, other, strict=True)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def entry(name: str, speeds: Mapping[str, list[Speed]], task: Task) -> dict[str, Any]:
    """The figures of one loader, as they stand in the JSON file."""
    own = [speed.second for speed in speeds[name]]
    own_cpu = [speed.cpu_second for speed in speeds[name]]
    figures: dict[str, Any] = {
        "name": name,
        "antialias": task.antialias,
        "method": task.method,
        "images_per_second": statistics.median(own),
        "images_per_second_per_core": statistics.median(own) / task.cores,
        "images_per_cpu_second": statistics.median(own_cpu),
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
        theirs = speeds.get(other)
        by_clock = theirs and ratio(own, [speed.second for speed in theirs])
        by_cpu = theirs and ratio(own_cpu, [speed.cpu_second for speed in theirs])
        figures |= {
            f"ratio_to_{key}": by_clock and by_clock["median"],
            f"ratio_to_{key}_range": by_clock and [by_clock["min"], by_clock["max"]],
            f"cpu_ratio_to_{key}": by_cpu and by_cpu["median"],
        }
    return figures


def bench(
    corpus: Corpus, names: Sequence[str], task: Task, arguments: argparse.Namespace, status: Status
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The figures of our sources and of what they are compared with, for one way to resize."""
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
        step = task.batch_size / (BUSY * figures["images_per_second"])
        figures["wait_share"] = turn.wait_share(loader, step)
        sources.append(figures)
    return sources, [entry(name, speeds, task) for name in others]


def versions() -> dict[str, str]:
    """Those of Python and of the packages that do the work."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine(cores: int) -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores_used": cores,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints a table for each way to resize, and what its columns are."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    columns = {
        "/core": ("images_per_second_per_core", ",.0f"),
        "/cpu-s": ("images_per_cpu_second", ",.0f"),
        "/limit": ("ratio_to_decode", ".2f"),
        "(cpu)": ("cpu_ratio_to_decode", ".2f"),
        "/PIL": ("ratio_to_pil", ".2f"),
        "/Pillow": ("ratio_to_pillow", ".2f"),
        "waits": ("wait_share", ".1%"),
        "MiB": ("peak_mib", ",.0f"),
    }
    for antialias in result["settings"]["antialias"]:
        way = f"{result['settings']['method']}, {'' if antialias else 'not '}antialiased"
        title = f"{way}; {result['machine']['cores_used']} cores"
        table = Table(title=title, title_justify="left")
        table.add_column("loader", no_wrap=True)
        for name in columns:
            table.add_column(name, justify="right")
        for kind in ("sources", "others"):
            for row in (row for row in result[kind] if row["antialias"] == antialias):
                cells = (cell(row.get(key), form) for key, form in columns.values())
                table.add_row(row["name"], *cells)
            table.add_section()
        console.print(table)
    console.print(LEGEND.format(rounds=result["settings"]["rounds"]), highlight=False)


def run(arguments: argparse.Namespace, folder: Path, cores: int, status: Status) -> dict[str, Any]:
    """Everything that is measured, as it stands in the JSON file."""
    names = chosen_sources(arguments.sources)
    corpus = Corpus(folder, arguments.images, arguments.seed)
    say(status, f"{arguments.images} photos in {folder}")
    ways = {"on": [True], "off": [False], "both": [False, True]}[arguments.antialias]
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(cores),
        "versions": versions(),
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    # Not at the top: PyTorch's workers import this module, and need no JAX.
    from vlp_jax.training.command import run_command

    arguments = parse(sys.argv[1:] if argv is None else argv)
    progress = Console(stderr=True)

    def command() -> None:
        check(arguments)
        with contextlib.ExitStack() as stack:
            cores = stack.enter_context(pinned(arguments.cores))
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="vlp_jax_bench_"))
            folder = arguments.corpus or Path(temporary)
            status = progress.status("writing the photos", refresh_per_second=2)
            stack.enter_context(status)
            result = run(arguments, folder, cores, status)
        show(result, Console())
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
