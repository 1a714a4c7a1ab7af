"""Imitates how the tokenizer classes of `transformers` change a tokenizer.json or a vocabulary.

Source: transformers 5.24, tokenization_utils_tokenizers.py and the `tokenization_*.py` of each
model. A class named in tokenizer_config.json takes vocabulary and merges from tokenizer.json, but
normalizes and splits texts by its own rules. `PreTrainedTokenizerFast` uses the file unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Content = dict[str, Any]  # of a tokenizer.json
GENERIC = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend", None)

_LOWERCASE = {"type": "Lowercase"}


def _sequence(kind: str, *steps: Content) -> Content:
    return {"type": "Sequence", kind: list(steps)}


def _replace(old: Content, new: str) -> Content:
    return {"type": "Replace", "pattern": old, "content": new}


def _clip(content: Content, config: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    content["model"] |= {
        "type": "BPE",
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "</w>",
        "fuse_unk": False,
        "unk_token": config["unk_token"],
    }
    spaces = _replace({"Regex": r"\s+"}, " ")
    content["normalizer"] = _sequence("normalizers", {"type": "NFC"}, spaces, _LOWERCASE)
    words = (
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
        r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    )
    content["pre_tokenizer"] = _sequence(
        "pretokenizers",
        {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    )
    content["post_processor"] = _frame(ids, config["bos_token"], config["eos_token"])


def _gemma(content: Content, config: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    content["model"] |= {"fuse_unk": True, "byte_fallback": True, "unk_token": config["unk_token"]}
    # U+2581 is SentencePiece's mark of a space.
    content["normalizer"] = _replace({"String": " "}, "\u2581")
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }


def _siglip2(content: Content, config: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    _gemma(content, config, ids)
    content["normalizer"] = _sequence("normalizers", _LOWERCASE, content["normalizer"])


def _bert(content: Content, config: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    content["normalizer"] = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
        "strip_accents": config.get("strip_accents"),
        "lowercase": config.get("do_lower_case", True),
    }
    content["pre_tokenizer"] = {"type": "BertPreTokenizer"}
    content["post_processor"] = _frame(ids, config["cls_token"], config["sep_token"])


def _t5(content: Content, config: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    # Of the normalizer in the file, T5 keeps only SentencePiece's compiled character map.
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    content["normalizer"] = next((x for x in steps if x.get("type") == "Precompiled"), None)
    spaces = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
    content["pre_tokenizer"] = _sequence(
        "pretokenizers", {"type": "WhitespaceSplit"}, {**spaces, "split": True}
    )
    # T5's vocabulary begins with <pad>, </s>, <unk>.
    content["model"] |= {"unk_id": 2, "byte_fallback": False}
    content["post_processor"] = _frame(ids, None, "</s>")


def _frame(ids: Mapping[str, int], before: str | None, after: str) -> Content:
    """Makes the post-processor that puts special tokens around a text."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    names = [name for name in (before, after) if name is not None]
    around = {name: {"SpecialToken": {"id": name, "type_id": 0}} for name in names}
    single = [around[before]] if before is not None else []
    single += [text, around[after]]
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }


class TokenizerClass(NamedTuple):
    """A tokenizer class that changes a tokenizer.json.

    Attributes:
      change: changes the content of a tokenizer.json in place, given the tokenizer's config and the
        ids of the vocabulary.
      tokens: default special tokens, for a config that names none.
      pads_left: whether texts are padded on the left by default.
    """

    change: Callable[[Content, Mapping[str, Any], Mapping[str, int]], None]
    tokens: Mapping[str, str]
    pads_left: bool = False


_EOT = "<|endoftext|>"
_GEMMA = {name: f"<{name}>" for name in ("unk", "bos", "eos", "pad", "mask")}


def _named(**tokens: str) -> dict[str, str]:
    return {f"{name}_token": spelled for name, spelled in tokens.items()}


CLASSES: dict[str, TokenizerClass] = {
    "BertTokenizer": TokenizerClass(
        _bert, _named(unk="[UNK]", sep="[SEP]", pad="[PAD]", cls="[CLS]", mask="[MASK]")
    ),
    "CLIPTokenizer": TokenizerClass(
        _clip, _named(unk=_EOT, bos="<|startoftext|>", eos=_EOT, pad=_EOT)
    ),
    "GemmaTokenizer": TokenizerClass(_gemma, _named(**_GEMMA), pads_left=True),
    "Siglip2Tokenizer": TokenizerClass(_siglip2, _named(**_GEMMA), pads_left=True),
    "T5Tokenizer": TokenizerClass(_t5, _named(eos="</s>", unk="<unk>", pad="<pad>")),
}


def of_vocabulary(files: Mapping[str, bytes]) -> Content | None:
    """Makes a tokenizer.json without rules from vocabulary files; None if there are none."""
    if {"vocab.json", "merges.txt"} <= files.keys():
        lines = files["merges.txt"].decode("utf-8", "replace").split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        model = {"type": "BPE", "vocab": json.loads(files["vocab.json"]), "merges": merges}
    elif "vocab.txt" in files:
        # Only the last line break goes: the number of a line is an id, also where the line is
        # empty.
        lines = files["vocab.txt"].decode("utf-8", "replace").removesuffix("\n").split("\n")
        vocab = {line: number for number, line in enumerate(lines)}
        model = {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]"}
        # As in BERT's WordPiece: 100 is its longest word.
        model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    else:
        return None
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    empty: Content = {"version": "1.0", "added_tokens": [], **dict.fromkeys(parts)}
    return {**empty, "model": model}


def vocabulary_of(content: Content) -> dict[str, int]:
    """Returns spelling -> id of the tokens in a tokenizer.json."""
    vocab = content["model"].get("vocab") or {}
    if isinstance(vocab, list):  # unigram: pairs of a spelling and a score
        vocab = {spelled: number for number, (spelled, _) in enumerate(vocab)}
    return dict(vocab) | {token["content"]: token["id"] for token in content["added_tokens"]}
