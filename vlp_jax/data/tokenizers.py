"""Text to token ids: bytes, or subwords by the Hugging Face `tokenizers` library.

A row of ids is bos, the text's ids, eos, and padding. A text that is too long loses its end, never
its eos. Both tokenizers that are made here number pad 0, eos 1 and bos 2: Hugging Face's CLIPModel
takes an eos of 2 for something else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from etils import epath

from vlp_jax.data.sources.base import as_plain
from vlp_jax.errors import UserError, unknown_key_message

if TYPE_CHECKING:
    import tokenizers

PAD_ID, EOS_ID, BOS_ID = 0, 1, 2
_BYTES = 256
_MIN_VOCAB = 3 + _BYTES

# The names under which tokenizer.json files of others hold the three special tokens.
_PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")
_BOS_TOKENS = ("<bos>", "<s>", "[CLS]", "[BOS]", "<|startoftext|>", "<|begin_of_text|>")
_EOS_TOKENS = ("<eos>", "</s>", "[SEP]", "[EOS]", "<|endoftext|>", "<|end_of_text|>")

_SPECIAL_TOKENS = (_PAD_TOKENS[0], _EOS_TOKENS[0], _BOS_TOKENS[0])  # in the order of their ids


class Tokenizer(Protocol):
    """What the pipeline and the models ask of a tokenizer.

    Attributes:
      vocab_size: the number of rows that an embedding needs: every id is below it.
      context_length: the length of a row of ids.
      pad_id, bos_id, eos_id: the special tokens; without a bos (None), rows begin with the text.
    """

    vocab_size: int
    context_length: int
    pad_id: int
    bos_id: int | None
    eos_id: int

    def __call__(self, texts: Sequence[str | bytes]) -> np.ndarray:
        """Token ids of n texts, int32 [n, context_length]."""
        ...

    def decode(self, ids: np.ndarray) -> list[str]:
        """The texts of rows of ids, int [n, length], without special tokens, up to eos."""
        ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what is needed to build it again to a file, whole or not at all."""
        ...

    def to_json(self, lowercase: bool) -> str:
        """A tokenizer.json of the Hugging Face `tokenizers` library with which it frames as here.

        Padding, truncation and `encode_special_tokens` are the caller's there.

        Args:
          lowercase: texts come as they are, and are to be lower-cased first.
        """
        ...


class ByteTokenizer:
    """UTF-8 bytes: byte b is id b + 3."""

    pad_id, bos_id, eos_id = PAD_ID, BOS_ID, EOS_ID
    vocab_size = _MIN_VOCAB

    def __init__(self, context_length: int) -> None:
        self.context_length = _check_context_length(context_length)

    def __call__(self, texts: Sequence[str | bytes]) -> np.ndarray:
        room = self.context_length - _frame_length(self)
        rows = []
        for text in texts:
            encoded = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
            rows.append(np.frombuffer(encoded[:room], np.uint8).astype(np.int32) + 3)
        return _frame(rows, self)

    def decode(self, ids: np.ndarray) -> list[str]:
        return [
            bytes(int(i) - 3 for i in row if i >= 3).decode("utf-8", "replace")
            for row in _up_to_eos(ids, self.eos_id)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a note: a byte tokenizer has nothing to keep but its kind."""
        _write_whole(epath.Path(path), '{"type": "bytes"}\n')

    def to_json(self, lowercase: bool) -> str:
        """The bytes as a byte-level BPE without merges; see `Tokenizer`."""
        library = _import_tokenizers()
        vocab = {name: i for i, name in enumerate(_SPECIAL_TOKENS)}
        vocab.update({symbol: byte + 3 for byte, symbol in enumerate(_byte_symbols())})
        model = library.Tokenizer(library.models.BPE(vocab=vocab, merges=[]))
        model.add_special_tokens(list(_SPECIAL_TOKENS))
        model.pre_tokenizer = library.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        model.decoder = library.decoders.ByteLevel()
        return _framing_json(model, self, lowercase)


class SubwordTokenizer:
    """A tokenizer.json of the Hugging Face `tokenizers` library, framed by bos and eos.

    The file's own post-processing, truncation and padding are not used. Text that spells a special
    token ("<eos>") is encoded as text. Without a token for padding, as in CLIP's file, eos pads;
    without one for bos, as in SigLIP's, rows begin with the text.

    Raises:
      UserError: if the file lacks a special token for eos.
    """

    def __init__(self, model: tokenizers.Tokenizer, context_length: int, where: str) -> None:
        self.context_length = _check_context_length(context_length)
        self._model = model
        self.bos_id = _special_id(model, _BOS_TOKENS)
        eos_id, pad_id = _special_id(model, _EOS_TOKENS), _special_id(model, _PAD_TOKENS)
        if eos_id is None:
            raise UserError(f"{where} has no eos token (looked for {', '.join(_EOS_TOKENS)})")
        self.eos_id, self.pad_id = eos_id, eos_id if pad_id is None else pad_id
        self.vocab_size = 1 + max(model.get_vocab(with_added_tokens=True).values())
        model.encode_special_tokens = True
        model.no_padding()
        self._file = model.to_str(pretty=False)
        model.enable_truncation(context_length - _frame_length(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str], context_length: int) -> SubwordTokenizer:
        """Reads a tokenizer.json.

        Raises:
          UserError: if the file does not exist, is not one, or lacks special tokens.
        """
        library = _import_tokenizers()
        if not epath.Path(path).is_file():
            raise UserError(f"tokenizer file {path} does not exist")
        try:
            model = library.Tokenizer.from_str(epath.Path(path).read_bytes().decode())
        except Exception as error:  # the library raises plain Exception for every kind of damage
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is not a tokenizer.json that can be read: {reason}") from None
        return cls(model, context_length, str(path))

    def __call__(self, texts: Sequence[str | bytes]) -> np.ndarray:
        batch = [_as_text(text) for text in texts]
        encodings = self._model.encode_batch_fast(batch, add_special_tokens=False)
        return _frame([encoding.ids for encoding in encodings], self)

    def decode(self, ids: np.ndarray) -> list[str]:
        return self._model.decode_batch(
            [row.tolist() for row in _up_to_eos(ids, self.eos_id)], skip_special_tokens=True
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        _write_whole(epath.Path(path), self._file)

    def to_json(self, lowercase: bool) -> str:
        model = _import_tokenizers().Tokenizer.from_str(self._file)
        return _framing_json(model, self, lowercase)


def train_subword(
    texts: Iterable[str | bytes], vocab_size: int, context_length: int
) -> SubwordTokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), which any text survives.

    Args:
      texts: what to train on; the same texts in any order give the same tokenizer.
      vocab_size: an upper bound; few texts give fewer tokens.
      context_length: the length of the rows of ids.

    Raises:
      UserError: for a vocabulary that does not hold the 256 bytes and 3 special tokens, or no text.
    """
    if vocab_size < _MIN_VOCAB:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} must be at least {_MIN_VOCAB}: "
            f"{_BYTES} bytes and 3 special tokens"
        )
    library = _import_tokenizers()
    sorted_texts = sorted(_as_text(text) for text in texts)
    if not any(sorted_texts):
        raise UserError("there is no text to train a tokenizer on")
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    model.train_from_iterator(sorted_texts, trainer)
    return SubwordTokenizer(model, context_length, "the trained tokenizer")


def build_tokenizer(
    config: Mapping[str, Any],
    texts: Callable[[], Iterable[str | bytes]],
    path: str | os.PathLike[str] | None,
) -> Tokenizer:
    """The tokenizer that a config describes.

    Args:
      config: `name`, "bytes" or "subword"; `context_length`; `vocab_size`, an upper bound (None:
        no bound, but a subword tokenizer that is trained needs one); `file`, a tokenizer.json for
        "subword", or None to train one on `texts`.
      texts: gives the captions to train on; called only if training is needed.
      path: where a trained tokenizer is kept: loaded from there if it exists, else trained and
        saved there. None does not keep it.

    Raises:
      UserError: for unknown keys and names, a file that cannot be used, or a vocabulary above the
        bound.
    """
    config = as_plain(config)
    known = ("name", "context_length", "vocab_size", "file")
    for key in config:
        if key not in known:
            raise UserError(unknown_key_message(key, known, "tokenizer"))
    name, context_length = config.get("name"), config.get("context_length")
    bound, file = config.get("vocab_size"), config.get("file")
    _check_context_length(context_length)
    tokenizer: Tokenizer
    if name == "bytes":
        if file is not None:
            raise UserError("tokenizer.file is set, but the bytes tokenizer has no file")
        tokenizer = ByteTokenizer(context_length)
        path = None
    elif name != "subword":
        raise UserError(unknown_key_message(str(name), ("bytes", "subword"), "tokenizer.name"))
    elif file is not None or (path is not None and epath.Path(path).is_file()):
        path = path if file is None else file
        tokenizer = SubwordTokenizer.load(path, context_length)
    else:
        if bound is None:
            raise UserError("tokenizer.vocab_size is not set, and training a tokenizer needs it")
        tokenizer = train_subword(texts(), bound, context_length)
        if path is not None:
            tokenizer.save(path)
    if bound is not None and tokenizer.vocab_size > bound:
        kept = f" of {path}" if path is not None else ""
        raise UserError(
            f"tokenizer.vocab_size={bound} is less than the {tokenizer.vocab_size} tokens{kept}; "
            f"raise it or choose another tokenizer"
        )
    return tokenizer


def _import_tokenizers() -> Any:
    # Texts are tokenized in the input pipeline's own threads; a second pool would compete with
    # the training step for the same cores, and warns when a process forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    return tokenizers


def _frame(rows: Sequence[Sequence[int] | np.ndarray], tokenizer: Tokenizer) -> np.ndarray:
    """bos (if there is one), ids, eos and padding; the rows leave room for bos and eos."""
    ids = np.full((len(rows), tokenizer.context_length), tokenizer.pad_id, np.int32)
    begin = 0
    if tokenizer.bos_id is not None:
        ids[:, 0], begin = tokenizer.bos_id, 1
    for target, row in zip(ids, rows, strict=True):
        target[begin : begin + len(row)] = row
        target[begin + len(row)] = tokenizer.eos_id
    return ids


def _frame_length(tokenizer: Tokenizer) -> int:
    """How many special tokens frame a text."""
    return 1 if tokenizer.bos_id is None else 2


def _framing_json(model: tokenizers.Tokenizer, tokenizer: Tokenizer, lowercase: bool) -> str:
    """The file of a library's model that puts bos and eos around a text as `tokenizer` does."""
    library = _import_tokenizers()
    ids = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    names = [model.id_to_token(i) for i in ids]
    before, after = names[:-1], names[-1:]
    model.post_processor = library.processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, "$B:1", *(f"{name}:1" for name in after)],
        special_tokens=list(zip(names, ids, strict=True)),
    )
    if lowercase:
        steps = [library.normalizers.Lowercase()]
        steps += [] if model.normalizer is None else [model.normalizer]
        model.normalizer = library.normalizers.Sequence(steps)
    model.no_padding()
    model.no_truncation()
    return model.to_str(pretty=False)


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level BPE.

    Bytes that print stand for themselves, the others for characters from 256 on, in their order
    (openai/gpt-2, encoder.py, `bytes_to_unicode`).
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(_BYTES)]


def _up_to_eos(ids: np.ndarray, eos_id: int) -> list[np.ndarray]:
    rows = []
    for row in np.asarray(ids):
        ends = np.flatnonzero(row == eos_id)
        rows.append(row[: ends[0]] if ends.size else row)
    return rows


def _as_text(text: str | bytes) -> str:
    if isinstance(text, bytes):
        return text.decode("utf-8", "replace")
    # A lone surrogate, which JSON can spell, is in no encoding.
    return text.encode("utf-8", "replace").decode("utf-8")


def _special_id(model: tokenizers.Tokenizer, names: Sequence[str]) -> int | None:
    """The id of the first of these names that the model has."""
    ids = (model.token_to_id(name) for name in names)
    return next((token_id for token_id in ids if token_id is not None), None)


def _check_context_length(context_length: Any) -> int:
    if not isinstance(context_length, int) or context_length < 3:
        raise UserError(
            f"tokenizer.context_length={context_length!r} must be a number of at least 3: "
            f"bos, one token and eos"
        )
    return context_length


def _write_whole(path: epath.Path, content: str) -> None:
    """Writes a file so that no reader, nor a crash, ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f"{path.name}.{os.getpid()}.unfinished"
    unfinished.write_bytes(content.encode())
    unfinished.replace(path)
