"""WebDataset tars as an input: KEY.jpg, KEY.txt, KEY.json of one example side by side."""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from vlp_jax.data.faults import AMBIGUOUS, MALFORMED_TEXT, MISSING_FIELD, TRUNCATED, UNREADABLE
from vlp_jax.data.prepare import paths
from vlp_jax.data.prepare.examples import (
    CAPTIONS,
    IMAGE,
    BadExample,
    Candidate,
    Fault,
    Value,
    clean_captions,
    clean_value,
    decode_text,
)
from vlp_jax.data.prepare.images import HEAD_BYTES
from vlp_jax.data.prepare.inputs import Unit, listed_files, relative_stem
from vlp_jax.data.signatures import HEAD_BYTES as SIGNATURE_BYTES
from vlp_jax.data.signatures import kind_of, remedy
from vlp_jax.errors import UserError

SUFFIX = ".tar"
DEFAULTS = {IMAGE: "jpg,jpeg,png,webp,gif,bmp", CAPTIONS: "txt"}
# webdataset's own reading of endings: https://github.com/webdataset/webdataset, autodecode.py.
_NUMBERS = ("cls", "cls2", "class", "count", "index", "inx")
_TEXTS = ("txt", "text", "transcript", "json")
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_USUAL_BYTES = 65_536  # of an example, for the estimate
_BLOCK = 512
_APART = "its files do not stand side by side in the tar: pack it again by tar --sort=name"
_SHOWN = 200  # examples of the first tar in which an ending that was named must occur


@dataclass(frozen=True)
class TarInput:
    """Uncompressed tars. An id is the tar's path (below the folder of all) / the key.

    Attributes:
      files: (path, size in bytes) of each tar, sorted.
      members: output field -> endings, the first that an example has; "json.NAME" is a value in
        its JSON file, nested ones by further dots.
    """

    files: tuple[tuple[str, int], ...]
    members: Mapping[str, str]

    @staticmethod
    def open(patterns: Sequence[str], fields: Mapping[str, str]) -> TarInput:
        """The input that patterns match.

        Raises:
          UserError: if one matches nothing, or the first tar has no file with a named ending.
        """
        files = paths.find_files(patterns, SUFFIX)
        found = TarInput(tuple(files), {**DEFAULTS, **fields})
        found._check_endings(files[0][0], fields)
        return found

    def _check_endings(self, path: str, fields: Mapping[str, str]) -> None:
        fs, inner = paths.filesystem(path)
        seen: set[str] = set()
        with fs.open(inner, "rb") as stream:
            kind = kind_of(stream.read(SIGNATURE_BYTES))
            if command := remedy(kind, path):
                raise UserError(f"{path} is {kind}: run {command} first")
            stream.seek(0)
            for members in itertools.islice(_groups(stream, []), _SHOWN):
                seen.update(ending for ending in members if not ending.startswith("/"))
        for name, wanted in fields.items():
            endings = [ending.split(".")[0] for ending in wanted.split(",")]
            if seen and not seen.intersection(endings + wanted.split(",")):
                raise UserError(
                    f"--fields {name}={wanted}: {path} has no such file "
                    f"(its endings: {', '.join(sorted(seen))})"
                )

    def extra_fields(self) -> list[str]:
        return [name for name in self.members if name not in DEFAULTS]

    def estimated_examples(self) -> int:
        return sum(size for _, size in self.files) // _USUAL_BYTES

    def source(self) -> dict[str, Any]:
        return {"files": listed_files(self.files), "fields": dict(self.members)}

    def units(self, work: str) -> list[Unit]:
        del work
        return [Unit(number, path) for number, (path, _) in enumerate(self.files)]

    def scan(self, unit: Unit, whole: bool) -> Iterator[Candidate | Fault]:
        root = paths.common_folder([path for path, _ in self.files])
        stem = relative_stem(unit.path, root, SUFFIX)
        fs, inner = paths.filesystem(unit.path)
        faults: list[Fault] = []
        halves: set[str] = set()  # keys of samples that lack a file
        with fs.open(inner, "rb") as stream:
            for members in _groups(stream, faults):
                where = f"{unit.path}, {members['/key']}"
                # Two samples with one key are two bad examples.
                for _ in range(members["/most"] - 1):
                    yield Fault(AMBIGUOUS, where, "a name of its files occurs twice")
                try:
                    found = self._example(stream, members, whole)
                except BadExample as bad:
                    if bad.reason == MISSING_FIELD and members["/key"] in halves:
                        bad = BadExample(AMBIGUOUS, _APART)
                    elif bad.reason == MISSING_FIELD:
                        halves.add(members["/key"])
                    yield Fault(bad.reason, where, bad.detail, bad.reason == TRUNCATED)
                    continue
                offset, size, data, captions, fields = found
                id = f"{stem}/{members['/key']}"
                yield Candidate(id, where, unit.path, offset, size, data, captions, fields)
        for fault in faults:
            yield Fault(fault.reason, unit.path, fault.detail, ends_file=True)

    def _example(self, stream: BinaryIO, members: Mapping[str, Any], whole: bool) -> tuple:
        """(offset, size, first bytes) of the image, captions and further fields."""
        if "/cut" in members:
            raise BadExample(TRUNCATED, "the tar ends within it")
        if members["/most"] > 1:
            raise BadExample(AMBIGUOUS, "a name of its files occurs twice")
        images = [e for e in self.members[IMAGE].split(",") if e in members]
        if len(images) > 1 and self.members[IMAGE] == DEFAULTS[IMAGE]:
            listed = ", ".join(images)
            raise BadExample(
                AMBIGUOUS, f"images of several endings ({listed}): name one by --fields"
            )
        _, (offset, size) = _first(members, self.members[IMAGE], IMAGE)
        captions = clean_captions(_value(stream, members, self.members[CAPTIONS], CAPTIONS))
        fields: dict[str, Value] = {}
        for name in self.extra_fields():
            fields[name] = clean_value(name, _value(stream, members, self.members[name], name))
        data = _read(stream, (offset, size if whole else min(size, HEAD_BYTES)))
        return offset, size, data, captions, fields


def _groups(stream: BinaryIO, faults: list[Fault]) -> Iterator[dict[str, Any]]:
    """Neighbours with one key as {ending: (offset, size), "/key": key, "/most": number}.

    "/most" is how often an ending occurs; above 1, several samples have the key.

    A tar that is cut off or damaged ends there: a fault is added, and the example within which it
    was cut, if that is known, has an entry "/cut".
    """
    size = stream.seek(0, 2)
    stream.seek(0)
    group: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    end = 0
    damage: str | None = None
    try:
        tar = tarfile.open(fileobj=stream, mode="r:")
        while (info := tar.next()) is not None:
            tar.members = []  # else it keeps all
            end = info.offset_data + info.size
            found = _KEY.fullmatch(info.name)
            if not info.isreg() or found is None:
                continue
            if found[1] != group.get("/key"):
                if group:
                    yield group
                group, counts = {"/key": found[1], "/most": 1}, Counter()
            counts[found[2].lower()] += 1
            group["/most"] = max(group["/most"], counts[found[2].lower()])
            group[found[2].lower()] = (info.offset_data, info.size)
            if end > size:
                group["/cut"] = True
        position = tar.offset
        stream.seek(position)
        if stream.read(_BLOCK).strip(b"\0") or position >= size:
            damage = f"no end of archive at byte {position} of {size}"
    except tarfile.TarError as error:
        damage = f"{error} after byte {end} of {size}"
        stream.seek(0)
        kind = "" if end else kind_of(stream.read(SIGNATURE_BYTES))
        damage = f"it is {kind}" if kind not in ("", "a tar") else damage
    if group:
        yield group
    if damage is not None and "/cut" not in group:
        faults.append(Fault(TRUNCATED, "", f"{damage}: what follows is lost"))


def _first(members: Mapping[str, Any], wanted: str, name: str) -> tuple[str, tuple[int, int]]:
    """The ending among `wanted` that an example has, and where that file is."""
    for ending in wanted.split(","):
        if ending in members:
            return ending, members[ending]
    raise BadExample(MISSING_FIELD, f"no .{wanted.replace(',', ', .')} for {name}")


def _value(stream: BinaryIO, members: Mapping[str, Any], wanted: str, name: str) -> Any:
    """A field's value: text, a number or bytes by the ending, or a value in the JSON file."""
    if wanted not in members and wanted.startswith("json."):
        value = _json(_read(stream, _first(members, "json", name)[1]))
        for key in wanted.split(".")[1:]:
            if not isinstance(value, dict) or key not in value:
                raise BadExample(MISSING_FIELD, f"no {wanted}")
            value = value[key]
        return value
    ending, place = _first(members, wanted, name)
    data = _read(stream, place)
    if ending in _TEXTS:
        return decode_text(data, f".{ending}")
    if ending not in _NUMBERS:
        return data
    try:
        return int(data)
    except ValueError:
        raise BadExample(UNREADABLE, f".{ending} holds no integer: {data[:20]!r}") from None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except UnicodeDecodeError:
        raise BadExample(MALFORMED_TEXT, ".json is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadExample(UNREADABLE, f"malformed .json: {error.msg}") from None


def _read(stream: BinaryIO, place: tuple[int, int]) -> bytes:
    stream.seek(place[0])
    return stream.read(place[1])
