"""The first pass, on Apache Beam: looks at every example, and writes their global order.

Examples are ordered by a hash of (seed, id): `examples.place`. The order is cut into buckets by its
first digits; a worker sorts each and writes it as lines of JSON. The buckets in turn are the
global order, so that any shard is a run of lines, and exactly as long as the others.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import IO, Any

from vlp_jax.data.prepare import paths
from vlp_jax.data.prepare.examples import (
    Candidate,
    Reference,
    SkippedExample,
    image_fault,
    kinds_of,
    place,
)
from vlp_jax.data.prepare.inputs import Input, Unit
from vlp_jax.data.prepare.paths import INSTALL
from vlp_jax.errors import UserError

NAMED = 5  # faults of each reason that are named
_AT_ONCE = 64  # examples whose images are looked at together
_BUCKET_EXAMPLES, _MAX_BUCKETS = 20_000, 4096
_PLAN = "plan.json"


@dataclass
class Summary:
    """The counts of a part of the first pass; `merge` adds parts up.

    Attributes:
      buckets: bucket -> examples.
      faults: reason -> [count, the first few as lines].
      kinds: further field -> `kinds_of` of its values.
      duplicates: (count, id, where, where) of the ids that several examples have, the first named.
      whole: files that could be read to their ends, and examples in them, bad ones too.
      cut: examples before the end of each other file.
    """

    buckets: dict[str, int] = field(default_factory=dict)
    faults: dict[str, list[Any]] = field(default_factory=dict)
    kinds: dict[str, list[str]] = field(default_factory=dict)
    duplicates: list[Any] = field(default_factory=list)
    whole: list[int] = field(default_factory=lambda: [0, 0])
    cut: list[int] = field(default_factory=list)

    @property
    def examples(self) -> int:
        return sum(self.buckets.values())

    @property
    def lost(self) -> int:
        """Examples that cut files lack, besides a fault each, if they held what whole ones do."""
        usual = round(self.whole[1] / self.whole[0]) if self.whole[0] else 0
        return sum(max(0, usual - read - 1) for read in self.cut)

    def add_fault(self, fault: SkippedExample) -> None:
        count, lines = self.faults.get(fault.reason, [0, []])
        self.faults[fault.reason] = [count + 1, [*lines, f"{fault.where}: {fault.detail}"][:NAMED]]

    def add_kinds(self, candidate: Candidate) -> None:
        for name, value in candidate.reference.fields.items():
            self.kinds[name] = sorted(kinds_of(value).union(self.kinds.get(name, ())))


def merge(summaries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Adds up summaries, as dicts; their order does not matter."""
    total = Summary()
    for part in (Summary(**summary) for summary in summaries):
        total.buckets.update(part.buckets)
        for reason, (count, lines) in part.faults.items():
            before, named = total.faults.get(reason, [0, []])
            total.faults[reason] = [before + count, sorted([*named, *lines])[:NAMED]]
        for name, kinds in part.kinds.items():
            total.kinds[name] = sorted(set(kinds).union(total.kinds.get(name, ())))
        total.whole = [a + b for a, b in zip(total.whole, part.whole, strict=True)]
        total.cut = sorted([*total.cut, *part.cut])
        # The smaller of two is named, so that the message does not depend on the runner.
        both = sorted([d for d in (total.duplicates, part.duplicates) if d], key=lambda d: d[1:])
        total.duplicates = [sum(d[0] for d in both), *both[0][1:]] if both else []
    return vars(total)


@dataclass(frozen=True)
class Pass:
    """The settings that the workers of the first pass get.

    The order is cut into `buckets` parts, which does not change it; `work` is the folder for what
    is needed until the shards are written.
    """

    input: Input
    seed: int
    check_images: bool
    buckets: int
    work: str


def number_of_buckets(estimated_examples: int) -> int:
    """The number of buckets, so large that a worker can hold the lines of one."""
    return min(max(estimated_examples // _BUCKET_EXAMPLES, 1), _MAX_BUCKETS)


def load(work: str) -> Summary | None:
    """The summary of a finished first pass, or None."""
    path = paths.join(work, _PLAN)
    return Summary(**json.loads(paths.read_bytes(path))) if _PLAN in paths.names_in(work) else None


def make(job: Pass, units: Sequence[Unit], flags: Sequence[str]) -> Summary:
    """Runs the first pass; writes the buckets, and a summary last."""

    def build(pipeline: Any) -> None:
        beam = import_beam()
        found = (
            pipeline
            | "Units" >> beam.Create(list(units))
            # Without it Beam would fuse the steps, and one worker would read all units.
            | "Spread" >> beam.Reshuffle()
            | "Look" >> beam.FlatMap(look, job)
        )
        buckets = (
            found
            | "Lines" >> beam.Filter(lambda e: e[0] is not None).with_output_types(tuple[int, str])
            | "ByBucket" >> beam.GroupByKey()
            | "WriteBucket" >> beam.Map(write_bucket, job.work)
        )
        summaries = found | beam.Filter(lambda e: e[0] is None) | "Summaries" >> beam.Values()
        _ = (
            (buckets, summaries)
            | beam.Flatten()
            | beam.CombineGlobally(merge)
            | "WritePlan" >> beam.Map(_write_plan, job.work)
        )

    run(build, flags)
    summary = load(job.work)
    assert summary is not None, f"the pipeline ended without {job.work}/{_PLAN}"
    return summary


def _write_plan(summary: dict[str, Any], work: str) -> None:
    paths.write_bytes(paths.join(work, _PLAN), json.dumps(summary).encode())


def look(unit: Unit, job: Pass) -> Iterator[tuple[int | None, Any]]:
    """Yields the good examples of a unit as (bucket, line), and last (None, summary as a dict)."""
    summary = Summary()
    count = seen = 0
    ended = False
    staging = paths.join(job.work, "staging", f"{unit.number:06d}.images")
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(os.cpu_count()) as pool:
        stream: IO[bytes] | None = None
        scanned = job.input.scan(unit)
        while chunk := list(itertools.islice(scanned, _AT_ONCE)):
            # Headers take microseconds, which threads would only add to.
            faults = (pool.map if job.check_images else map)(
                lambda item: _fault(item, job.check_images), chunk
            )
            for item, fault in zip(chunk, faults, strict=True):
                ended |= fault is not None and fault.ends_file
                seen += fault is None or not fault.ends_file
                if fault is not None:
                    summary.add_fault(fault)
                    continue
                reference = item.reference
                if reference.path is None:
                    # A row of Parquet costs the decoding of its row group: shards of a shuffled
                    # order would each decode nearly the whole input, this way it is decoded once.
                    stream = stream or stack.enter_context(paths.whole_file(staging))
                    reference = replace(reference, path=staging, offset=stream.tell())
                    stream.write(item.image)
                order = place(job.seed, reference.id)
                summary.add_kinds(item)
                count += 1
                # The first 32 bits of the hash choose the bucket, so that buckets are in its order.
                yield int(order[:8], 16) * job.buckets >> 32, f"{order} {reference.dumps()}"
    if ended:
        summary.cut = [seen]
    else:
        summary.whole = [1, seen]
    # An empty file whose name carries the count: progress is known by listing a folder.
    paths.write_bytes(paths.join(job.work, "looked_at", f"{unit.number:06d}-{count}"), b"")
    yield None, vars(summary)


def _fault(item: Candidate | SkippedExample, decode: bool) -> SkippedExample | None:
    if isinstance(item, SkippedExample):
        return item
    found = image_fault(item.image, decode)
    return None if found is None else SkippedExample(found[0], item.where, found[1])


def write_bucket(bucket: tuple[int, Iterable[str]], work: str) -> dict[str, Any]:
    """Sorts and writes the lines of a bucket; returns its summary, with its duplicates."""
    number, lines = bucket[0], sorted(bucket[1])
    summary = Summary(buckets={str(number): len(lines)})
    for one, other in itertools.pairwise(lines):
        # Equal ids have equal hashes and so end up side by side, in one bucket.
        if one[:32] == other[:32]:
            pair = [Reference.loads(line[33:]) for line in (one, other)]
            pair.sort(key=lambda reference: (reference.path, reference.offset))
            wheres = [f"{reference.path} at byte {reference.offset}" for reference in pair]
            count = summary.duplicates[0] if summary.duplicates else 0
            summary.duplicates = [count + 1, *(summary.duplicates[1:] or [pair[0].id, *wheres])]
    content = "".join(f"{line[33:]}\n" for line in lines)
    paths.write_bytes(bucket_path(work, number), content.encode())
    return vars(summary)


def bucket_path(work: str, number: int) -> str:
    """The file of a bucket: references in their global order, one a line."""
    return paths.join(work, "order", f"{number:04d}.jsonl")


def slice_lines(work: str, buckets: dict[str, int], start: int, stop: int) -> list[str]:
    """The lines at [start, stop) of the global order."""
    lines: list[str] = []
    first = 0
    for number in sorted(buckets, key=int):
        count = buckets[number]
        low, high = max(start - first, 0), min(stop - first, count)
        if low < high:
            content = paths.read_bytes(bucket_path(work, int(number))).decode()
            lines += content.split("\n")[low:high]
        first += count
    return lines


_OURS = re.compile(r"vlp_jax\.errors\.UserError: ([^\n]*)")
_WHERE = re.compile(r"\s*\[while running [^\]]*\]")


def import_beam() -> ModuleType:
    """Imports Apache Beam, without the notices of parts that are not used."""
    logging.disable(logging.WARNING)
    try:
        import apache_beam
    except ImportError:
        raise UserError(f"Apache Beam is not installed: {INSTALL}") from None
    finally:
        logging.disable(logging.NOTSET)
    # A failure is raised as well as logged, with the traceback in both.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    return apache_beam


def check_flags(flags: Sequence[str]) -> None:
    """Raises UserError for a flag that is not Beam's, because Beam ignores a misspelt one."""
    import_beam()
    from apache_beam.options.pipeline_options import PipelineOptions

    # Beam has no list of all flags; its classes of options add them to a parser.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for options in PipelineOptions.__subclasses__():
        options._add_argparse_args(parser)
    _, unknown = parser.parse_known_args(list(flags))
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"unknown argument {unknown[0]}{hint} (options that only the runner itself knows go "
            "after --)"
        )


def run(build: Callable[[Any], None], flags: Sequence[str]) -> None:
    """Builds a pipeline by `build(pipeline)`, runs it on the runner of `flags`, waits for its end.

    Without a runner, or with DirectRunner, it runs in this process, in as many threads as there are
    CPUs: Beam's own choice may be one that it has to download. A UserError of a worker is raised as
    such, on any runner.
    """
    beam = import_beam()
    from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    options = PipelineOptions(list(flags))
    runner = options.view_as(StandardOptions).runner
    in_process = runner in (None, "DirectRunner")
    if in_process and not any(flag.startswith("--direct_num_workers") for flag in flags):
        options.view_as(DirectOptions).direct_num_workers = os.cpu_count() or 1
    try:
        pipeline = beam.Pipeline(runner=FnApiRunner() if in_process else runner, options=options)
    except (ValueError, ImportError) as error:
        raise UserError(f"Apache Beam: {' '.join(str(error).split())}") from None
    try:
        build(pipeline)
        pipeline.run().wait_until_finish()
    except Exception as error:
        # In this process Beam keeps the type and adds to the message; elsewhere it is all text.
        found = _OURS.search(str(error))
        if found is None and not isinstance(error, UserError):
            raise
        message = str(error) if found is None else found[1]
        raise UserError(_WHERE.sub("", message).strip()) from None
