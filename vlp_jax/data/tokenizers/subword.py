"""Subwords (a tokenizer.json of the Hugging Face library, or one trained here), and bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vlp_jax.data.tokenizers import base
from vlp_jax.errors import UserError
from vlp_jax.files import write_whole

if TYPE_CHECKING:
    import tokenizers

_MIN_VOCAB = 256 + len(base.SPECIAL_TOKENS)

# The names under which tokenizer.json files of others hold the three special tokens.
_PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")
_BOS_TOKENS = ("<bos>", "<s>", "[CLS]", "[BOS]", "<|startoftext|>", "<|begin_of_text|>")
_EOS_TOKENS = ("<eos>", "</s>", "[SEP]", "[EOS]", "<|endoftext|>", "<|end_of_text|>")


class SubwordTokenizer(base.Tokenizer):
    """A tokenizer.json of the Hugging Face `tokenizers` library, framed by bos and eos.

    The file's own post-processing, truncation and padding are not used. Text that spells a special
    token ("<eos>") is encoded as text. Without a token for padding, as in CLIP's file, eos pads;
    without one for bos, as in SigLIP's, rows begin with the text; without one for eos it is an
    error.
    """

    kind = "subword"

    def __init__(self, model: tokenizers.Tokenizer, context_length: int, where: str) -> None:
        """Looks for the special tokens; `where` names the model's file in messages."""
        super().__init__(model, context_length)
        self.bos_id = _special_id(model, _BOS_TOKENS)
        eos_id, pad_id = _special_id(model, _EOS_TOKENS), _special_id(model, _PAD_TOKENS)
        if eos_id is None:
            raise UserError(f"{where} has no eos token (looked for {', '.join(_EOS_TOKENS)})")
        self.eos_id, self.pad_id = eos_id, eos_id if pad_id is None else pad_id
        self.vocab_size = 1 + max(model.get_vocab(with_added_tokens=True).values())
        model.encode_special_tokens = True
        model.no_padding()
        # The file keeps its truncation for other users; here texts are cut by `frame`.
        self._file = model.to_str(pretty=False)
        model.no_truncation()

    @classmethod
    def load(cls, path: str | os.PathLike[str], context_length: int) -> SubwordTokenizer:
        library = base.import_tokenizers()
        content = base.read_file(path, "subword")
        try:
            model = library.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises plain Exception for every kind of damage
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is not a tokenizer.json that can be read: {reason}") from None
        return cls(model, context_length, str(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        write_whole(path, self._file)

    def library_model(self) -> tokenizers.Tokenizer:
        return base.import_tokenizers().Tokenizer.from_str(self._file)


def train_subword(
    texts: Iterable[str | bytes], vocab_size: int, context_length: int
) -> SubwordTokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), which any text survives.

    The same texts in any order give the same tokenizer. `vocab_size` is an upper bound: few texts
    give fewer tokens. It must hold the 256 bytes and 3 special tokens.
    """
    if vocab_size < _MIN_VOCAB:
        raise UserError(
            f"tokenizer.vocab_size={vocab_size} must be at least {_MIN_VOCAB}: "
            f"256 bytes and {len(base.SPECIAL_TOKENS)} special tokens"
        )
    library = base.import_tokenizers()
    # Training breaks ties by the order of texts, which differs between machines.
    sorted_texts = sorted(base.as_text(text) for text in texts)
    if not any(sorted_texts):
        raise UserError("there is no text to train a tokenizer on")
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(base.SPECIAL_TOKENS),
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    model.train_from_iterator(sorted_texts, trainer)
    return SubwordTokenizer(model, context_length, "the trained tokenizer")


def _special_id(model: tokenizers.Tokenizer, names: Sequence[str]) -> int | None:
    """The id of the first of these names that the model has."""
    ids = (model.token_to_id(name) for name in names)
    return next((token_id for token_id in ids if token_id is not None), None)


class ByteTokenizer(base.Tokenizer):
    """UTF-8 bytes: byte b is id b + 3; see `Tokenizer`."""

    kind = "bytes"
    pad_id, eos_id, bos_id = base.PAD_ID, base.EOS_ID, base.BOS_ID
    vocab_size = 256 + len(base.SPECIAL_TOKENS)

    def __init__(self, context_length: int) -> None:
        super().__init__(self.library_model(), context_length)
        self._model.encode_special_tokens = True  # a text that spells one is text

    @classmethod
    def load(cls, path: str | os.PathLike[str], context_length: int) -> ByteTokenizer:
        """Looks at the file that `save` wrote, which holds nothing but the kind."""
        base.read_file(path, cls.kind)
        return cls(context_length)

    def library_model(self) -> Any:
        """A byte-level BPE without merges."""
        library = base.import_tokenizers()
        names = [*base.SPECIAL_TOKENS, *base.byte_symbols()]
        vocab = {name: i for i, name in enumerate(names)}
        model = library.Tokenizer(library.models.BPE(vocab=vocab, merges=[]))
        model.add_special_tokens(list(base.SPECIAL_TOKENS))
        model.pre_tokenizer = library.pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        model.decoder = library.decoders.ByteLevel()
        return model
