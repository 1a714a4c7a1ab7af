"""Parquet with embedded images as an input, in the layout of Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlp_jax.data.faults import MALFORMED_TEXT, MISSING_FIELD, TRUNCATED, UNREADABLE
from vlp_jax.data.prepare import paths
from vlp_jax.data.prepare.examples import (
    CAPTIONS,
    IMAGE,
    BadExample,
    Candidate,
    Fault,
    clean_captions,
    clean_value,
)
from vlp_jax.data.prepare.inputs import Unit, listed_files, relative_stem
from vlp_jax.data.sources.caption_files import CAPTION_FIELDS
from vlp_jax.errors import UserError

SUFFIX = ".parquet"
IMAGE_COLUMNS = ("image", "jpg")  # of Hugging Face datasets, and of img2dataset
_ROWS = 32  # decoded at once
_USUAL_BYTES = 65_536


@dataclass(frozen=True)
class ParquetInput:
    """Parquet files. An id is the file's path (below the folder of all), "#" and the row.

    Attributes:
      files: (path, size in bytes) of each file, sorted.
      columns: output field -> column; nested ones by dots. The image is bytes, or a struct with
        `bytes`.
    """

    files: tuple[tuple[str, int], ...]
    columns: Mapping[str, str]

    @staticmethod
    def open(patterns: Sequence[str], fields: Mapping[str, str]) -> ParquetInput:
        """The input that patterns match.

        Raises:
          UserError: if one matches nothing, or the first readable file lacks a column.
        """
        files = paths.find_files(patterns, SUFFIX)
        names = _first_schema([path for path, _ in files])
        columns = {
            IMAGE: _column(fields.get(IMAGE), IMAGE_COLUMNS, names, "image"),
            CAPTIONS: _column(fields.get(CAPTIONS), CAPTION_FIELDS, names, "text"),
        }
        for name in [name for name in fields if name not in columns]:
            columns[name] = _column(fields[name], (), names, name)
        return ParquetInput(tuple(files), columns)

    def extra_fields(self) -> list[str]:
        return [name for name in self.columns if name not in (IMAGE, CAPTIONS)]

    def estimated_examples(self) -> int:
        return sum(size for _, size in self.files) // _USUAL_BYTES

    def source(self) -> dict[str, Any]:
        return {"files": listed_files(self.files), "fields": dict(self.columns)}

    def units(self, work: str) -> list[Unit]:
        del work
        return [Unit(number, path) for number, (path, _) in enumerate(self.files)]

    def scan(self, unit: Unit, whole: bool) -> Iterator[Candidate | Fault]:
        del whole  # a row is decoded as a whole
        import pyarrow as pa

        root = paths.common_folder([path for path, _ in self.files])
        stem = relative_stem(unit.path, root, SUFFIX)
        row = 0
        try:
            for record in _records(unit.path, list(self.columns.values())):
                where = f"{unit.path}, row {row}"
                try:
                    if record is None:
                        raise BadExample(MALFORMED_TEXT, "a string in it is not UTF-8")
                    yield self._example(record, f"{stem}#{row}", where)
                except BadExample as bad:
                    yield Fault(bad.reason, where, bad.detail)
                row += 1
        except (pa.ArrowException, OSError) as error:
            detail = str(error).splitlines()[0]
            detail = f"unreadable from row {row} on: {detail}"
            yield Fault(TRUNCATED, unit.path, detail, ends_file=True)

    def _example(self, record: Mapping[str, Any], id: str, where: str) -> Candidate:
        image = _get(record, self.columns[IMAGE])
        if isinstance(image, Mapping):
            image = image.get("bytes")
        if image is None:
            raise BadExample(MISSING_FIELD, f"no bytes in column {self.columns[IMAGE]!r}")
        if not isinstance(image, bytes):
            raise BadExample(UNREADABLE, f"column {self.columns[IMAGE]!r} holds no bytes")
        captions = clean_captions(_get(record, self.columns[CAPTIONS]))
        fields = {
            name: clean_value(name, _get(record, self.columns[name]))
            for name in self.extra_fields()
        }
        return Candidate(id, where, None, 0, len(image), image, captions, fields)


def _records(path: str, columns: Sequence[str]) -> Iterator[Mapping[str, Any] | None]:
    """The rows of a file; None for a row with text that is not UTF-8."""
    import pyarrow.parquet as pq

    fs, inner = paths.filesystem(path)
    with fs.open(inner, "rb") as stream:
        file = pq.ParquetFile(stream)
        present = set(file.schema_arrow.names)
        wanted = {name if name in present else name.split(".")[0] for name in columns}
        for batch in file.iter_batches(_ROWS, columns=sorted(wanted & present), use_threads=False):
            try:
                yield from batch.to_pylist()
            except UnicodeDecodeError:
                for row in range(batch.num_rows):
                    yield _decoded(batch.slice(row, 1))


def _decoded(row: Any) -> Mapping[str, Any] | None:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _get(record: Mapping[str, Any], column: str) -> Any:
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise BadExample(MISSING_FIELD, f"no column {column!r}")
        value = value[part]
    return value


def _first_schema(files: Sequence[str]) -> list[str]:
    """The columns of the first file that can be read."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"pyarrow is not installed: {paths.INSTALL}") from None
    failure = ""
    for path in files:
        fs, inner = paths.filesystem(path)
        try:
            with fs.open(inner, "rb") as stream:
                return pq.read_schema(stream).names
        except (pa.ArrowException, OSError) as error:
            failure = failure or f"{path}: {str(error).splitlines()[0]}"
    raise UserError(f"no readable Parquet file in --input: {failure}")


def _column(name: str | None, usual: Sequence[str], names: Sequence[str], field: str) -> str:
    """The column to read: `name` if given, else the first of the `usual` ones that exists.

    Raises:
      UserError: there is none, or several have its name.
    """
    for candidate in usual if name is None else (name,):
        top = candidate if candidate in names else candidate.split(".")[0]
        if names.count(top) > 1:
            raise UserError(
                f"--fields {field}={candidate}: {names.count(top)} columns are named {top!r}: "
                "rename all but one"
            )
        if top in names:
            return candidate
    if name is not None:
        raise UserError(f"--fields {field}={name}: no such column (there are {_list(names)})")
    raise UserError(
        f"no column named {_list(usual)} (there are {_list(names)}): name one by --fields {field}="
    )


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
