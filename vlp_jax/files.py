"""Files of a run, on a disk or in an object store: written whole or not at all."""

from __future__ import annotations

import os
import uuid

from etils import epath


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` is an object store's (gs://, s3://, ...), where files cannot be appended."""
    return "://" in os.fspath(path)


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file so that readers, and a crash, see the old content or the new, never a part.

    Its folder is made. What could not be put in place leaves no other file behind.

    Raises:
      OSError: it cannot be written; of an object store, also others.
    """
    path = epath.Path(path)
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(content)  # an object appears when it is whole
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
