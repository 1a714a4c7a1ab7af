"""The base of all tokenizers: framing, truncation, the tokenizer.json for other libraries, files.

A run keeps its tokenizer in one file, whatever its kind: a tokenizer.json of the Hugging Face
library for "subword", and for the others a JSON mapping whose "type" is the name of the kind.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from etils import epath

from vlp_jax.errors import UserError
from vlp_jax.files import without_mark, write_whole

if TYPE_CHECKING:
    import tokenizers

# The special tokens of the tokenizers that are made here, and their ids.
PAD_ID, EOS_ID, BOS_ID = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>")


class Tokenizer:
    """Turns text into rows of token ids, by a model of the library `tokenizers`.

    A row is bos (if there is one), the ids of the text, eos and padding. Subclasses make the model
    and say which ids are special. `SentencePieceTokenizer` asks another library for the ids.

    Attributes:
      kind: the key of `KINDS`, as a config and the file of a run name it.
      vocab_size: the number of rows that an embedding needs: every id is below it.
      context_length: the length of a row of ids.
      pad_id, bos_id, eos_id: the special tokens; without a bos (None), rows begin with the text.
    """

    kind: ClassVar[str]
    vocab_size: int
    pad_id: int
    bos_id: int | None
    eos_id: int

    def __init__(self, model: tokenizers.Tokenizer, context_length: int) -> None:
        """Checks `context_length`; `model` gives the ids of a text without framing it."""
        self.context_length = check_context_length(context_length)
        self._model = model

    def __call__(self, texts: Sequence[str | bytes]) -> np.ndarray:
        """Token ids of n texts, int32 [n, context_length]. A long text loses its end, never eos."""
        front = [] if self.bos_id is None else [self.bos_id]
        # eos is always kept: towers pool the features at its place.
        room = self.context_length - frame_length(self)
        rows = [[*front, *row[:room], self.eos_id] for row in self.encode(texts)]
        return padded(rows, self.context_length, self.pad_id)

    def encode(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        """The ids of n texts, whole: without bos, eos and padding, and not cut."""
        batch = [self.clean(as_text(text)) for text in texts]
        encodings = self._model.encode_batch_fast(batch, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: np.ndarray) -> list[str]:
        """The texts of rows of ids, int [n, length], without special tokens, up to eos."""
        rows = [row[row != self.bos_id].tolist() for row in up_to_eos(ids, self.eos_id)]
        return self._model.decode_batch(rows, skip_special_tokens=True)

    def clean(self, text: str) -> str:
        return text

    def note(self) -> dict[str, Any]:
        """The content of the file of a run, beside the kind, to build the tokenizer again."""
        return {}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what is needed to build the tokenizer again to a file, whole or not at all."""
        write_note(path, self.kind, **self.note())

    def library_model(self) -> tokenizers.Tokenizer:
        """A fresh model of the library for raw text, with the special tokens marked as such."""
        raise NotImplementedError

    def to_json(self, lowercase: bool, canonicalize: bool = False) -> str:
        """A tokenizer.json of the Hugging Face `tokenizers` library with which it frames as here.

        Padding, truncation and `encode_special_tokens` are the caller's there. Texts come as they
        are, and are lower-cased, or go through `canonicalize_text`, first if so asked. Raises
        UserError if that library cannot express the tokenizer.
        """
        model = self.library_model()
        library = import_tokenizers()
        ids = [i for i in (self.bos_id, self.eos_id) if i is not None]
        names = [model.id_to_token(i) for i in ids]
        before, after = names[:-1], names[-1:]
        model.post_processor = library.processors.TemplateProcessing(
            single=[*before, "$A", *after],
            # A pair is what the library asks for; nothing here tokenizes pairs.
            pair=[*before, "$A", *after, "$B:1", *(f"{name}:1" for name in after)],
            special_tokens=list(zip(names, ids, strict=True)),
        )
        steps = canonicalize_steps() if canonicalize else lowercase_steps() if lowercase else []
        if steps:
            steps += [] if model.normalizer is None else [model.normalizer]
            model.normalizer = library.normalizers.Sequence(steps)
        model.no_padding()
        model.no_truncation()
        content = model.to_str(pretty=False)
        return _without_lost_symbols(content) if canonicalize else content


# The text operations of a run that a tokenizer.json can do, in the order of `to_json`'s arguments.
NORMALIZED = ("lowercase", "canonicalize_text")


def check_context_length(context_length: Any) -> int:
    """Returns `context_length`; raises UserError unless a row of it holds bos, a token and eos."""
    if not isinstance(context_length, int) or context_length < 3:
        raise UserError(
            f"tokenizer.context_length={context_length!r} must be a number of at least 3: "
            f"bos, one token and eos"
        )
    return context_length


def as_text(text: str | bytes) -> str:
    """Decodes a text; bytes that are no UTF-8, and lone surrogates, are replaced."""
    if isinstance(text, bytes):
        return text.decode("utf-8", "replace")
    # A lone surrogate, which JSON can spell, is in no encoding.
    return text.encode("utf-8", "replace").decode("utf-8")


def frame_length(tokenizer: Tokenizer) -> int:
    """The number of special tokens that frame a text."""
    return 1 if tokenizer.bos_id is None else 2


def padded(
    rows: Sequence[Sequence[int]], length: int, pad_id: int, left: bool = False
) -> np.ndarray:
    """Pads rows of at most `length` ids at one side, int32 [n, length]."""
    ids = np.full((len(rows), length), pad_id, np.int32)
    for target, row in zip(ids, rows, strict=True):
        target[length - len(row) if left else 0 :][: len(row)] = row
    return ids


def up_to_eos(ids: np.ndarray, eos_id: int) -> list[np.ndarray]:
    """The ids before the first eos of each row, int [n, length]."""
    rows = []
    for row in np.asarray(ids):
        ends = np.flatnonzero(row == eos_id)
        rows.append(row[: ends[0]] if ends.size else row)
    return rows


def import_tokenizers() -> Any:
    """Imports the Hugging Face library `tokenizers`, without threads of its own."""
    # Texts are tokenized in the input pipeline's own threads; a second pool would compete with
    # the training step for the same cores, and warns when a process forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    return tokenizers


def _without_lost_symbols(tokenizer_json: str) -> str:
    """A tokenizer.json without the added tokens that no canonicalized text spells.

    The library normalizes added tokens too: a line feed would become "" and be found everywhere.
    """
    content = json.loads(tokenizer_json)
    canonical = import_tokenizers().normalizers.Sequence(canonicalize_steps()).normalize_str
    # Special tokens stay, because padding and eos are found by them.
    content["added_tokens"] = [
        token
        for token in content["added_tokens"]
        if token["special"] or canonical(token["content"]) == token["content"]
    ]
    return json.dumps(content, ensure_ascii=False)


def lowercase_steps() -> list[Any]:
    """Normalizers of the library that lower-case as Python and TensorFlow do."""
    library = import_tokenizers()
    # The library goes character by character, and so puts no final sigma at the end of a word.
    sigma = library.Regex(r"(?<=[\p{L}\p{M}])\x{3a3}(?![\p{L}\p{M}])")
    return [library.normalizers.Replace(sigma, "\u03c2"), library.normalizers.Lowercase()]


def canonicalize_steps() -> list[Any]:
    """Normalizers of the library that do what `text_ops.canonicalize_text` does."""
    library = import_tokenizers()
    replace, regex = library.normalizers.Replace, library.Regex
    spaces = r"[\t-\r\x{1c}-\x20\x{85}\p{Z}]+"  # white space as `text_ops` has it
    return [
        replace("_", " "),
        replace(regex(r"[!-/:-@\[-`{-~]|\x00"), ""),
        *lowercase_steps(),
        replace(regex(spaces), " "),
        replace(regex(r"\A | \z"), ""),
    ]


def byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level BPE, in the order of the bytes.

    Bytes that print stand for themselves, the others for characters from 256 on, in their order
    (openai/gpt-2, encoder.py, `bytes_to_unicode`).
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


# The kinds that a file can be of, and what such a file is called in messages.
KINDS = {
    "bytes": "the note of a bytes tokenizer",
    "subword": "a tokenizer.json of the Hugging Face `tokenizers` library",
    "clip": "a file of CLIP's merges",
    "sentencepiece": "a SentencePiece model",
}


def write_note(path: str | os.PathLike[str], kind: str, **content: Any) -> None:
    """Writes the file in which a run keeps a tokenizer of `kind`, whole or not at all."""
    write_whole(path, json.dumps({"type": kind, **content}) + "\n")


def read_note(content: bytes, kind: str) -> dict[str, Any] | None:
    """Reads what `write_note` wrote; None if the content is no such file of `kind`."""
    mapping = _as_mapping(content)
    return mapping if mapping is not None and mapping.get("type") == kind else None


def read_file(path: str | os.PathLike[str], kind: str) -> bytes:
    """The content of a file of the kind `kind` (or an error), unpacked if it is gzipped."""
    path = epath.Path(path)
    if not path.is_file():
        raise UserError(f"tokenizer file {path} does not exist")
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is a gzip file that cannot be unpacked: {error}") from None
    content = without_mark(content, str(path))  # a model of SentencePiece never begins so
    found = kind_of_file(content)
    if found not in (None, kind):
        raise UserError(
            f"{path} is {KINDS[found]}, not {KINDS[kind]}: set config.tokenizer.name to {found!r} "
            f"to use it"
        )
    return content


def kind_of_file(content: bytes) -> str | None:
    """The key of `KINDS` that the content of a file is of; None if it looks like none of them."""
    mapping = _as_mapping(content)
    if mapping is not None:
        if mapping.get("type") in KINDS:
            return mapping["type"]
        return "subword" if "model" in mapping else None
    # A ModelProto begins with its first piece (field 1), which begins with its string (field 1).
    if content[:1] == b"\n" and content[2:3] == b"\n":
        return "sentencepiece"
    # Merges are two words a line, behind a header.
    lines = content[:4096].decode("utf-8", "replace").splitlines()[:4]
    pairs = [len(line.split()) == 2 for line in lines[1:]]
    return "clip" if pairs and all(pairs) else None


def _as_mapping(content: bytes) -> dict[str, Any] | None:
    """The JSON mapping in a file, None if there is none."""
    if content.lstrip()[:1] != b"{":
        return None
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
