"""SentencePiece (Kudo and Richardson 2018): a .model file, as T5, SigLIP and Llama have one."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp_jax.data.tokenizers import base
from vlp_jax.errors import UserError

if TYPE_CHECKING:
    import tokenizers

MODEL_TYPES = ("unigram", "bpe")


class SentencePieceTokenizer(base.Tokenizer):
    """A SentencePiece model, framed by its own bos and eos; see `Tokenizer`.

    The special ids are the model's own. Without a bos (-1 there), as in T5's and SigLIP's, rows
    begin with the text; without a pad, as in Llama's, eos pads; without an eos it is an error. Text
    that spells a special token ("</s>") is encoded as text.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, context_length: int, where: str) -> None:
        """Reads `model`, the content of a .model file; `where` names it in messages."""
        import sentencepiece

        self._file = model
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError):  # whose message is a line of its C++
            raise UserError(f"{where} is not a SentencePiece model that can be read") from None
        super().__init__(processor, context_length)
        if self._model.eos_id() < 0:
            raise UserError(
                f"{where} has no eos: train it with --eos_id=1 (tools/train_tokenizer.py does)"
            )
        self.eos_id = self._model.eos_id()
        self.bos_id = None if self._model.bos_id() < 0 else self._model.bos_id()
        self.pad_id = self.eos_id if self._model.pad_id() < 0 else self._model.pad_id()
        self.vocab_size = self._model.get_piece_size()
        self.unk_id = self._model.unk_id()

    @classmethod
    def load(cls, path: str | os.PathLike[str], context_length: int) -> SentencePieceTokenizer:
        """Reads a .model file, or what `save` wrote."""
        content = base.read_file(path, "sentencepiece")
        note = base.read_note(content, "sentencepiece")
        if note is not None:
            content = base64.b64decode(note["model"])
        return cls(content, context_length, str(path))

    @property
    def model_file(self) -> bytes:
        return self._file

    def encode(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        # One thread: see `base.import_tokenizers`.
        return self._model.encode([base.as_text(text) for text in texts], num_threads=1)

    def decode(self, ids: np.ndarray) -> list[str]:
        return [self._model.decode(row.tolist()) for row in base.up_to_eos(ids, self.eos_id)]

    def note(self) -> dict[str, Any]:
        return {"model": base64.b64encode(self._file).decode()}

    def library_model(self) -> tokenizers.Tokenizer:
        """The model converted; see `sentencepiece_json.convert` for models that it refuses."""
        from vlp_jax.data.tokenizers.sentencepiece_json import convert

        return convert(self._file)


def train_sentencepiece(
    texts: Iterable[str | bytes], vocab_size: int, context_length: int, model_type: str = "unigram"
) -> SentencePieceTokenizer:
    """Trains a SentencePiece model with T5's special ids: pad 0, eos 1, unk 2 and no bos.

    The same texts in any order give the same model. `vocab_size` is an upper bound; `model_type` is
    "unigram" (Kudo 2018) or "bpe" (Sennrich et al. 2016). Raises UserError if there is no text, or
    if the vocabulary does not hold its characters.
    """
    import sentencepiece

    if model_type not in MODEL_TYPES:
        raise UserError(f"a SentencePiece model is one of {MODEL_TYPES}, not {model_type!r}")
    # Sorted, because the model depends on the order of texts; a line break would end a text.
    lines = sorted(" ".join(base.as_text(text).split()) for text in texts)
    if not any(lines):
        raise UserError("there is no text to train a tokenizer on")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.9999,  # rarer characters are unknown
            **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
            max_sentence_length=1 << 16,  # bytes; longer ones would be left out
            num_threads=4,  # not the machine's own number, on which the sums' rounding depends
            minloglevel=2,
        )
    except RuntimeError as error:
        # Without the place in the C++ code.
        reason = str(error).splitlines()[0].rpartition("] ")[2].strip()
        raise UserError(
            f"SentencePiece cannot make {vocab_size} tokens of {len(lines)} texts: {reason}"
        ) from None
    return SentencePieceTokenizer(written.getvalue(), context_length, "the trained model")
