"""The workdir of a run: config.json, tokenizer.json, metrics.jsonl, checkpoints/, tensorboard/."""

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
# Scores of checkpoints evaluated by `vlp_jax.evaluate`, during the run or after it; a line each.
EVALUATIONS = "evaluations.jsonl"


def check_writable(workdir: epath.Path) -> None:
    """Raises UserError if no file can be written in `workdir`, or where it would be made.

    Leaves nothing behind: neither its probe file nor a new folder.
    """
    existing = workdir  # or the nearest folder above it that exists
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
    """Opens the tokenizer saved in `workdir`, or else builds it from the config.

    A tokenizer that has to be trained is trained on captions of the training data. Nothing is
    written. Returns None if `config.tokenizer` is empty: the run has no text.
    """
    if not config.tokenizer:
        return None
    if (workdir / TOKENIZER).exists():
        return open_kept_tokenizer(workdir, config)
    return build_tokenizer(config.tokenizer, texts=lambda: sample_texts(config.data), path=None)


def open_kept_tokenizer(workdir: epath.Path, config: ConfigDict) -> Tokenizer | None:
    """Opens the tokenizer that the run saved in `workdir`, without its data; None without text.

    Raises:
      UserError: its file is missing.
    """
    if not config.tokenizer:
        return None
    saved = workdir / TOKENIZER
    if not saved.exists():
        raise UserError(f"{workdir} holds no {TOKENIZER}, which its run has written")
    # config.tokenizer.file names what the tokenizer was made from, which may be gone by now.
    section = {key: value for key, value in config.tokenizer.items() if key != "file"}
    return build_tokenizer(section, texts=lambda: (), path=saved)


def prepare(workdir: epath.Path, config: ConfigDict, tokenizer: Tokenizer | None) -> None:
    """Writes the resolved config, and the tokenizer if there is one, to `workdir` on process 0."""
    if jax.process_index() == 0:
        write_whole(workdir / CONFIG, config_lib.to_json(config))
        # A run that resumes keeps its file: ids must not change under the embeddings.
        if tokenizer is not None and not (workdir / TOKENIZER).exists():
            tokenizer.save(workdir / TOKENIZER)


def load_config(workdir: epath.Path) -> ConfigDict:
    """Loads the resolved config of the run in `workdir`.

    Raises:
      UserError: the file is missing or cannot be read.
    """
    file = workdir / CONFIG
    if not file.exists():
        raise UserError(f"{workdir} holds no run: there is no {CONFIG} in it")
    try:
        return config_lib.from_json(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise UserError(
            f"{file} is not JSON ({error}): take it away, and training with the same --config "
            "and --workdir writes it anew"
        ) from None


def changes(workdir: epath.Path, config: ConfigDict) -> Iterator[str]:
    """Yields a line for each key whose value differs from the config saved in `workdir`."""
    if not (workdir / CONFIG).exists():
        return
    before = dict(config_lib.flatten(load_config(workdir)))
    # Through JSON and back, since tuples become lists there.
    now = dict(config_lib.flatten(config_lib.from_json(config_lib.to_json(config))))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            yield f"config.{key}: {before.get(key)!r} before, {now.get(key)!r} now"
