"""Writes a folder atomically: first beside its place, then moved there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vlp_jax.errors import UserError

# Lists the files of an export. It is moved last, so its presence means that the folder is complete.
RECORD = "export.json"


def check_free(directory: Path, overwrite: bool) -> None:
    """Raises UserError if a file is in the way, or without `overwrite` a folder with files."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; name a folder that is to be made")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise UserError(f"{directory} is not empty; choose another folder, or add --overwrite")
    if directory.is_symlink() and not directory.exists():
        raise UserError(f"{directory} is a link to nothing; name a folder that is to be made")


@contextlib.contextmanager
def staged(directory: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a new folder of the same name to write into, which becomes `directory` on exit.

    It is inside a hidden folder beside `directory`; a killed process leaves the hidden folder
    behind. If `directory` has files already, all files of an earlier export are removed. Other
    files stay, unless a new file has their name.

    Raises:
      UserError: see `check_free`, or the folder cannot be made.
    """
    check_free(directory, overwrite)
    # A folder cannot be renamed onto a link. "Beside" must also mean beside the link's target,
    # because a rename works only within a file system.
    directory = Path(os.path.realpath(directory))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{directory.name}.unfinished-"
        beside = Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
    except OSError as error:
        raise UserError(
            f"{directory} cannot be made: {error.strerror or error}; choose another folder"
        ) from error
    try:
        # It has its final name already, because open_clip's config contains the name of the folder.
        folder = beside / directory.name
        folder.mkdir()
        yield folder
        check_free(directory, overwrite)  # again, because an export may take hours
        _publish(folder, directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _publish(folder: Path, directory: Path) -> None:
    """Moves a complete folder to its place, into an existing folder if there is one."""
    if not directory.exists() or not any(directory.iterdir()):
        # A rename replaces an empty folder in one step, so nobody sees half an export.
        os.rename(folder, directory)
        return
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    # The record is the first: once it is gone, the rest no longer counts as a complete export.
    for name in _files_of_export(directory):
        (directory / name).unlink(missing_ok=True)
    # The record comes last, see RECORD.
    for path in sorted(paths, key=lambda path: (path.name == RECORD, path)):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / path, directory / path)


def _files_of_export(directory: Path) -> list[str]:
    """Lists the record of an export in a folder, then the files that it names."""
    try:
        files = json.loads((directory / RECORD).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        return [RECORD]  # unreadable, but it must not stay and mark the folder as complete
    # A record comes from a file: it must not make us delete anything outside of the folder.
    inside = [str(x) for x in files if not Path(str(x)).is_absolute() and ".." not in Path(x).parts]
    return [RECORD, *inside]
