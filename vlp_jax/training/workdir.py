"""The workdir of a run: config.json, tokenizer.json, metrics.jsonl, checkpoints/, tensorboard/."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator

import jax
from etils import epath
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax import files
from vlp_jax.data.samples import sample_texts
from vlp_jax.data.tokenizers import Tokenizer, build_tokenizer
from vlp_jax.errors import UserError
from vlp_jax.files import is_remote, write_whole
from vlp_jax.parallel import agreement

CONFIG, TOKENIZER, METRICS = "config.json", "tokenizer.json", "metrics.jsonl"
# Scores of checkpoints evaluated by `vlp_jax.evaluate`, during the run or after it; a line each.
EVALUATIONS = "evaluations.jsonl"
LOCK = "run.lock"
_log = logging.getLogger("vlp_jax.training")


def check_writable(workdir: epath.Path) -> None:
    """Raises UserError if no file can be written in `workdir`, or where it would be made."""
    existing = workdir  # or the nearest folder above it that exists
    while not existing.exists() and existing.parent != existing:
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        files.check_writable(existing)
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be written: {error.strerror or error}; "
            "choose another --workdir"
        ) from error


def open_tokenizer(workdir: epath.Path, config: ConfigDict) -> Tokenizer | None:
    """Opens the tokenizer in `workdir`, or builds (and trains) it from the config and its data."""
    if not config.tokenizer:
        return None
    if (workdir / TOKENIZER).exists():
        return open_kept_tokenizer(workdir, config)
    return build_tokenizer(config.tokenizer, texts=lambda: sample_texts(config.data), path=None)


def open_kept_tokenizer(workdir: epath.Path, config: ConfigDict) -> Tokenizer | None:
    """Opens the tokenizer that the run saved, without its data; None without text."""
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
    """Loads the resolved config of the run; UserError if the file is missing or cannot be read."""
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


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Locks the workdir for this job while the context is open. All its processes must enter it.

    Process 0 holds an flock on a file in the workdir, which the operating system releases when the
    process ends. An object store has no locks, so a workdir there is not locked.

    Raises:
      UserError: another job holds the lock; the message names its host and process.
    """
    held = agreement.on_first(lambda: None if is_remote(workdir) else _take_lock(workdir))
    try:
        yield
    finally:
        if held is not None and jax.process_index() == 0:
            os.close(held)


def _take_lock(workdir: epath.Path) -> int:
    """Takes the lock, and returns the descriptor of the open file that holds it."""
    workdir.mkdir(parents=True, exist_ok=True)
    file = os.open(os.fspath(workdir / LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(file, 1000).decode(errors="replace").strip() or "unknown"
        os.close(file)
        raise UserError(
            f"workdir {workdir} is in use by another run ({_describe(owner)}); stop that one "
            "first, or choose another --workdir"
        ) from None
    except OSError as error:  # some network file systems have no locks
        _log.warning("workdir %s cannot be locked (%s): see to it yourself", workdir, error)
    # Only now: until the lock is held, the file names the run that holds it.
    os.ftruncate(file, 0)
    note = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    os.write(file, json.dumps(note).encode())
    return file


def _describe(owner: str) -> str:
    try:
        note = json.loads(owner)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(note["since"]))
        return f"process {note['pid']} on {note['host']}, since {since}"
    except (ValueError, KeyError, TypeError):
        return owner
