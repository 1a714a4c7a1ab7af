"""Datasets in many files: the file, and the place in it, of each example.

An index of a file says where its records are. It is made by a walk through the file when the
dataset is opened, and kept in the cache folder under the file's name, size and time, so that it is
made once. Where the number of a file's records is known from elsewhere (a manifest, img2dataset's
statistics), the walk waits until the file is read.

A file that cannot be read to its end has lost examples of which nothing is known. It is taken to
hold as many as the whole files do on average, so that the share of bad examples tells the loss.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from vlp_jax.data import faults, files
from vlp_jax.data.files import GZIP, HEAD_BYTES, kind_of, remedy
from vlp_jax.data.local_copies import LocalCopies, default_cache_dir, writing
from vlp_jax.data.sources.base import Source
from vlp_jax.data.sources.labels import WordClasses
from vlp_jax.errors import UserError

Index = Mapping[str, np.ndarray]

# Values of an index's column "fault", which is kept in files: numbers must not change.
OK, TRUNCATED, DAMAGED, TWICE, APART, SPARSE = range(6)
# What they mean for a record: a reason, and a detail.
_DETAILS = {
    TRUNCATED: (faults.TRUNCATED, "the file ends within this record"),
    DAMAGED: (faults.UNREADABLE, "its header is damaged, and what follows in the file is lost"),
    TWICE: (
        faults.AMBIGUOUS,
        "a name of its files occurs twice, in upper or lower case: give every sample its own key",
    ),
    APART: (
        faults.AMBIGUOUS,
        "its files do not stand side by side in the tar: pack the folder again by tar --sort=name",
    ),
    SPARSE: (faults.UNREADABLE, "a file of it is sparse: pack the tar without --sparse"),
}
_KINDS = {"tar": "a tar", "parquet": "a Parquet file"}  # sort of an index -> kind of its files
_INDEX_VERSION = "2"
# How far a file can be read; in the names of kept indexes. A tar has a mark at its end that not
# every writer makes: where others have it, a file without is cut.
_WHOLE, _UNMARKED, _CUT = "whole", "unmarked", "cut"
_LOADED_INDEXES = 256
_THREADS = 16
_DOWNLOADS = threading.BoundedSemaphore(4)  # files that are copied ahead of their use at a time
_PARSER = threading.Lock()
_log = logging.getLogger("vlp_jax.data")
GIB = 2**30
_MARKED = np.ones(1, bool)  # of formats without a mark at a file's end


@dataclass(frozen=True)
class Piece:
    """Records `skip` to `skip + count` of a file; a count of None takes all from `skip` on."""

    path: str
    skip: int = 0
    count: int | None = None


class Shards:
    """The records of many files, numbered through; `in_place` if all are read where they lie."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        kind: str,
        make_index: Callable[[str], Index],
        cache_dir: str | None = None,
        cache_gib: float = 64.0,
    ) -> None:
        """Counts the records of all pieces whose count is None.

        Args:
          kind: names the sort of index.
          make_index: the index of a local file; every column is [records], and one is "fault".
          cache_dir: where indexes and copies of remote files are kept; None is the default folder.
        """
        folder = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.copies = LocalCopies(folder / "copies", int(cache_gib * GIB))
        self._kind, self._make_index, self._index_folder = kind, make_index, folder / "index"
        self._begun: set[str] = set()  # paths that are copied ahead of their use
        self._load = lru_cache(_LOADED_INDEXES)(self._load_index)
        self._lost: dict[str, str] = {}  # path -> why nothing of the file can be read
        self.pieces = self._counted(pieces)
        counts = np.array([piece.count for piece in self.pieces], np.int64)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._skips = np.array([piece.skip for piece in self.pieces], np.int64)
        self.in_place = all(self.copies.in_place(piece.path) for piece in self.pieces)
        if not len(self):
            raise UserError(f"data.path: the {len(pieces)} files hold no example")

    def _counted(self, pieces: Sequence[Piece]) -> list[Piece]:
        from tqdm import tqdm

        def counted(piece: Piece) -> tuple[Piece, str]:
            """A piece with its count, and how far its file can be read."""
            if piece.count is not None:
                return piece, _WHOLE
            # Indexing a local file is cheap; a remote file would have to be copied first.
            known = None if files.is_local(piece.path) else _img2dataset_count(piece.path)
            state = _WHOLE
            if known is None:
                known, state = kept.get(self._index_name(piece.path), (None, _WHOLE))
            if known is None:
                index = self._load_index(piece.path)
                known, state = len(index["fault"]), _state(index)
            return Piece(piece.path, piece.skip, known - piece.skip), state

        kept = self._kept_counts()
        unknown = sum(piece.count is None for piece in pieces)
        with ThreadPoolExecutor(_THREADS) as threads:
            done = threads.map(counted, pieces)
            bar = tqdm(
                done, "look through shards", len(pieces), delay=3, leave=False, disable=not unknown
            )
            return self._with_losses(list(bar))

    def _with_losses(self, counted: Sequence[tuple[Piece, str]]) -> list[Piece]:
        """Drops empty pieces, and gives cut pieces the count that they are taken to have had."""
        if counted and all(piece.path in self._lost for piece, _ in counted):
            path, why = counted[0][0].path, self._lost[counted[0][0].path]
            raise UserError(f"data.path: none of {len(counted)} files can be read: {path} is {why}")
        states = {state for _, state in counted}
        # Without the mark of its end a tar is cut, unless no tar of the dataset has one.
        sound = (_WHOLE,) if _WHOLE in states else (_UNMARKED,)
        whole = [piece.count for piece, state in counted if state in sound and piece.count]
        usual = round(sum(whole) / len(whole)) if whole else 0
        pieces = [
            piece if state in sound else Piece(piece.path, piece.skip, max(piece.count, usual))
            for piece, state in counted
        ]
        cut = [piece.path for piece, state in counted if state not in sound]
        if cut:
            _log.warning(
                "%d of %d files cannot be read to their end, the first is %s: what they lack of %d "
                "examples, the average of the others, counts as bad examples",
                *(len(cut), len(counted), cut[0], usual),
            )
        empty = [piece.path for piece in pieces if not piece.count]
        if empty:
            told = "%d of %d files hold no example, the first is %s"
            _log.warning(told, len(empty), len(counted), empty[0])
        return [piece for piece in pieces if piece.count]

    def _kept_counts(self) -> dict[str, tuple[int, str]]:
        """Name of an index -> records, and how far the file can be read."""
        names = self._index_folder.glob("*.npz") if self._index_folder.is_dir() else ()
        parts = (file.name.split(".") for file in names)
        return {
            name[0]: (int(name[1]), name[2])
            for name in parts
            if len(name) == 4 and name[1].isdigit()
        }

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The piece, and the record in its file, of each of `indices`; all int64 [n]."""
        indices = np.asarray(indices, np.int64)
        pieces = np.searchsorted(self._ends, indices, side="right")
        return pieces, indices - self._starts[pieces] + self._skips[pieces]

    def block_sizes(self, size: int) -> np.ndarray:
        """Examples of consecutive blocks that do not cross files, int64 [blocks].

        Blocks hold `size` records. A file that is copied before it is read is one block.
        """
        sizes = []
        for piece in self.pieces:
            whole = size if self.copies.in_place(piece.path) else piece.count
            full, rest = divmod(piece.count, whole)
            sizes.append(np.full(full, whole, np.int64))
            sizes += [np.array([rest], np.int64)] if rest else []
        return np.concatenate(sizes)

    def fingerprint(self) -> str:
        """A hash that changes with the names of the files and the numbers of their records."""
        rows = [(Path(p.path).name, p.skip, p.count) for p in self.pieces]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def index(self, piece: int) -> Index:
        return self._load(self.pieces[piece].path)

    def fault(self, piece: int, record: int) -> bytes:
        """Why a record cannot be used, as a source says it; empty if nothing is wrong with it."""
        path, index = self.pieces[piece].path, self.index(piece)["fault"]
        # More records than an index has: what a cut file is taken to have held.
        fault = int(index[record]) if record < len(index) else TRUNCATED
        if fault == OK:
            return b""
        if path in self._lost:
            detail = f"nothing of it can be read: it is {self._lost[path]}"
            return faults.marked(faults.TRUNCATED, detail)
        if record >= len(index):
            detail = f"the file ends after {len(index)} records, and others hold more"
            return faults.marked(faults.TRUNCATED, detail)
        return faults.marked(*_DETAILS[fault])

    def is_whole(self, piece: int) -> bool:
        """Whether the file of a piece can be read to its end, and has the mark of it."""
        return _state(self.index(piece)) == _WHOLE

    def near(self, most: int) -> list[int]:
        """Up to `most` pieces, evenly spread, that can be read without a copy; else the first."""
        pieces = [n for n, piece in enumerate(self.pieces) if self.copies.in_place(piece.path)]
        return pieces[:: -(-len(pieces) // most) or 1] or [0]

    def local(self, piece: int) -> str:
        """A local, uncompressed file with the content of a piece's file."""
        return self.copies.get(self.pieces[piece].path)

    def describe(self, index: int) -> str:
        piece, record = self.locate(np.array([index]))
        return f"record {record[0]} of {self.pieces[piece[0]].path}"

    def will_read(self, indices: np.ndarray) -> None:
        """Begins to copy the files of examples that are read soon; returns at once."""
        if self.in_place:
            return
        for piece in np.unique(self.locate(indices)[0]).tolist():
            path = self.pieces[piece].path
            if path not in self._begun:
                self._begun.add(path)
                threading.Thread(target=self._copy, args=[path], daemon=True).start()

    def _copy(self, path: str) -> None:
        # A failure is not lost: whoever reads the file tries again, and raises.
        with _DOWNLOADS, contextlib.suppress(UserError):
            self.copies.get(path)
        self._begun.discard(path)

    def read(self, piece: int, offset: int, length: int) -> bytes:
        """`length` bytes of the file of a piece, uncompressed; fewer where it ends."""
        return self.copies.read(self.pieces[piece].path, offset, length)

    def _load_index(self, path: str) -> Index:
        """Loads the index of a file from the cache, or makes and caches it."""
        # The name ends in ".COUNT.STATE.npz", so that opening a dataset of thousands of files takes
        # one listing of the folder and reads no index.
        name = self._index_name(path)
        for kept in self._index_folder.glob(f"{name}.*.npz"):
            try:
                # NumPy takes Python's parser to a header, which in 3.11 fails in many threads.
                with _PARSER, np.load(kept) as arrays:
                    return {column: arrays[column] for column in arrays.files}
            except (OSError, EOFError, ValueError, zipfile.BadZipFile):
                kept.unlink(missing_ok=True)  # cut off by a power failure, or not ours
        index = files.retrying(path, lambda: self._make_index(self.copies.get(path)))
        if self.copies.is_cut(path):
            index = {**index, "archive_is_cut": _MARKED}  # the cut may lie between two records
        count, state = len(index["fault"]), _state(index)
        if state == _CUT and (not count or count == 1 and index["fault"][0] != OK):
            self._note_lost(path)
            return index
        # Written under another name first: another process may read the index at any moment.
        with writing(self._index_folder):
            self._index_folder.mkdir(parents=True, exist_ok=True)
            unfinished = self._index_folder / f"{name}.{uuid.uuid4().hex}"
            with open(unfinished, "wb") as stream:
                np.savez(stream, **index)
            unfinished.replace(self._index_folder / f"{name}.{count}.{state}.npz")
        return index

    def _note_lost(self, path: str) -> None:
        """Records that nothing of a file can be read, and its kind; raises if it is compressed."""
        # The file itself, not what came of it when it was uncompressed.
        kind = kind_of(files.read(path, HEAD_BYTES)) or f"no {self._kind} file, or a damaged one"
        command = remedy(kind, path)
        if command and kind != GZIP:
            raise UserError(f"{path} is {kind}, which is not read: make a file of it by {command}")
        if kind in (GZIP, _KINDS.get(self._kind)):
            kind = f"{kind}, but cut short or damaged"
        if path not in self._lost:
            _log.warning("%s: nothing of it can be read: it is %s", path, kind)
        self._lost[path] = kind

    def _index_name(self, path: str) -> str:
        stamp = files.retrying(path, lambda: files.stamp_of(path))
        key = f"{_INDEX_VERSION}:{self._kind}:{path}:{stamp}"
        return hashlib.sha256(key.encode()).hexdigest()[:32]


def _state(index: Index) -> str:
    """How far a file can be read: `_WHOLE`, `_UNMARKED` or `_CUT`."""
    fault = index["fault"]
    # Only a fault of the last record ends a file; others concern their records alone.
    if "archive_is_cut" in index or len(fault) and fault[-1] in (TRUNCATED, DAMAGED):
        return _CUT
    return _WHOLE if index.get("end_mark", _MARKED).all() else _UNMARKED


class ShardedSource(Source):
    """A source whose examples are the records of `shards`."""

    shards: Shards

    def __len__(self) -> int:
        return len(self.shards)

    def describe(self, index: int) -> str:
        return self.shards.describe(index)

    def fingerprint(self) -> str:
        return self.shards.fingerprint()

    def will_read(self, indices: np.ndarray) -> None:
        self.shards.will_read(indices)


def group_by_piece(pieces: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(piece, places of it in `pieces`) for each piece that occurs."""
    return [(int(piece), np.flatnonzero(pieces == piece)) for piece in np.unique(pieces)]


def _img2dataset_count(path: str) -> int | None:
    """The number of samples that img2dataset noted beside a shard, or None."""
    stats = f"{os.path.splitext(path)[0]}_stats.json"
    if not files.filesystem(stats).exists(stats):
        return None
    return int(json.loads(files.read(stats))["successes"])


SUFFIX = ".json"


@dataclass(frozen=True)
class Manifest:
    """The files of prepared data, in the format "array_record", "tfrecord" or "webdataset".

    Attributes:
      features: name -> "bytes", "int64" or "float32", with "[]" behind it for a list.
      class_names: field -> names of its classes, if its labels are words.
    """

    format: str
    pieces: tuple[Piece, ...]
    features: Mapping[str, str]
    class_names: Mapping[str, WordClasses]


def find_pieces(
    path: str | Sequence[str], suffix: str | tuple[str, ...], kind: str
) -> tuple[list[Piece], Manifest | None]:
    """Finds the files that a config's `path` names, with their counts if a manifest says them.

    `path` is as `files.expand` takes it with `suffix`, or a manifest of files of the format `kind`.
    """
    if isinstance(path, str) and path.endswith(SUFFIX):
        manifest = read_manifest(path)
        if manifest.format != kind:
            raise UserError(
                f"data.path={path!r} is the manifest of {manifest.format} files: set data.source "
                f"to {manifest.format!r}"
            )
        return list(manifest.pieces), manifest
    return [Piece(file) for file in files.expand(path, suffix)], None


def read_manifest(path: str) -> Manifest:
    """Reads a manifest; raises UserError if it is not there, or none."""

    try:
        content = json.loads(files.read(path))
        folder = path.rpartition("/")[0]
        pieces = [
            Piece(f"{folder}/{shard['file']}" if folder else shard["file"], 0, shard["examples"])
            for shard in content["shards"]
        ]
        features = {
            name: field["dtype"] + ("[]" if field["list"] else "")
            for name, field in content["fields"].items()
        }
        named = content.get("source", {}).get("class_names", {})
        classes = {name: WordClasses(names) for name, names in named.items()}
        return Manifest(content["format"], tuple(pieces), features, classes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a manifest of prepared data: {error!r}") from None
