"""Builds the tokenizer of a foreign model from its files, with the same ids as its own library."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from vlp_jax.data.tokenizers import ClipTokenizer
from vlp_jax.data.tokenizers.clip import CLEANINGS
from vlp_jax.data.tokenizers.framed import FramedTokenizer, SiglipTokenizer
from vlp_jax.encoders.tokenizer_classes import CLASSES, GENERIC, of_vocabulary, vocabulary_of
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.interop.hf_tokenizer import CONFIG, TOKENIZER, TokenizerFiles
from vlp_jax.models.text import TextTransformer

CLIP_TOKENS = 49_408
TOKEN_NAMES = tuple(f"{x}_token" for x in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
Clean = Callable[[str], str]


def tokenizer_of_files(
    files: TokenizerFiles | None,
    text: TextTransformer,
    pad_id: int | None,
    where: str,
    notes: list[str],
) -> Any:
    """Builds the tokenizer of a foreign model `where`; notes differences from its library.

    Without files it is CLIP's published tokenizer, if the text tower has its vocabulary. `pad_id`
    is in the model's config, if any. Raises UserError if there are no usable files.
    """
    wrapped = None if files is None else files.open_clip
    options = dict((wrapped or {}).get("tokenizer_kwargs") or {})
    bare = files is None or not files.contents
    if bare and text.vocab_size != CLIP_TOKENS:
        raise UserError(
            f"{where} has no {TOKENIZER}: name a tokenizer of {text.vocab_size:,} tokens, a "
            "tokenizer.json or a SentencePiece .model"
        )
    strip = not bare and bool(options.pop("strip_sep_token", False))
    cleaning = options.pop("clean", "lower" if bare else "whitespace")
    if cleaning not in CLEANINGS:
        known = f"{where}: tokenizer_kwargs"
        raise UserError(unknown_key_message(str(cleaning), CLEANINGS, known))
    left = [f"{name} {value!r}" for name, value in options.items() if value]
    if left:
        notes.append(f"its tokenizer has {', '.join(left)} in open_clip, which is left out here")
    if bare:
        return ClipTokenizer.published(text.context_length, cleaning)
    if wrapped is not None and wrapped.get("tokenizer_mode"):
        raise UserError(
            f"{where}: text_cfg.tokenizer_mode {wrapped['tokenizer_mode']!r} frames texts in a "
            "way that cannot be read here: give a tokenizer"
        )
    clean = str if wrapped is None else CLEANINGS[cleaning]
    return _as_transformers(files, text, pad_id, strip, clean, where, notes)


def _as_transformers(
    files: TokenizerFiles,
    text: TextTransformer,
    pad_id: int | None,
    strip: bool,
    clean: Clean,
    where: str,
    notes: list[str],
) -> Any:
    """Builds the tokenizer that `AutoTokenizer.from_pretrained` returns."""
    config = _config(files, where)
    name = config.get("tokenizer_class") or files.kind
    name = None if name is None else str(name).removesuffix("Fast")
    limit = config.get("model_max_length")
    if isinstance(limit, int | float) and limit < text.context_length:
        notes.append(
            f"its tokenizer has model_max_length {limit}, to which transformers cuts and pads "
            f"unless it is told a length; here it is the model's {text.context_length}"
        )
    special = not config.get("split_special_tokens", False)
    if name == "SiglipTokenizer" and "spiece.model" in files.contents:
        return _siglip(files, config, text, clean, special, where)
    content, config = _as_class(name, _content(files, where, name), config, notes)
    _note_frame(content, config, notes)
    pad = config.get("pad_token") or (content.get("padding") or {}).get("pad_token")
    if pad is None:
        pad = text.pad_id if pad_id is None else pad_id
        notes.append(f"its tokenizer names no token for padding: id {pad} of the model's config")
    tokenizer = FramedTokenizer(
        json.dumps(content),
        text.context_length,
        pad,
        texts_may_hold_special_tokens=special,
        clean=clean,
        zeroed=vocabulary_of(content).get(config.get("sep_token")) if strip else None,
        **_sides(content, config, name in CLASSES and CLASSES[name].pads_left),
    )
    if tokenizer.pad_id >= text.vocab_size:
        raise UserError(
            f"{where}: its token for padding {pad!r} is none of the model's {text.vocab_size:,}"
        )
    return tokenizer


def _as_class(
    name: str | None, content: dict[str, Any], config: dict[str, Any], notes: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Changes a tokenizer.json and its config the way a class of transformers does."""
    known = CLASSES.get(name)
    if known is None and name not in GENERIC:
        why = "needs spiece.model" if name == "SiglipTokenizer" else "is not known here"
        notes.append(
            f"its tokenizer is of the class {name}, which {why}: texts become ids as its "
            f"{TOKENIZER} says"
        )
    if known is None:
        _add_tokens(content, config)
    else:
        config = {**known.tokens, **config}
        _add_tokens(content, config)
        before = content["normalizer"]
        known.change(content, config, vocabulary_of(content))
        after = content["normalizer"]
        if before is not None and after is not None and before != after:
            notes.append(
                f"its {TOKENIZER} normalizes texts in another way than the class {name} of "
                f"transformers 5, which is followed here"
            )
    if config.get("do_lower_case") and "owercase" not in json.dumps(content["normalizer"]):
        notes.append(
            f"do_lower_case is set, which {name or 'the class'} of transformers does not heed"
        )
    return content, config


def _config(files: TokenizerFiles, where: str) -> dict[str, Any]:
    """Reads tokenizer_config.json, and the special tokens that old folders have in other files."""
    config = _json(files, CONFIG, where)
    if "added_tokens_decoder" not in config:
        config |= _json(files, "special_tokens_map.json", where)
        added = _json(files, "added_tokens.json", where)
        config["added_tokens_decoder"] = {i: {"content": spelled} for spelled, i in added.items()}
    spelled = {name: _spelled(config[name]) for name in TOKEN_NAMES if config.get(name)}
    return {name: x for name, x in config.items() if x is not None} | spelled


def _json(files: TokenizerFiles, name: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(files.contents.get(name, b"{}"))
    except ValueError as error:
        raise UserError(f"{where}: {name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: {name} is not a mapping")
    return content


def _spelled(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _content(files: TokenizerFiles, where: str, name: str | None) -> dict[str, Any]:
    """Reads tokenizer.json, or makes its content from a vocabulary."""
    if TOKENIZER in files.contents:
        content = _json(files, TOKENIZER, where)
        if not isinstance(content.get("model"), dict):
            raise UserError(f"{where}: {TOKENIZER} has no model: it is not a tokenizer's file")
        return {"added_tokens": [], "normalizer": None, **content}
    content = of_vocabulary(files.contents) if name in CLASSES else None
    if content is None:
        there = ", ".join(sorted(files.contents))
        raise UserError(
            f"{where} has {there} and no {TOKENIZER}: make one with transformers, "
            'AutoTokenizer.from_pretrained("DIR").save_pretrained("DIR"), or name a SentencePiece '
            ".model or a tokenizer.json as tokenizer"
        )
    return content


def _siglip(
    files: TokenizerFiles,
    config: Mapping[str, Any],
    text: TextTransformer,
    clean: Clean,
    special_tokens: bool,
    where: str,
) -> SiglipTokenizer:
    special = {"eos": "</s>", "pad": "</s>", "unk": "<unk>"}
    special = {name: config.get(f"{name}_token", spelled) for name, spelled in special.items()}
    tokens = [*config["added_tokens_decoder"].values()]
    tokens += _json(files, TOKENIZER, where).get("added_tokens", [])
    added = {x["content"]: (bool(x.get("lstrip")), bool(x.get("rstrip"))) for x in tokens}
    # transformers' class lets its special tokens take the white space on both sides.
    added = dict.fromkeys(special.values(), (True, True)) | added
    try:
        return SiglipTokenizer(
            files.contents["spiece.model"],
            text.context_length,
            special,
            added,
            lowercase=bool(config.get("do_lower_case", True)),
            clean=clean,
            dummy_prefix=bool(config.get("legacy", True)),
            texts_may_hold_special_tokens=special_tokens,
            **_sides({}, config, False),
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _add_tokens(content: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Adds special tokens that are in a config and not in tokenizer.json."""
    there = {token["content"] for token in content["added_tokens"]}
    ids = vocabulary_of(content)
    wanted: dict[str, dict[str, Any]] = {}
    # By number: the keys are texts in JSON, where "10" would come before "9".
    decoder = sorted((int(i), token) for i, token in config["added_tokens_decoder"].items())
    for _, token in decoder:
        wanted.setdefault(token["content"], {"special": False, **token})
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = [config.get(name) for name in TOKEN_NAMES]
    for token in [*named, *(more.values() if isinstance(more, dict) else more)]:
        if token:
            wanted.setdefault(str(_spelled(token)), {"special": True})
    number = 1 + max(ids.values(), default=-1)
    for spelled, options in wanted.items():
        if spelled in there:
            continue
        if spelled not in ids:  # transformers numbers new tokens from the end of the vocabulary
            ids[spelled], number = number, number + 1
        special = bool(options["special"])
        flags = {name: bool(options.get(name)) for name in ("single_word", "lstrip", "rstrip")}
        flags["normalized"] = bool(options.get("normalized", not special))
        token = {"id": ids[spelled], "content": spelled, "special": special, **flags}
        content["added_tokens"].append(token)


def _sides(content: Mapping[str, Any], config: Mapping[str, Any], left: bool) -> dict[str, bool]:
    """Returns the side on which rows are padded, and the side on which long texts are truncated."""
    padding, truncation = content.get("padding") or {}, content.get("truncation") or {}
    pads = config.get("padding_side") or padding.get("direction") or ("left" if left else "right")
    cuts = config.get("truncation_side") or truncation.get("direction") or "right"
    return {"pads_left": pads.lower() == "left", "cuts_left": cuts.lower() == "left"}


def _note_frame(content: Mapping[str, Any], config: Mapping[str, Any], notes: list[str]) -> None:
    """Notes if a config and its tokenizer.json disagree about bos or eos around texts."""
    frame = json.dumps(content.get("post_processor"))
    for name in ("bos", "eos"):
        wanted, token = config.get(f"add_{name}_token"), config.get(f"{name}_token")
        if wanted is None or token is None:
            continue
        if bool(wanted) != (json.dumps(token) in frame):
            notes.append(
                f"add_{name}_token is {wanted}, which transformers 4 heeds for some classes and "
                f"transformers 5 does not: here it is as {TOKENIZER} says"
            )
