"""Trains a tokenizer on captions, and measures how long their tokens are.

    vlp-jax train-tokenizer --config configs/clip_folder.py --config.data.path=DIR \\
        --kind sentencepiece-unigram --vocab-size 32000 --output captions.model
    vlp-jax train-tokenizer --texts captions.txt more.jsonl --field text \\
        --kind bpe --vocab-size 16384 --output tokenizer.json

With --config the captions come from its training data after its operations on text (chosen,
cleaned, lower-cased), in random order, as training will meet them; no image is decoded. With
--texts they are taken as they are. The same captions in any order give the same file.

kinds:
  bpe                    byte pairs of bytes, which nothing is unknown to; a tokenizer.json with
                         pad 0, eos 1, bos 2, for config.tokenizer.name "subword"
  sentencepiece-unigram  a SentencePiece model as T5 and SigLIP have one, with pad 0, eos 1, unk 2
  sentencepiece-bpe      and no bos, for config.tokenizer.name "sentencepiece"
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlp_jax.arguments import load_config, make_parser, parse_with_overrides
from vlp_jax.data.samples import sample_texts
from vlp_jax.data.sources.tables import rows
from vlp_jax.data.tokenizers import SentencePieceTokenizer, Tokenizer, train_subword
from vlp_jax.data.tokenizers import train_sentencepiece as train_sentencepiece_model
from vlp_jax.data.tokenizers.base import frame_length
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.files import text_lines, write_whole
from vlp_jax.training.command import run_command

KINDS = {"bpe": None, "sentencepiece-unigram": "unigram", "sentencepiece-bpe": "bpe"}
CONTEXT_LENGTH = 64
MEASURED = 100_000  # texts that the report is made of, evenly spread over all
NOTICE_SECONDS = 5.0


class Statistics(NamedTuple):
    """Lengths of texts in tokens, and shares of unknown tokens and cut texts."""

    texts: int  # how many
    mean: float  # tokens of a text, with bos and eos
    p95: float  # their 95th percentile
    truncated: float  # share of the texts that are longer than the context length
    unknown: float  # share of the tokens that stand for text outside of the vocabulary
    bytes_per_token: float  # of UTF-8, without bos and eos


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments, and the overrides of the config."""
    parser = make_parser("vlp-jax train-tokenizer", __doc__, config=False)
    add = parser.add_argument
    add("--texts", nargs="+", metavar="FILE", help=".txt (a text a line), .jsonl (an object a "
        "line), .csv or .tsv (with a header)")  # fmt: skip
    add("--field", default="caption", help="of .jsonl, .csv and .tsv (default: caption)")
    add("--kind", choices=list(KINDS), required=True, help="see above")
    add("--vocab-size", type=int, required=True, metavar="N", help="tokens, at most")
    add("--output", required=True, metavar="FILE", help="what is written")
    add("--overwrite", action="store_true", help="replace an existing file")
    add("--limit", type=int, default=200_000, metavar="N", help="captions, at most (200000)")
    add("--context-length", type=int, metavar="N", help="for the report (default: the config's, "
        f"else {CONTEXT_LENGTH})")  # fmt: skip
    arguments, overrides = parse_with_overrides(parser, argv, "limit")
    if (arguments.config is None) == (arguments.texts is None):
        raise UserError("give either --config, for the captions of its data, or --texts")
    if overrides and arguments.config is None:
        raise UserError(f"--config.{overrides[0]} is given without --config")
    return arguments, overrides


def texts_of_files(paths: Sequence[str], field: str) -> Iterator[str]:
    """Yields the texts in files, none of them empty."""
    readers = {".txt": _lines, **dict.fromkeys((".jsonl", ".csv", ".tsv"), _rows)}
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"--texts {path} does not exist")
        if path.suffix not in readers:
            raise UserError(f"--texts {path} is none of {', '.join(readers)}")
        yield from (text for text in readers[path.suffix](path, field) if text.strip())


def _lines(path: Path, field: str) -> Iterator[str]:
    del field
    yield from (line.rstrip("\r\n") for line in text_lines(path))


def _rows(path: Path, field: str) -> Iterator[str]:
    """Yields the text or the texts in the field of each row."""
    for where, row in rows(path):
        if field not in row:
            raise UserError(f"--field: {unknown_key_message(field, map(str, row), where)}")
        for value in row[field] if isinstance(row[field], list) else [row[field]]:
            if not isinstance(value, str):
                raise UserError(f"{where}: {field!r} is {value!r}, not a text")
            yield value


def collect(texts: Iterator[str], limit: int) -> list[str]:
    """Returns the first `limit` texts; tells now and then how many there are."""
    found: list[str] = []
    started = noticed = time.monotonic()
    for text in texts:
        found.append(text)
        if len(found) == limit:
            break
        if time.monotonic() - noticed > NOTICE_SECONDS:
            noticed = time.monotonic()
            _say(f"read {len(found):,} texts ...")
    if not found:
        raise UserError("there is no text to train a tokenizer on")
    size = sum(len(text.encode("utf-8", "replace")) for text in found)
    _say(f"read {len(found):,} texts, {size:,} bytes, in {time.monotonic() - started:.1f} s")
    return found


def make(kind: str, texts: Sequence[str], vocab_size: int, context_length: int) -> Tokenizer:
    """Trains a tokenizer of one of `KINDS` on the texts."""
    started = time.monotonic()
    _say(f"training {kind}, up to {vocab_size:,} tokens ...")
    if KINDS[kind] is None:
        tokenizer = train_subword(texts, vocab_size, context_length)
    else:
        tokenizer = train_sentencepiece_model(texts, vocab_size, context_length, KINDS[kind])
    _say(f"trained {tokenizer.vocab_size:,} tokens in {time.monotonic() - started:.1f} s")
    return tokenizer


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> Statistics:
    """Measures the tokens of the texts, or of `MEASURED` of them."""
    # Every n-th of all: files are often sorted, and the first would not do for the rest.
    texts = texts[:: -(-len(texts) // MEASURED)]
    rows = tokenizer.encode(texts)
    ids = np.concatenate([np.asarray(row, np.int64) for row in rows])
    # `encode` gives the bare ids; bos and eos take places of the context too.
    lengths = np.array([len(row) for row in rows]) + frame_length(tokenizer)
    unknown = getattr(tokenizer, "unk_id", None)
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return Statistics(
        texts=len(texts),
        mean=float(lengths.mean()),
        p95=float(np.percentile(lengths, 95, method="inverted_cdf")),
        truncated=float((lengths > tokenizer.context_length).mean()),
        unknown=0.0 if unknown is None else float((ids == unknown).mean()),
        bytes_per_token=size / max(len(ids), 1),
    )


def report(tokenizer: Tokenizer, output: Path, statistics: Statistics) -> str:
    """Returns the statistics, and the lines of a config that use the file."""
    name = "sentencepiece" if isinstance(tokenizer, SentencePieceTokenizer) else "subword"
    section = {
        "name": name,
        "file": str(output.absolute()),
        "vocab_size": tokenizer.vocab_size,
        "context_length": tokenizer.context_length,
    }
    lines = [f'        "{key}": {json.dumps(value)},' for key, value in section.items()]
    bos = "none" if tokenizer.bos_id is None else tokenizer.bos_id
    return "\n".join(
        [
            f"wrote {output}: {tokenizer.vocab_size:,} tokens, pad {tokenizer.pad_id}, "
            f"eos {tokenizer.eos_id}, bos {bos}",
            f"of {statistics.texts:,} of the captions:",
            f"  tokens per caption    {statistics.mean:.1f} (95 % have at most "
            f"{statistics.p95:.0f}), bos and eos included",
            f"  cut at {tokenizer.context_length:<14} {100 * statistics.truncated:.2f} %",
            f"  unknown tokens        {100 * statistics.unknown:.3f} %",
            f"  bytes per token       {statistics.bytes_per_token:.2f}",
            "use it by these lines of a config:",
            "    config.tokenizer = ConfigDict({",
            *lines,
            "    })",
        ]
    )


def train(arguments: argparse.Namespace, overrides: Sequence[str]) -> str:
    """Writes what the command asks for; returns the report."""
    output = Path(arguments.output).expanduser()
    # Reading the captions takes minutes: a taken name is told before.
    _check_output(output, arguments.overwrite)
    context_length = arguments.context_length
    if arguments.config is None:
        texts = texts_of_files(arguments.texts, arguments.field)
    else:
        config = load_config(arguments.config, overrides)
        texts = sample_texts(config.data, limit=arguments.limit)
        context_length = context_length or config.tokenizer.get("context_length")
    captions = collect(texts, arguments.limit)
    tokenizer = make(
        arguments.kind, captions, arguments.vocab_size, context_length or CONTEXT_LENGTH
    )
    # As a .model file other tools read it; the BPE is a tokenizer.json already.
    if isinstance(tokenizer, SentencePieceTokenizer):
        write_whole(output, tokenizer.model_file)
    else:
        tokenizer.save(output)
    return report(tokenizer, output, measure(tokenizer, captions))


def _check_output(output: Path, overwrite: bool) -> None:
    """Raises UserError, before any work is done, if the file cannot or must not be written."""
    if output.exists() and (output.is_dir() or not overwrite):
        raise UserError(f"--output {output} exists; choose another file, or give --overwrite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from None
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output}: no file can be written in {output.parent}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""

    def command() -> None:
        arguments, overrides = parse(sys.argv[1:] if argv is None else argv)
        print(train(arguments, overrides))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
