"""CLIP's tokenizer: text that is cleaned and lower-cased, words, and byte pairs within them.

Source: openai/CLIP, clip/simple_tokenizer.py, which open_clip (open_clip/tokenizer.py) took over.
"""

from __future__ import annotations

import html
import importlib.util
import os
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from vlp_jax.data.tokenizers import base
from vlp_jax.errors import UserError

if TYPE_CHECKING:
    import tokenizers

MAX_MERGES = 49_152 - 256 - 2  # what CLIP reads of its file, which holds more
MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_END = "</w>"  # ends the last token of a word
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# CLIP's pattern disregards case, so that U+0345, a mark whose upper case is a letter, fits nowhere.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"


class ClipTokenizer(base.Tokenizer):
    """CLIP's byte pairs: 49,408 ids with the published merges; see `Tokenizer`.

    The ids equal open_clip's `SimpleTokenizer` with its default cleaning, "lower", but for text
    that spells a special token ("<end_of_text>"), which is text here. Rows are padded with 0, which
    no text has at the end of a word. `merges` are pairs of symbols, such as "t h", the most
    frequent first.
    """

    kind = "clip"
    pad_id = 0

    def __init__(
        self, merges: Sequence[str], context_length: int, where: str, cleaning: str = "lower"
    ) -> None:
        """Makes the vocabulary; `where` names the file of merges, `cleaning` one of `CLEANINGS`."""
        self._merges = list(merges)
        symbols = sorted(base.byte_symbols())  # printing characters come first, as in CLIP's file
        tokens = [*symbols, *(symbol + _END for symbol in symbols)]
        tokens += _joined(self._merges, set(tokens), where)
        self.bos_id, self.eos_id = len(tokens), len(tokens) + 1
        self.vocab_size = len(tokens) + 2
        self._vocab = {token: i for i, token in enumerate([*tokens, _BOS, _EOS])}
        self._clean = CLEANINGS[cleaning]
        super().__init__(self._make_model(), context_length)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], context_length: int, cleaning: str = "lower"
    ) -> ClipTokenizer:
        """Reads bpe_simple_vocab_16e6.txt, also gzipped, a merges.txt, or what `save` wrote."""
        content = base.read_file(path, "clip")
        note = base.read_note(content, "clip")
        merges = _merges_of(content, str(path)) if note is None else note["merges"]
        return cls(merges, context_length, str(path), cleaning)

    @classmethod
    def published(cls, context_length: int, cleaning: str = "lower") -> ClipTokenizer:
        """Builds CLIP's own tokenizer from the file in an installed open_clip, not imported."""
        spec = importlib.util.find_spec("open_clip")
        file = epath.Path(spec.origin).parent / MERGES_FILE if spec and spec.origin else None
        if file is None or not file.is_file():
            raise UserError(
                f"config.tokenizer.file is not set, and there is no open_clip whose {MERGES_FILE} "
                f"could be used: pip install open_clip_torch, or set it to that file, which is in "
                f"https://github.com/openai/CLIP/tree/main/clip"
            )
        return cls.load(file, context_length, cleaning)

    def clean(self, text: str) -> str:
        return self._clean(text)

    def decode(self, ids: np.ndarray) -> list[str]:
        """The texts as cleaning left them, with a space between what CLIP takes for words."""
        return [text.strip(" ") for text in super().decode(ids)]

    def note(self) -> dict[str, Any]:
        return {"merges": self._merges}

    def to_json(self, lowercase: bool, canonicalize: bool = False) -> str:
        """See `Tokenizer`; the result always lower-cases."""
        return super().to_json(False, canonicalize)

    def library_model(self) -> tokenizers.Tokenizer:
        """The model for raw text.

        Of the cleaning, `tokenizers` can express quotation marks, ligatures and wide characters as
        ftfy makes them, NFC, the five entities of XML, white space and lower case. It cannot
        repair text that was decoded wrongly, nor resolve other entities.
        """
        library = base.import_tokenizers()
        model = self._make_model()
        # The token that pads must be a special one for others; 0 is "!" within a word.
        model.add_special_tokens([model.id_to_token(self.pad_id), _BOS, _EOS])
        model.normalizer = library.normalizers.Sequence(_cleaning_steps(library.normalizers))
        return model

    def _make_model(self) -> tokenizers.Tokenizer:
        library = base.import_tokenizers()
        # The suffix makes the library merge "</w>" with the last symbol of a word, as CLIP does.
        merges = [tuple(merge.split()) for merge in self._merges]
        model = library.Tokenizer(
            library.models.BPE(vocab=self._vocab, merges=merges, end_of_word_suffix=_END)
        )
        words = library.pre_tokenizers.Split(library.Regex(_WORDS), "removed", invert=True)
        symbols = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = library.pre_tokenizers.Sequence([words, symbols])
        decoders = library.decoders
        model.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(_END, " ")])
        return model


def clean(text: str) -> str:
    """Cleans a text as open_clip does by default (`_clean_lower`): repairs and lower-cases it."""
    return repaired(text).lower()


def repaired(text: str) -> str:
    """Cleans a text as open_clip does before a tokenizer of others (`_clean_whitespace`).

    Wrongly decoded text is repaired by ftfy, HTML entities are resolved twice, and white space
    becomes single spaces.
    """
    # Nothing of plain ASCII is ftfy's business, and ftfy takes ten times as long as all the rest.
    if "&" in text or not (text.isascii() and text.isprintable()):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def canonical(text: str) -> str:
    """Cleans a text as open_clip does for SigLIP (`_clean_canonicalize`): no punctuation either."""
    # The underscore first, because it is punctuation too.
    text = repaired(text).replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(text.lower().split())


# open_clip's names of what a tokenizer does to a text before anything else.
CLEANINGS = {"lower": clean, "whitespace": repaired, "canonicalize": canonical}


def _merges_of(content: bytes, where: str) -> list[str]:
    """The merges of a text file, without its header and the lines that CLIP does not read."""
    lines = content.decode("utf-8", "replace").split("\n")
    if lines[0].startswith(("#version", '"')):
        lines = lines[1:]
    merges = [line.rstrip("\r") for line in lines[:MAX_MERGES]]
    while merges and not merges[-1]:
        merges.pop()
    if not merges:
        raise UserError(f"{where} holds no merges")
    if content.lstrip()[:1] == b"{":
        raise UserError(f"{where} is JSON, not a list of merges: give the merges.txt beside it")
    return merges


def _joined(merges: Sequence[str], known: set[str], where: str) -> list[str]:
    """The tokens that merges make; each joins two earlier tokens."""
    tokens = []
    for number, merge in enumerate(merges, 1):
        pair = merge.split(" ")
        if len(pair) != 2 or not known.issuperset(pair) or "".join(pair) in known:
            raise UserError(
                f"{where}: merge {number} is {merge[:40]!r}, not two tokens that were there before "
                f"and make one that was not; give CLIP's {MERGES_FILE} or the merges.txt of a model"
            )
        tokens.append("".join(pair))
        known.add(tokens[-1])
    return tokens


def _cleaning_steps(normalizers: Any) -> list[Any]:
    """The part of `clean` that the library's normalizers can express."""
    from ftfy import chardata
    from tokenizers import Regex

    characters = {**chardata.LIGATURES, **chardata.WIDTH_MAP}
    replaced = [(chr(code), text) for code, text in characters.items()]
    replaced += [(Regex("[\u02bc\u2018-\u201b]"), "'"), (Regex("[\u201c-\u201f]"), '"')]
    control = Regex(
        r"[\x{0}-\x{8}\x{b}\x{e}-\x{1f}\x{7f}\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]"
    )
    entities = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&apos;": "'"}
    # The ampersand once more at the end: "&amp;lt;" is "<" after two rounds.
    resolved = [("&amp;", "&"), *entities.items(), ("&amp;", "&"), *entities.items()]
    return [
        *(normalizers.Replace(old, new) for old, new in [*replaced, (control, "")]),
        normalizers.NFC(),
        *(normalizers.Replace(old, new) for old, new in resolved),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
        *base.lowercase_steps(),
    ]
