"""A preparation from input to manifest (the shards, their source, fields and checksums).

Work that an earlier run finished is kept.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from vlp_jax.data.prepare import paths, plan
from vlp_jax.data.prepare import shards as shard_files
from vlp_jax.data.prepare.examples import CAPTIONS, ID, field_types
from vlp_jax.data.prepare.inputs import Input
from vlp_jax.errors import UserError

VERSION = 1
_IDENTITY = ("format", "split", "seed", "source")
_READERS = 8  # shards whose checksums are computed at once

Manifest = dict[str, Any]
# Most data sets call the captions "text".
_ALIASES = {"text": CAPTIONS, "caption": CAPTIONS}
_NAME = re.compile(r"[A-Za-z0-9_]+")

# watch(title, total, count) is a context manager around a long operation. count() returns how many
# of `total` parts are done, and how many examples they hold.
Watch = Callable[[str, int, Callable[[], tuple[int, int]]], contextlib.AbstractContextManager]


def no_watch(title: str, total: int, count: Callable[[], tuple[int, int]]) -> Any:
    """Shows nothing."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class PrepareJob:
    """The settings of a preparation, as `--help` explains them; `flags` are Beam's."""

    input: tuple[str, ...]
    input_format: str
    output: str
    output_format: str
    shards: int | None = None
    examples_per_shard: int | None = None
    seed: int = 0
    fields: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"
    max_bad_fraction: float = 0.1
    check_images: bool = False
    verify: bool = False
    flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.shards is None) == (self.examples_per_shard is None):
            raise UserError("give either --shards or --examples-per-shard")
        if (self.shards or self.examples_per_shard or 0) < 1:
            raise UserError("--shards and --examples-per-shard are at least 1")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"--max-bad-fraction {self.max_bad_fraction} is not in [0, 1]")
        check_split(self.split)


@dataclass(frozen=True)
class Result:
    """The outcome of a preparation: the manifest, and whether all of it was there before."""

    manifest: Manifest
    was_finished: bool
    examples_named: dict[str, list[str]]  # reason -> the first skipped examples


def check_split(split: str) -> None:
    """Raises a UserError for a name that could be mistaken for parts of a file name."""
    if not _NAME.fullmatch(split):
        raise UserError(f"--split {split!r} may hold letters, digits and underscores alone")


def parse_fields(pairs: Sequence[str]) -> dict[str, str]:
    """OUTPUT=INPUT pairs as a dict; `text` and `caption` stand for `captions`."""
    fields: dict[str, str] = {}
    for pair in pairs:
        name, equals, origin = pair.partition("=")
        name = _ALIASES.get(name, name)
        if not equals or not origin or not _NAME.fullmatch(name) or name == ID:
            raise UserError(f"--fields {pair} is not NAME=INPUT, such as text=txt (id is taken)")
        if name in fields:
            raise UserError(f"--fields names {name} twice")
        fields[name] = origin
    return fields


def prepare(job: PrepareJob, watch: Watch = no_watch) -> Result:
    """Runs a job, or the rest of it if an earlier run was stopped.

    Raises:
      UserError: for an input that cannot be read, too many examples that must be skipped, ids that
        occur twice, or a folder that holds another job.
    """
    output = paths.absolute(job.output)
    work = paths.join(output, f"{job.split}.unfinished")
    opened = Input.open(job.input_format, job.input, job.fields)
    identity = _identity(job, opened)
    finished = load_manifest(output, job.split)
    if finished is not None:
        _check_same({key: finished[key] for key in _IDENTITY}, identity, output)
        damaged = faults_of(finished, output, job.verify)
        if not damaged:
            paths.remove(work)
            return Result(finished, True, {})
    _begin(output, job.split, work, identity, finished)
    summary = plan.load(work) or _look(job, opened, work, watch)
    try:
        _check(summary, job)
        shards = _shards(summary, job, opened, output, work)
    except UserError:
        # The user will mend the input, so the next run has to look at it again.
        if not shard_files.records(work):
            paths.remove(work)
        raise
    kept = {}
    if finished is not None:
        kept = {s["file"]: s for s in finished["shards"] if s["file"] not in damaged}
    records = _write(shards, kept, job.flags, watch)
    _check_repaired(finished, records, output)
    skipped = {reason: count for reason, (count, _) in sorted(summary.faults.items())}
    manifest = _write_manifest(identity, output, shards.types, skipped, records)
    paths.remove(work)
    named = {reason: lines for reason, (_, lines) in sorted(summary.faults.items())}
    return Result(manifest, False, named)


def _identity(job: PrepareJob, opened: Input) -> dict[str, Any]:
    sharding = "shards" if job.shards else "examples_per_shard"
    source = {"format": job.input_format, **opened.source(), sharding: getattr(job, sharding)}
    source["check_images"] = job.check_images
    return {"format": job.output_format, "split": job.split, "seed": job.seed, "source": source}


def _begin(
    output: str, split: str, work: str, identity: dict[str, Any], finished: Manifest | None
) -> None:
    """Checks that the folder is free or holds this job, notes the job, and removes leftovers."""
    path = paths.join(work, "job.json")
    if "job.json" in paths.names_in(work):
        _check_same(json.loads(paths.read_bytes(path)), identity, output)
    known = [shard["file"] for shard in finished["shards"]] if finished else []
    foreign = shard_files.foreign_files(output, split, [*known, *shard_files.records(work)])
    if foreign:
        raise UserError(
            f"{output} holds {foreign[0]}, which no record of this job lists: give another "
            "--output or --split, or remove it"
        )
    paths.write_bytes(path, json.dumps(identity, ensure_ascii=False).encode())
    for leftover in paths.leftovers(output, split):
        paths.remove(leftover)


def _look(job: PrepareJob, opened: Input, work: str, watch: Watch) -> plan.Summary:
    # An earlier pass that was stopped may have been cut into other units.
    for begun in ("looked_at", "order", "staging"):
        paths.remove(paths.join(work, begun))
    buckets = plan.number_of_buckets(opened.estimated_examples())
    units = opened.units()

    def count() -> tuple[int, int]:
        names = paths.names_in(paths.join(work, "looked_at"))
        marks = [name for name in names if not name.startswith(".")]
        return len(marks), sum(int(name.split("-")[1]) for name in marks)

    first = plan.Pass(opened, job.seed, job.check_images, buckets, work)
    with watch("looking at the input", len(units), count):
        return plan.make(first, units, job.flags)


def _check(summary: plan.Summary, job: PrepareJob) -> None:
    """Raises a UserError for an outcome of the first pass that cannot be prepared."""
    if summary.duplicates:
        count, id, one, other = summary.duplicates
        raise UserError(
            f"{count} examples have an id that another has; the first is {id!r}, in {one} and in "
            f"{other}: remove one of them from the input"
        )
    bad = sum(count for count, _ in summary.faults.values()) + summary.lost
    total = bad + summary.examples
    if bad > job.max_bad_fraction * total or not summary.examples:
        parts = [f"{n} {reason} ({lines[0]})" for reason, (n, lines) in summary.faults.items()]
        if summary.lost:
            parts.append(
                f"{summary.lost} that {len(summary.cut)} files lack which cannot be read to their "
                "ends, if they held as many as the others on average"
            )
        raise UserError(
            f"{bad} of {total} examples cannot be used, more than --max-bad-fraction "
            f"{job.max_bad_fraction} allows: {'; '.join(parts) or 'the input is empty'}"
        )


def _shards(
    summary: plan.Summary, job: PrepareJob, opened: Input, output: str, work: str
) -> shard_files.Shards:
    types = field_types(summary.kinds, opened.extra_fields(), job.output_format == "webdataset")
    number = job.shards or -(-summary.examples // (job.examples_per_shard or 1))
    # An empty shard would have no features, which readers need.
    if number > summary.examples:
        raise UserError(f"--shards {number} is more than the {summary.examples} examples")
    return shard_files.Shards(
        output, job.split, job.output_format, number, types, summary.buckets, work, job.verify
    )


def _write(
    shards: shard_files.Shards,
    kept: Mapping[str, dict[str, Any]],
    flags: Sequence[str],
    watch: Watch,
) -> list[dict[str, Any]]:
    """Writes all shards but the `kept`, and returns the records of all."""
    names = [shards.name(index) for index in range(shards.number)]
    missing = [index for index, name in enumerate(names) if name not in kept]

    def count() -> tuple[int, int]:
        done = min(len(shard_files.records(shards.work)) + len(kept), len(names))
        return done, shards.bounds(done)[0]

    with watch("writing shards", len(names), count):
        shard_files.write(shards, missing, flags)
    return [kept.get(name) or shard_files.load_record(shards.work, name) for name in names]


def _check_repaired(
    finished: Manifest | None, records: Sequence[dict[str, Any]], output: str
) -> None:
    """Raises a UserError if shards that were written again are not what they were."""
    before = {shard["file"]: shard["sha256"] for shard in finished["shards"]} if finished else {}
    for record in records:
        if before.get(record["file"], record["sha256"]) != record["sha256"]:
            raise UserError(
                f"{output}/{record['file']} was written again and differs: the images have changed "
                "since; prepare them into a new folder"
            )


def manifest_path(output: str, split: str) -> str:
    """The path of the manifest of a split."""
    return paths.join(output, f"{split}.manifest.json")


def load_manifest(output: str, split: str) -> Manifest | None:
    """The manifest of a split, or None if there is none."""
    path = manifest_path(output, split)
    try:
        manifest = json.loads(paths.read_bytes(path))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is malformed: {error.msg}; remove it") from None
    if manifest.get("version") != VERSION:
        raise UserError(f"{path} has version {manifest.get('version')}, not {VERSION}")
    return manifest


def _check_same(old: dict[str, Any], new: dict[str, Any], folder: str) -> None:
    """Raises UserError, naming the difference, if a folder was begun with another job."""
    found = _difference(old, json.loads(json.dumps(new)), "")
    if found is not None:
        name, before, now = found
        raise UserError(
            f"{folder} holds another job: {name} was {before} and is now {now}; give another "
            f"--output or --split, or remove {new['split']}* there"
        )


def _difference(old: Any, new: Any, name: str) -> tuple[str, str, str] | None:
    if old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        # Settings before files: a changed setting says more than thousands of changed paths.
        for key in sorted({*old, *new}, key=lambda key: (key == "files", key)):
            part = f"{name}.{key}" if name else key
            found = _difference(old.get(key), new.get(key), part)
            if found is not None:
                return found
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return name, f"{len(old)} long", f"{len(new)} long"
        pairs = enumerate(zip(old, new, strict=True))
        index, (before, now) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        return f"{name}[{index}]", json.dumps(before), json.dumps(now)
    return name, json.dumps(old), json.dumps(new)


def faults_of(manifest: Manifest, output: str, read: bool) -> dict[str, str]:
    """Maps file name to fault for the damaged shards of a manifest.

    If `read`, every shard is read and checksums are compared; else sizes are compared.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda s: shard_files.fault_of(s, output, read), manifest["shards"])
        names = [record["file"] for record in manifest["shards"]]
        return {name: fault for name, fault in zip(names, found, strict=True) if fault}


def _write_manifest(
    identity: dict[str, Any],
    output: str,
    fields: shard_files.FieldTypes,
    skipped: dict[str, int],
    records: Sequence[dict[str, Any]],
) -> Manifest:
    """Writes the manifest of finished shards, whole or not at all, and returns it."""
    manifest = {
        "version": VERSION,
        "format": identity["format"],
        "split": identity["split"],
        "examples": sum(record["examples"] for record in records),
        "seed": identity["seed"],
        "fields": fields,
        "source": identity["source"],
        "skipped": skipped,
        "shards": [
            {key: record[key] for key in ("file", "examples", "bytes", "sha256")}
            for record in records
        ],
    }
    content = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    paths.write_bytes(manifest_path(output, identity["split"]), content.encode())
    return manifest
