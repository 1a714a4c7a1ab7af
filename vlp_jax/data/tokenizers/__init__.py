"""Tokenizers: bytes, subwords, CLIP's byte pairs, or SentencePiece.

A row of ids is bos, the text's ids, eos, and padding. A text that is too long loses its end, never
its eos. The tokenizers that are made here number pad 0 and eos 1: Hugging Face's CLIPModel takes an
eos of 2 for something else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from vlp_jax.data.sources.base import as_plain
from vlp_jax.data.tokenizers.base import Tokenizer, check_context_length
from vlp_jax.data.tokenizers.clip import ClipTokenizer
from vlp_jax.data.tokenizers.sentence_piece import SentencePieceTokenizer, train_sentencepiece
from vlp_jax.data.tokenizers.subword import ByteTokenizer, SubwordTokenizer, train_subword
from vlp_jax.errors import UserError, unknown_key_message

__all__ = [
    "ByteTokenizer",
    "ClipTokenizer",
    "SentencePieceTokenizer",
    "SubwordTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "train_sentencepiece",
    "train_subword",
]

Texts = Callable[[], Iterable[str | bytes]]
KEYS = ("name", "context_length", "vocab_size", "file", "pad")


def build_tokenizer(
    config: Mapping[str, Any], texts: Texts, path: str | os.PathLike[str] | None
) -> Tokenizer:
    """Builds the tokenizer that a config describes.

    Args:
      config: `name`, one of `TOKENIZERS`; `context_length`; `vocab_size`, an upper bound (None: no
        bound, but a subword tokenizer that is trained needs one); `file`: for "subword" a
        tokenizer.json, or None to train one on `texts`; for "clip" its merges, or None for those
        in an installed open_clip; for "sentencepiece" a .model; or what a run has kept of one of
        the same name. `pad`: None, or "eos" to pad with eos, as the published SigLIP models do.
      texts: gives the captions to train on; called only if training is needed.
      path: where a tokenizer that is made without a file is kept: loaded from there if it exists,
        else made and saved there. None does not keep it.

    Raises UserError for unknown keys, a file that cannot be used, or a vocabulary above the bound.
    """
    config = as_plain(config)
    for key in config:
        if key not in KEYS:
            raise UserError(unknown_key_message(key, KEYS, "tokenizer"))
    name, pad = config.get("name"), config.get("pad")
    if name not in TOKENIZERS:
        raise UserError(unknown_key_message(str(name), TOKENIZERS, "tokenizer.name"))
    if pad not in (None, "eos"):
        raise UserError(f"tokenizer.pad={pad!r} must be None or 'eos'")
    file, bound = config.get("file"), config.get("vocab_size")
    kept = path is not None and epath.Path(path).is_file()
    load, make = TOKENIZERS[name]
    context_length = check_context_length(config.get("context_length"))
    if file is not None and name == "bytes":
        raise UserError("tokenizer.file is set, but the bytes tokenizer has no file")
    if file is not None or kept:
        tokenizer = load(path if file is None else file, context_length)
    else:
        tokenizer = make(texts, bound, context_length)
    if bound is not None and tokenizer.vocab_size > bound:
        where = "" if file is None and path is None else f" of {path if file is None else file}"
        raise UserError(
            f"tokenizer.vocab_size={bound} is less than the {tokenizer.vocab_size} tokens{where}; "
            f"raise it or choose another tokenizer"
        )
    # A file of the user's stays where it is; what was trained or downloaded is kept with the run.
    if file is None and path is not None and not kept:
        tokenizer.save(path)
    if pad == "eos":
        tokenizer.pad_id = tokenizer.eos_id
    return tokenizer


def _make_subword(texts: Texts, bound: int | None, context_length: int) -> SubwordTokenizer:
    if bound is None:
        raise UserError("tokenizer.vocab_size is not set, and training a tokenizer needs it")
    return train_subword(texts(), bound, context_length)


def _make_sentencepiece(texts: Texts, bound: int | None, context_length: int) -> Any:
    raise UserError(
        "tokenizer.file is not set: name a SentencePiece .model file, which "
        "`python -m tools.train_tokenizer` makes of captions"
    )


# name -> (from a file, without one)
TOKENIZERS: dict[str, tuple[Callable[..., Tokenizer], Callable[..., Tokenizer]]] = {
    "bytes": (ByteTokenizer.load, lambda texts, bound, length: ByteTokenizer(length)),
    "clip": (ClipTokenizer.load, lambda texts, bound, length: ClipTokenizer.published(length)),
    "sentencepiece": (SentencePieceTokenizer.load, _make_sentencepiece),
    "subword": (SubwordTokenizer.load, _make_subword),
}
