"""The folder of a run: config.json, tokenizer.json, metrics.jsonl, checkpoints/, tensorboard/."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import jax
from etils import epath
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax.data.samples import sample_texts
from vlp_jax.data.tokenizers import Tokenizer, build_tokenizer
from vlp_jax.errors import UserError
from vlp_jax.files import write_whole

CONFIG, TOKENIZER, METRICS = "config.json", "tokenizer.json", "metrics.jsonl"
# Scores of checkpoints that were evaluated beside the run or after it, a line each.
EVALUATIONS = "evaluations.jsonl"


def check_writable(workdir: epath.Path) -> None:
    """Raises UserError if no file can be written in `workdir`, or where it would be made.

    Leaves nothing behind: neither the file it tries with nor folders that were not there.
    """
    existing = workdir
    while not existing.exists() and existing.parent != existing:
        existing = existing.parent
    probe = existing / f".write_test_{uuid.uuid4().hex}"
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be written: {error.strerror or error}; "
            "choose another --workdir"
        ) from error


def open_tokenizer(workdir: epath.Path, config: ConfigDict) -> Tokenizer | None:
    """The tokenizer of the run: the one kept in `workdir`, else as the config says.

    One that is trained is trained on the captions of the training data. Nothing is written. None if
    `config.tokenizer` is empty: the run has no text.
    """
    if not config.tokenizer:
        return None
    if (workdir / TOKENIZER).exists():
        return open_kept_tokenizer(workdir, config)
    return build_tokenizer(config.tokenizer, texts=lambda: sample_texts(config.data), path=None)


def open_kept_tokenizer(workdir: epath.Path, config: ConfigDict) -> Tokenizer | None:
    """The tokenizer of a run that has begun, for which no data is needed; None if it has no text.

    Raises:
      UserError: it is not there any more.
    """
    if not config.tokenizer:
        return None
    kept = workdir / TOKENIZER
    if not kept.exists():
        raise UserError(f"{workdir} holds no {TOKENIZER}, which its run has written")
    section = {key: value for key, value in config.tokenizer.items() if key != "file"}
    return build_tokenizer(section, texts=lambda: (), path=kept)


def prepare(workdir: epath.Path, config: ConfigDict, tokenizer: Tokenizer | None) -> None:
    """Makes the folder and writes the resolved config and the tokenizer, if any (on process 0)."""
    if jax.process_index() == 0:
        write_whole(workdir / CONFIG, config_lib.to_json(config))
        if tokenizer is not None and not (workdir / TOKENIZER).exists():
            tokenizer.save(workdir / TOKENIZER)


def load_config(workdir: epath.Path) -> ConfigDict:
    """The resolved config of the run in `workdir`.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    file = workdir / CONFIG
    if not file.exists():
        raise UserError(f"{workdir} holds no run: there is no {CONFIG} in it")
    try:
        return config_lib.from_json(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # also what is not UTF-8
        raise UserError(
            f"{file} is not JSON ({error}): take it away, and training with the same --config "
            "and --workdir writes it anew"
        ) from None


def changes(workdir: epath.Path, config: ConfigDict) -> Iterator[str]:
    """A line for each key whose value is not that of the config the workdir was started with."""
    if not (workdir / CONFIG).exists():
        return
    before = dict(config_lib.flatten(load_config(workdir)))
    now = dict(config_lib.flatten(config_lib.from_json(config_lib.to_json(config))))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            yield f"config.{key}: {before.get(key)!r} before, {now.get(key)!r} now"
