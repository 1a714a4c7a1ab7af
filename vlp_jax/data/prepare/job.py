"""A preparation from input to manifest; work that an earlier run finished is kept."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlp_jax.data.prepare import manifest as manifests
from vlp_jax.data.prepare import paths, plan
from vlp_jax.data.prepare import shards as shard_files
from vlp_jax.data.prepare.examples import CAPTIONS, ID, field_types
from vlp_jax.data.prepare.inputs import FORMATS, Input
from vlp_jax.data.prepare.manifest import Manifest
from vlp_jax.data.prepare.writers import WRITERS
from vlp_jax.errors import UserError

# Most data sets call the captions "text".
_ALIASES = {"text": CAPTIONS, "caption": CAPTIONS}
_NAME = re.compile(r"[A-Za-z0-9_]+")

# watch(title, total, count) is a context manager around a long operation. count() returns how many
# of `total` parts are done, and how many examples they hold.
Watch = Callable[[str, int, Callable[[], tuple[int, int]]], contextlib.AbstractContextManager]


def no_watch(title: str, total: int, count: Callable[[], tuple[int, int]]) -> Any:
    """Shows nothing."""
    del title, total, count
    return contextlib.nullcontext()


@dataclass(frozen=True)
class PrepareJob:
    """The settings of a preparation.

    Attributes:
      input: patterns of paths; what they mean is the input format's.
      input_format: one of `inputs.FORMATS`.
      output: a folder, made if it is not there.
      output_format: one of `WRITERS`.
      shards, examples_per_shard: exactly one of them; shards hold at most so many examples.
      seed: of the global order.
      fields: output field -> what it is read from; image and captions have defaults.
      split: the name that files and manifest begin with.
      max_bad_fraction: the fraction of skipped examples above which nothing is written.
      check_images: whether all images are decoded, or only their headers read.
      verify: whether finished shards are read and their checksums compared.
      flags: Beam's.
    """

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
        for name, value, known in (
            ("--input-format", self.input_format, FORMATS),
            ("--output-format", self.output_format, WRITERS),
        ):
            if value not in known:
                raise UserError(f"{name} {value} is not one of {', '.join(known)}")
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
    """OUTPUT=INPUT pairs as a dict; `text` and `caption` stand for `captions`.

    Raises:
      UserError: for what is no pair, a name that is taken, or one that occurs twice.
    """
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
    finished = manifests.load(output, job.split)
    if finished is not None:
        manifests.check_same(manifests.identity(finished), identity, output)
        damaged = manifests.faults(finished, output, job.verify)
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
    manifest = manifests.write(identity, output, shards.types, skipped, records)
    paths.remove(work)
    named = {reason: lines for reason, (_, lines) in sorted(summary.faults.items())}
    return Result(manifest, False, named)


def _identity(job: PrepareJob, opened: Input) -> dict[str, Any]:
    sharding = (
        {"shards": job.shards} if job.shards else {"examples_per_shard": job.examples_per_shard}
    )
    source = {"format": job.input_format, **opened.source(), **sharding}
    source["check_images"] = job.check_images
    return {"format": job.output_format, "split": job.split, "seed": job.seed, "source": source}


def _begin(
    output: str, split: str, work: str, identity: dict[str, Any], finished: Manifest | None
) -> None:
    """Checks that the folder is free or holds this job, notes the job, and removes leftovers."""
    path = paths.join(work, "job.json")
    if "job.json" in paths.names_in(work):
        manifests.check_same(json.loads(paths.read_bytes(path)), identity, output)
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
