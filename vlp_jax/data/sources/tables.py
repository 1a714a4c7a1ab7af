"""Rows of users' CSV, TSV and JSONL files; anything ambiguous is an error."""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.files import text_lines

SUFFIXES = (".csv", ".tsv", ".jsonl")
# What may stand between the columns.
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
IMAGE_FILE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)
_EXCEL_DELIMITER = re.compile(r"sep=(.)[\r\n]*")  # a first line that Excel writes and reads
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')  # as pandas and Excel quote a mark
_LINE_END = re.compile(r"\r\n|\r|\n")
_log = logging.getLogger("vlp_jax.data")

Row = tuple[str, Mapping[str, Any]]


def rows(file: Path) -> Iterator[Row]:
    """The rows of a table, each with its file and line for messages.

    A .tsv knows no quoting: quotation marks in it stand as they are. Cells of a .csv may be quoted
    (RFC 4180). Its columns are separated by commas, or by another of `DELIMITERS` if that alone
    splits the header. Rows that are blank are left out.

    Raises:
      UserError: while iterating, for a file that is not UTF-8, a column or a key that occurs twice,
        and a row that is malformed or has another number of cells than the header.
    """
    yield from _json_rows(file) if file.suffix.lower() == ".jsonl" else _cell_rows(file)


def choose_column(
    row: Mapping[str, Any], name: str | None, usual: tuple[str, ...], key: str, file: Path
) -> str:
    """Chooses the column to read: `name` if given, else the first existing of the `usual` ones."""
    columns = [column for column in row if column]
    if name is not None:
        if name not in columns:
            raise UserError(f"{key}: {unknown_key_message(name, columns, str(file))}")
        return name
    for column in (c for candidate in usual for c in columns if c.lower() == candidate):
        return column
    raise UserError(
        f"{file} has no column named {', '.join(usual)} (its columns: "
        f"{', '.join(map(repr, columns))}{_advice(columns)}); name one by {key}"
    )


def _advice(columns: Sequence[str]) -> str:
    """Advice for a message about columns whose names look like no names; may be ""."""
    if len(columns) == 1 and not columns[0].isalnum():
        return f"; columns are separated by {', '.join(DELIMITERS.values())}"
    if any(IMAGE_FILE.search(column) for column in columns):
        return "; the first row must name the columns, and this looks like an image already"
    inside = [names for sign, names in DELIMITERS.items() if any(sign in c for c in columns)]
    if inside:
        return f"; if {inside[0]} separate the columns, their names must hold no other delimiter"
    return ""


def _cell_rows(file: Path) -> Iterator[Row]:
    usual = delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    lines = text_lines(file)
    skipped = 0
    for header_line in lines:
        named = _EXCEL_DELIMITER.fullmatch(header_line)
        if header_line.strip() and not named:
            break
        skipped += 1
        delimiter = named[1] if named else delimiter
    else:
        return
    if delimiter == usual:
        delimiter = _delimiter(header_line, usual, file)
    quoted = (usual, delimiter) != ("\t", "\t")
    # The library's own limit of 128 KiB would end a file with one long text.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(
        chain([header_line], lines),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        # A space before a quotation mark is common behind commas. Flickr30k's "| " has no quoting.
        skipinitialspace=delimiter in ",;",
        strict=True,
    )
    header: list[str] = []
    told = quoted
    while True:
        first = skipped + reader.line_num + 1
        where = f"{file}, line {first}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{where}: malformed row, up to line {skipped + reader.line_num}: {error}; a cell "
                'in quotation marks ends at the next one: write "" for each that is text'
            ) from None
        if cells is None:
            return
        if not header:
            header = _header(cells, where)
            continue
        if not any(cell.strip() for cell in cells):
            continue
        _check(cells, len(header), where, delimiter, quoted)
        if not told and any('""' in cell and _QUOTED.fullmatch(cell) for cell in cells):
            told = True
            _log.warning(
                '%s holds a cell like "a ""b""", and a .tsv knows no quoting: the marks stay in '
                "the text; if a program quoted it, name the file .csv",
                where,
            )
        yield where, dict(zip(header, cells, strict=True))


def _delimiter(header: str, usual: str, file: Path) -> str:
    """The sign that splits a header: the usual one, or the only other that does."""
    found = [sign for sign in DELIMITERS if len(next(csv.reader([header], delimiter=sign))) > 1]
    if usual in found or not found:
        return usual
    if len(found) > 1:
        names = " or ".join(DELIMITERS[sign] for sign in found)
        raise UserError(
            f"{file}: {DELIMITERS[usual]} do not split the header {header.strip()[:100]!r}; it may "
            f"be separated by {names}: name the columns without such signs"
        )
    _log.info("%s is read as separated by %s", file, DELIMITERS[found[0]])
    return found[0]


def _header(cells: Sequence[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise UserError(f"{where}: the header names {twice[0]!r} twice: rename one of the columns")
    return names


def _check(cells: Sequence[str], columns: int, where: str, delimiter: str, quoted: bool) -> None:
    """Raises UserError for a row whose cells are not certainly the columns of the header."""
    if len(cells) != columns:
        cut = DELIMITERS[delimiter] if len(cells) > columns else "line breaks"
        advice = f"put a text with {cut} into quotation marks"
        if not quoted:
            advice = f"a text in a .tsv must hold no {cut}"
        raise UserError(
            f"{where}: the row has {len(cells)} cells and the header {columns}, separated by "
            f"{DELIMITERS[delimiter]}: {advice}"
        )
    # A stray mark opens a cell that ends at the next stray mark, with whole rows in between.
    for cell in cells:
        if "\n" not in cell and "\r" not in cell:
            continue
        for line in _LINE_END.split(cell)[1:]:
            parts = line.split(delimiter)
            if len(parts) == columns and any(IMAGE_FILE.search(part.strip()) for part in parts):
                raise UserError(
                    f"{where}: the quotation mark that opens here takes in further rows, such as "
                    f'{line[:60]!r}; quote the text, and write "" for a mark that belongs to it'
                )


def _json_rows(file: Path) -> Iterator[Row]:
    for number, line in enumerate(text_lines(file), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except ValueError as error:
            reason = getattr(error, "msg", error)
            raise UserError(f"{where}: malformed JSON: {reason}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: a line must be an object like {{...}}")
        yield where, row


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"the key {twice[0]!r} occurs twice")
    return found
