"""Turns captioned images into globally shuffled shards with a manifest, on Apache Beam.

    vlp-jax prepare-data --input photos --input-format folder \\
        --output prepared --output-format array_record --shards 16
    vlp-jax prepare-data --input 'cc3m/{00000..00331}.tar' --input-format webdataset \\
        --fields image=jpg text=txt width=json.width --output gs://bucket/cc3m \\
        --output-format array_record --examples-per-shard 10000 \\
        --runner=DataflowRunner --project=... --region=... --temp_location=gs://...
    vlp-jax prepare-data --verify --output prepared

Images are copied as they are, never re-encoded. The same input, seed and number of shards give
the same bytes, on any runner. If it is stopped, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from vlp_jax.arguments import make_parser
from vlp_jax.data.prepare import job as jobs
from vlp_jax.data.prepare import paths, plan
from vlp_jax.data.prepare.examples import IMAGE
from vlp_jax.data.prepare.inputs import FORMATS
from vlp_jax.data.prepare.shards import WRITERS
from vlp_jax.errors import UserError
from vlp_jax.training.command import run_command

EPILOG = """fields, as NAME=INPUT; NAME is image, text (the captions) or any other name:
  folder      INPUT is a column of the caption file (default: image and text by their usual names);
              label=COLUMN becomes the number of a class
  webdataset  INPUT is an ending or several (jpg,png; txt; cls is an integer), or json.KEY
              (default: image=jpg,jpeg,png,webp,gif,bmp text=txt)
  parquet     INPUT is a column, nested ones by dots; images are bytes or struct<bytes, path>

Beam's own flags may follow anywhere (--runner, --direct_num_workers, --temp_location, ...); those
that only a runner knows come last, after --. Without --runner it runs in this process."""
POLL_SECONDS, POLL_SHARE = 0.5, 20  # at least the one, and so many times as a look takes
PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments; `flags` are Beam's."""
    parser = make_parser("vlp-jax prepare-data", __doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--input", nargs="+", metavar="PATTERN", help="a folder, files, globs, brace ranges or "
        "fsspec URLs such as gs://bucket/{0000..0041}.tar")  # fmt: skip
    add("--input-format", choices=FORMATS, help="what is read")
    add("--output", metavar="DIR", required=True, help="a folder or URL for shards and manifest")
    add("--output-format", choices=list(WRITERS), help="what is written")
    sharding = parser.add_mutually_exclusive_group()
    sharding.add_argument("--shards", type=int, metavar="N", help="their number; sizes differ by 1")
    sharding.add_argument("--examples-per-shard", type=int, metavar="N", help="at most so many")
    add("--seed", type=int, default=0, help="of the order of examples (default: 0)")
    add("--fields", nargs="+", default=[], metavar="NAME=INPUT", help="what to keep: see below")
    add(
        "--split", default="train", metavar="NAME", help="file names begin with it (default: train)"
    )
    add("--max-bad-fraction", type=float, default=0.1, metavar="F", help="of examples that are "
        "damaged and skipped, above which nothing is written (default: 0.1)")  # fmt: skip
    add("--check-images", action="store_true", help="decode every image, not its header alone")
    add("--verify", action="store_true", help="read finished shards and compare their checksums; "
        "with --output alone, report on a finished folder")  # fmt: skip
    argv = list(argv)
    # Beam has flags of its runners that no parser here knows.
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments, flags = parser.parse_known_args(argv[:cut])
    arguments.unchecked, arguments.flags = flags, (*flags, *argv[cut + 1 :])
    # argparse cannot say: required, unless --verify stands alone.
    only_verify = arguments.verify and arguments.input is None
    needed = ("input", "input_format", "output_format")
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(arguments, name) is None]
    if missing and not only_verify:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return arguments


def verify(output: str, split: str) -> str:
    """Reads all of a finished folder; returns a report, or names all damage and raises."""
    jobs.check_split(split)
    folder = paths.absolute(output)
    manifest = jobs.load_manifest(folder, split)
    if manifest is None:
        raise UserError(f"there is no {jobs.manifest_path(folder, split)} to verify")
    # All shards are read before the first is named: one run tells all the damage.
    faults = jobs.faults_of(manifest, folder, read=True)
    if faults:
        for fault in faults.values():
            print(fault, file=sys.stderr)
        raise UserError(
            f"{len(faults)} of {len(manifest['shards'])} shards are damaged: remove them and run "
            "the command that wrote them again"
        )
    shards = manifest["shards"]
    size = sum(shard["bytes"] for shard in shards)
    return (
        f"{manifest['examples']:,} examples in {len(shards)} shards, {size:,} bytes: "
        "all checksums are right"
    )


def report(arguments: argparse.Namespace, result: jobs.Result, seconds: float) -> str:
    """Returns the counts of written and skipped examples, and how to train on them."""
    manifest = result.manifest
    sizes = [shard["examples"] for shard in manifest["shards"]]
    split, folder = manifest["split"], paths.absolute(arguments.output)
    lines = []
    for reason, count in manifest["skipped"].items():
        lines.append(f"skipped {count:,}: {reason}")
        lines += [f"  {line}" for line in result.examples_named.get(reason, [])]
    done = "was finished before" if result.was_finished else f"took {seconds:.0f}s"
    lines += [
        f"{manifest['examples']:,} examples in {len(sizes)} shards of {min(sizes):,} to "
        f"{max(sizes):,}, {sum(shard['bytes'] for shard in manifest['shards']):,} bytes: {done}",
        "To train on them:",
        *(f"  {line}" for line in config_lines(manifest, jobs.manifest_path(folder, split))),
    ]
    return "\n".join(lines)


def config_lines(manifest: jobs.Manifest, path: str) -> list[str]:
    """Returns the lines of a config by which examples have the fields of the manifest."""
    lines = [f'config.data.source = "{manifest["format"]}"', f'config.data.path = "{path}"']
    if manifest["format"] == "webdataset":
        # All but the image is in KEY.json; its readers know no lists of numbers.
        known = [
            name
            for name, kind in manifest["fields"].items()
            if not kind["list"] or kind["dtype"] == "bytes"
        ]
        names = {name: name if name == IMAGE else f"json.{name}" for name in known}
        lines.append(f"config.data.fields = {json.dumps(names)}")
    return lines


@contextlib.contextmanager
def watch(title: str, total: int, count: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """Shows on stderr how much of `total` is done: a bar on a terminal, else lines."""
    bar = tqdm(desc=title, total=total, disable=None)  # off where there is no terminal
    over = threading.Event()
    started, before = time.monotonic(), count()[1]

    def show() -> None:
        done, examples = count()
        # What an earlier run had done does not count as speed.
        speed = f"{(examples - before) / max(time.monotonic() - started, 1e-3):,.0f} examples/s"
        bar.set_postfix_str(speed, refresh=False)
        bar.update(done - bar.n)
        if bar.disable:
            print(f"{title}: {done}/{total}  {speed}", file=sys.stderr, flush=True)

    def poll() -> None:
        pause = least = PLAIN_SECONDS if bar.disable else POLL_SECONDS
        while not over.wait(pause):
            begin = time.monotonic()
            show()
            # A look lists the shards, which takes seconds in a bucket: it must not become the work.
            pause = max(least, POLL_SHARE * (time.monotonic() - begin))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    with bar:
        try:
            yield
        finally:
            over.set()
            thread.join()
            show()


def prepare(arguments: argparse.Namespace) -> str:
    """Does the job of the arguments; returns a report."""
    plan.check_flags(arguments.unchecked)
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(jobs.PrepareJob)}
    given["fields"] = jobs.parse_fields(arguments.fields)
    job = jobs.PrepareJob(**given)
    started = time.monotonic()
    result = jobs.prepare(job, watch)
    return report(arguments, result, time.monotonic() - started)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        if arguments.input is None:
            print(verify(arguments.output, arguments.split))
        else:
            print(prepare(arguments))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
