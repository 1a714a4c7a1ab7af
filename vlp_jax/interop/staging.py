"""A folder that is there whole or not at all: written beside its place, and then moved there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vlp_jax.errors import UserError

# What says that a folder is whole, and which files are of it; the last that is put in its place.
RECORD = "export.json"


def check_free(directory: Path, overwrite: bool) -> None:
    """
    Raises:
      UserError: a file is in the way, or a folder with files that may not be overwritten.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; name a folder that is to be made")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise UserError(f"{directory} is not empty; choose another folder, or add --overwrite")
    if directory.is_symlink() and not directory.exists():
        raise UserError(f"{directory} is a link to nothing; name a folder that is to be made")


@contextlib.contextmanager
def staged(directory: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder of the same name to write into, which becomes `directory` at the end.

    It stands in a hidden folder beside `directory`, which a process that is killed leaves behind.
    If `directory` has files already, those of an earlier export are replaced as a whole, and others
    stay unless they have the name of a new one.

    Args:
      overwrite: see `check_free`.

    Raises:
      UserError: see `check_free`, or the folder cannot be made.
    """
    check_free(directory, overwrite)
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
        folder = beside / directory.name
        folder.mkdir()
        yield folder
        check_free(directory, overwrite)  # hours may have passed
        _publish(folder, directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _publish(folder: Path, directory: Path) -> None:
    """Moves a whole folder to its place, where there may be one already."""
    if not directory.exists() or not any(directory.iterdir()):
        os.rename(folder, directory)
        return
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    for name in _files_of_export(directory):
        (directory / name).unlink(missing_ok=True)
    for path in sorted(paths, key=lambda path: (path.name == RECORD, path)):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / path, directory / path)


def _files_of_export(directory: Path) -> list[str]:
    """The record of an export that is in a folder, first, and the files that it names."""
    try:
        files = json.loads((directory / RECORD).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        return [RECORD]  # what says nothing does not stay to say that the folder is whole
    inside = [str(x) for x in files if not Path(str(x)).is_absolute() and ".." not in Path(x).parts]
    return [RECORD, *inside]
