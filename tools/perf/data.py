"""Images per second of each source, beside tf.data at its best and beside PyTorch.

    python -m tools.perf.data --corpus DIR [--sources folder,webdataset] [--antialias both]

All decode the same JPEG files, cut out a random rectangle and resize it to uint8: our pipeline on
each source; tf.data alone on bytes in memory and known rectangles ("tf.data limit"); PyTorch's
DataLoader on the files, with Pillow and with its own resizing; WebDataset's loader on tar shards.
They run in turns, in rounds; a ratio is the median over the rounds. Whether a resize antialiases is
said with every figure: it costs more than decoding does. All use the cores that this process may
use, which `taskset` can make fewer.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tools.perf import harness
from tools.perf.corpus import NAMES, Corpus, data_config
from tools.perf.loaders import DecodeLimit, Loader, PipelineLoader, Speed, Task, Turn
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.errors import UserError

LIMIT, PILLOW, TORCH, WEBDATASET = "tf.data limit", "torch+pillow", "torch", "webdataset"
WARM_UP_IMAGES = 384  # images that may wait in buffers: of two workers of PyTorch, 4 batches of 64
LEGEND = (
    "/core: images a second and core, median of {rounds} rounds. /cpu-s: images for a second that "
    "a core worked, which other jobs on the machine disturb far less. /limit and /PIL: medians of "
    "the ratios of the rounds by the clock, (cpu) by the work. PIL: Pillow decodes in the workers "
    "of PyTorch, and with antialiasing resizes too; without it PyTorch resizes, which is faster "
    "than Pillow can (/Pillow: Pillow does both)."
)
COLUMNS = {
    "/core": ("images_per_second_per_core", ",.0f"),
    "/cpu-s": ("images_per_cpu_second", ",.0f"),
    "/limit": ("ratio_to_decode", ".2f"),
    "(cpu)": ("cpu_ratio_to_decode", ".2f"),
    "/PIL": ("ratio_to_pil", ".2f"),
    "/Pillow": ("ratio_to_pillow", ".2f"),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments.

    Raises:
      UserError: a number out of its range, or an unknown source.
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
    add("--antialias", choices=("on", "off", "both"), default="both")
    add("--seed", default=0, help="of the photos and of the crops", **number)
    add("--peers", choices=("on", "off"), default="on", help="PyTorch and WebDataset")
    counts = ("images", "turn", "rounds", "batch_size", "size")
    arguments, _ = parse_with_overrides(parser, argv, *counts)
    if not 0 < arguments.min_scale <= 1:
        raise UserError(f"--min-scale {arguments.min_scale} is not in (0, 1]")
    arguments.sources = NAMES if arguments.sources == "all" else arguments.sources.split(",")
    harness.check_names(arguments.sources, NAMES, "--sources")
    return arguments


def make_turn(arguments: argparse.Namespace, cores: int) -> Turn:
    """Makes a turn of `--turn` images at least, in as many batches for every worker."""
    size = arguments.batch_size

    def batches(images: int) -> int:
        return math.ceil(images / size / cores) * cores

    # PyTorch's workers prepare two batches each, tf.data's threads one and two more.
    warm_up = max(batches(WARM_UP_IMAGES), 3 * cores)
    return Turn(warm_up=warm_up, timed=batches(arguments.turn), rest=2 * cores)


def open_peers(corpus: Corpus, task: Task, turn: Turn) -> dict[str, Loader]:
    """Opens the loaders of others; says which are not installed."""
    try:
        from tools.perf import torch_loaders
    except ImportError:
        print("PyTorch is not installed: no comparison with it", file=sys.stderr)
        return {}
    common = {"batch_size": task.batch_size, "workers": task.cores, "batches": turn.total}
    form = (task.size, task.min_scale, task.antialias)
    by_torch, by_pillow = (torch_loaders.Transform(*form, way) for way in ("torch", "pillow"))
    files = [str(file) for file in corpus.files]
    loaders: dict[str, Loader] = {
        TORCH: torch_loaders.files_loader(files, by_torch, **common),
        PILLOW: torch_loaders.files_loader(files, by_pillow, **common),
    }
    fastest = by_pillow if task.antialias else by_torch
    try:
        shards = sorted(str(path) for path in corpus.path("webdataset").iterdir())
        loaders[WEBDATASET] = torch_loaders.webdataset_loader(shards, fastest, **common)
    except ImportError:
        print("webdataset is not installed: no comparison with it", file=sys.stderr)
    return loaders


def measure(
    loaders: Mapping[str, Loader], turn: Turn, batch_size: int, rounds: int
) -> dict[str, list[Speed]]:
    """Returns the speed of each loader in each round; another one begins each round."""
    turns = {n: functools.partial(turn.speed, one, batch_size) for n, one in loaders.items()}

    def tell(number: int, name: str) -> None:
        print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)

    return harness.in_turns(turns, rounds, before=tell)


def entry(name: str, speeds: Mapping[str, list[Speed]], task: Task) -> dict[str, Any]:
    """Returns the figures of one loader, as they stand in the JSON file."""
    by_clock = {n: [speed.second for speed in found] for n, found in speeds.items()}
    by_cpu = {n: [speed.cpu_second for speed in found] for n, found in speeds.items()}
    own = by_clock[name]
    figures: dict[str, Any] = {
        "name": name,
        "antialias": task.antialias,
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
    corpus: Corpus, names: Sequence[str], task: Task, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the figures of our sources and of the loaders of others, for one way to resize."""
    turn = make_turn(arguments, task.cores)
    others: dict[str, Loader] = {LIMIT: DecodeLimit(corpus.photos, task)}
    if arguments.peers == "on":
        others |= open_peers(corpus, task, turn)
    # Ours may have the name of another's: the source webdataset and the library.
    ours = {
        f"source {name}": PipelineLoader(data_config(name, corpus, task.preprocess), task)
        for name in names
    }
    speeds = measure(ours | others, turn, task.batch_size, arguments.rounds)
    sources = [entry(f"source {name}", speeds, task) | {"name": name} for name in names]
    return sources, [entry(name, speeds, task) for name in others]


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints a table for each way to resize, and the meaning of its columns."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    for antialias in result["settings"]["antialias"]:
        way = f"bilinear, {'' if antialias else 'not '}antialiased"
        rows = [
            (one["name"], *(cell(one.get(key), form) for key, form in COLUMNS.values()))
            for kind in ("sources", "others")
            for one in result[kind]
            if one["antialias"] == antialias
        ]
        title = f"{way}; {result['settings']['cores_used']} cores"
        console.print(harness.make_table(title, ("loader", *COLUMNS), rows))
    console.print(LEGEND.format(rounds=result["settings"]["rounds"]), highlight=False)


def run(arguments: argparse.Namespace, folder: Path, cores: int) -> dict[str, Any]:
    """Returns all that is measured, as it stands in the JSON file."""
    corpus = Corpus(folder, arguments.images, arguments.seed)
    print(f"{arguments.images} photos in {folder}", file=sys.stderr)
    ways = {"on": [True], "off": [False], "both": [False, True]}[arguments.antialias]
    kept = ("images", "turn", "rounds", "batch_size", "size", "min_scale", "seed")
    settings = {name: getattr(arguments, name) for name in kept}
    settings |= {"mean_image_bytes": statistics.mean(map(len, corpus.photos))}
    settings |= {"antialias": ways, "cores_used": cores}
    result: dict[str, Any] = {"settings": settings, "sources": [], "others": []}
    form = (arguments.size, arguments.batch_size, arguments.min_scale)
    for antialias in ways:
        task = Task(*form, antialias, cores, arguments.seed)
        sources, others = bench(corpus, arguments.sources, task, arguments)
        result["sources"] += sources
        result["others"] += others
    return result


def command(argv: list[str]) -> None:
    """Measures, prints and writes."""
    arguments = parse(argv)
    # Threads of TensorFlow and workers of PyTorch inherit what `taskset` leaves of them.
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="vlp_jax_bench_") as temporary:
        result = run(arguments, arguments.corpus or Path(temporary), cores)
    show(result, Console())
    harness.write_json(arguments.json, "data", argv, result)


main = harness.main_of(command)

if __name__ == "__main__":
    sys.exit(main())
