"""Draws the data of a config as a model would see it, and counts what is in it.

    vlp-jax inspect-data --config configs/clip_folder.py --config.data.path=DIR

Writes contact_sheet.png (images after all operations, and their text as tokens say it), stats.json
and stats.png (lengths of texts, sizes of images, bad records, duplicates). Runs no model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vlp_jax.arguments import load_config, make_parser, parse_with_overrides
from vlp_jax.data.pipeline import EvalPipeline, TrainPipeline, split_mixture
from vlp_jax.data.samples import sample_texts
from vlp_jax.data.scan import Scan, Tokenizers, scan, statistics
from vlp_jax.data.sources.base import as_plain
from vlp_jax.errors import UserError
from vlp_jax.evaluators import merged_data
from vlp_jax.observe.pictures import draw_contact_sheet, draw_statistics
from vlp_jax.training.command import run_command

MAIN = "data"  # the name of config.data among the datasets; the others have theirs
SHEET_BATCH = 16  # examples that are read at a time for the contact sheet
SEED = 0


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """Returns the arguments, and the config with its overrides."""
    parser = make_parser("vlp-jax inspect-data", __doc__, config=True)
    parser.add_argument("--evaluator", metavar="NAME", help="whose data, instead of training's")
    parser.add_argument("--output", type=Path, default=Path("inspected"), metavar="DIR")
    parser.add_argument("--examples", type=int, default=32, metavar="N", help="on the sheet")
    parser.add_argument(
        "--scan", type=int, default=10_000, metavar="N", help="examples of each source to count"
    )
    arguments, overrides = parse_with_overrides(parser, argv, "examples", "scan")
    return arguments, load_config(arguments.config, overrides)


def datasets_of(config: ConfigDict, evaluator: str | None) -> dict[str, Mapping[str, Any]]:
    """Returns name -> data config: of training and of `config.extra_data`, or of an evaluator."""
    if evaluator is None:
        return {MAIN: config.data, **dict(config.extra_data.items())}
    if evaluator not in config.evaluators:
        known = ", ".join(config.evaluators) or "none"
        raise UserError(f"the config has no evaluator {evaluator!r} (it has: {known})")
    return {evaluator: merged_data(config.data, config.evaluators[evaluator])}


def tolerant(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the data config with any number of bad records allowed: they are to be counted."""
    return {**dict(data.items()), "max_bad_fraction": 1.0}


def draw_sheet(
    path: Path,
    data: Mapping[str, Any],
    tokenizers: Tokenizers,
    *,
    training: bool,
    count: int,
    title: str,
) -> str:
    """Writes the contact sheet of a dataset; returns a line for the user."""
    size = min(SHEET_BATCH, count)
    if training:
        pipeline = TrainPipeline(tolerant(data), tokenizers.usual, batch_size=size, seed=SEED)
    else:
        pipeline = EvalPipeline(tolerant(data), tokenizers.usual, batch_size=size)
    if "image" not in pipeline.batch_spec():
        return f"no {path.name}: the operations leave no image"
    examples: list[dict[str, Any]] = []
    for batch in pipeline.batches():
        # Evaluation pads its last batch; training has no mask.
        mask = batch.pop("mask", np.ones(size, bool))
        examples += [
            {name: values[place] for name, values in batch.items()}
            for place in np.flatnonzero(mask)
        ]
        if len(examples) >= count:
            break
    examples = examples[:count]
    images = np.stack([example.pop("image") for example in examples])
    captions = [list(describe(example, tokenizers, pipeline)) for example in examples]
    missing = draw_contact_sheet(
        path,
        images,
        captions,
        title=title,
        subtitle=f"{len(images)} examples after all operations ({images.shape[1]} x "
        f"{images.shape[2]} pixels), with their tokens as text and their other fields",
    )
    boxes = f" ({missing} characters that no installed font has are boxes)" if missing else ""
    return f"wrote {path}{boxes}"


def describe(example: Mapping[str, Any], tokenizers: Tokenizers, pipeline: Any) -> Iterator[str]:
    """Yields the lines under an image: its text, decoded from tokens, then every other field."""
    example = dict(example)
    text = example.pop("text", None)
    if text is None or tokenizers.usual is None:
        yield "" if text is None else f"text: {np.asarray(text).tolist()}"
    else:
        # From the tokens, not the caption: what was cut or unknown is seen to be missing.
        (decoded,) = tokenizers.usual.decode(text[None])
        yield decoded or "(no tokens)"
    for name, value in example.items():
        value = np.asarray(value)
        names = pipeline.class_names(name)
        if value.shape:
            shown = f"{value.dtype} {list(value.shape)}"
        elif names is not None and 0 <= value < len(names):
            shown = f"{names[int(value)]} ({value})"
        else:
            shown = str(value)
        yield f"{name}: {shown}"


def scan_all(
    datasets: Mapping[str, Mapping[str, Any]], tokenizers: Tokenizers, count: int
) -> dict[str, Scan]:
    """Scans every source of every dataset, with its progress on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    found, single = {}, len(datasets) == 1
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        for dataset, data in datasets.items():
            parts, _ = split_mixture(as_plain(data))
            for part, part_data in parts.items():
                name = dataset if len(parts) == 1 else part if single else f"{dataset}/{part}"
                task = progress.add_task(f"scanning {name}", total=None)
                found[name] = scan(
                    tolerant(part_data),
                    tokenizers,
                    count=count,
                    seed=SEED,
                    begin=lambda total, task=task: progress.update(task, total=total),
                    advance=lambda done, task=task: progress.advance(task, done),
                )
    return found


def show(figures: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Prints a table of the figures, a column for each source."""
    table = Table()
    table.add_column("", no_wrap=True)
    for name in figures:
        table.add_column(name)

    def row(label: str, tell: Any) -> None:
        cells = []
        for found in figures.values():
            with contextlib.suppress(KeyError, TypeError):  # of what the source does not have
                cells.append(tell(found))
                continue
            cells.append("-")
        table.add_row(label, *cells)

    def spread(*keys: str, form: str = ",.0f") -> Any:
        def tell(found: Mapping[str, Any]) -> str:
            for key in keys:
                found = found[key]
            low, middle, high = (format(found[q], form) for q in ("p5", "median", "p95"))
            return f"{middle} ({low}-{high})"

        return tell

    row("examples", lambda f: f"{f['examples']:,}")
    row("looked at", lambda f: f"{f['scanned']:,}")
    row("bad", lambda f: f"{sum(f['bad'].values()):,} ({f['bad_share']:.2%})")
    for reason in sorted({reason for found in figures.values() for reason in found["bad"]}):
        row(f"  {reason}", lambda f, reason=reason: f"{f['bad'].get(reason, 0):,}")
    row("tokens", spread("text", "tokens"))
    row("  cut at context", lambda f: f"{f['text']['truncated_share']:.2%}")
    row("characters", spread("text", "characters"))
    row("width", spread("image", "width"))
    row("height", spread("image", "height"))
    row("width/height", spread("image", "aspect_ratio", form=".2f"))
    row("bytes", spread("image", "encoded_bytes"))
    row("formats", lambda f: ", ".join(f"{k} {n:,}" for k, n in f["image"]["formats"].items()))
    row("duplicates", lambda f: f"{f['duplicates']['share']:.2%}")
    console.print(table)
    console.print("median (5%-95%); duplicates are among those looked at", highlight=False)


def inspect(arguments: argparse.Namespace, config: ConfigDict) -> None:
    """Scans, prints, draws and writes."""
    datasets = datasets_of(config, arguments.evaluator)
    # A tokenizer that is trained on the captions reads them once, as training would.
    tokenizers = Tokenizers(config.tokenizer, lambda: sample_texts(tolerant(config.data)))
    output, what = arguments.output, f"{arguments.config} {arguments.evaluator or ''}".strip()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made: {error.strerror}") from None
    # Before the sheet: a mistake in the data then comes with counts beside it.
    found = scan_all(datasets, tokenizers, arguments.scan)
    context = None if tokenizers.usual is None else tokenizers.usual.context_length
    figures = {name: statistics(scanned, context) for name, scanned in found.items()}
    show(figures, Console())
    stats = {"config": arguments.config, "evaluator": arguments.evaluator, "sources": figures}
    (output / "stats.json").write_text(json.dumps(stats, indent=2, ensure_ascii=False) + "\n")
    draw_statistics(
        output / "stats.png",
        {name: {**vars(scanned), "context_length": context} for name, scanned in found.items()},
        title=f"The data of {what}",
        subtitle=f"at most {arguments.scan:,} examples of each source",
    )
    print(f"wrote {output / 'stats.json'}\nwrote {output / 'stats.png'}")
    for name, data in datasets.items():
        suffix = "" if len(datasets) == 1 else f"_{name}"
        line = draw_sheet(
            output / f"contact_sheet{suffix}.png",
            data,
            tokenizers,
            training=arguments.evaluator is None,
            count=arguments.examples,
            title=f"{what}, as a model sees it" + ("" if len(datasets) == 1 else f": {name}"),
        )
        print(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""

    def command() -> None:
        inspect(*parse(sys.argv[1:] if argv is None else argv))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
