"""Reads and writes tokenizer files for `AutoTokenizer.from_pretrained`, which open_clip uses too.

Source: transformers, tokenization_utils_base.py and tokenization_utils_fast.py of 4.57, and
tokenization_utils_tokenizers.py of 5.24.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from vlp_jax.files import without_mark
from vlp_jax.interop import files

CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
# All files that a foreign tokenizer may consist of. The last three alone are no tokenizer.
NAMES = (
    *(TOKENIZER, "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
    *(CONFIG, "special_tokens_map.json", "added_tokens.json"),
)


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """The files of a tokenizer.

    Attributes:
      contents: file name -> content; empty if the library contains the tokenizer itself.
      kind: the class that `AutoTokenizer` takes if `contents` names none.
      open_clip: for a tokenizer that open_clip wraps, `tokenizer_kwargs` and `tokenizer_mode` of
        the model's `text_cfg`; else None.
    """

    contents: Mapping[str, bytes]
    kind: str | None = None
    open_clip: Mapping[str, Any] | None = None

    @classmethod
    def from_json(
        cls,
        tokenizer_json: str,
        *,
        bos_id: int | None,
        eos_id: int,
        pad_id: int,
        context_length: int,
    ) -> Self:
        """Makes the files for a tokenizer.json that adds bos and eos to texts itself."""
        content = json.loads(tokenizer_json)
        names = {token["id"]: token["content"] for token in content["added_tokens"]}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": names[eos_id],
            "pad_token": names[pad_id],
            # Where nothing is unknown, as with bytes, it is never used; CLIP names its end of text
            # too.
            "unk_token": _unknown(content["model"]) or names[eos_id],
            "model_max_length": context_length,
            "padding_side": "right",
            "truncation_side": "right",
            "split_special_tokens": True,  # a text that spells a special token is a text
            "clean_up_tokenization_spaces": False,
        }
        if bos_id is not None:
            config["bos_token"] = names[bos_id]
        return cls({TOKENIZER: tokenizer_json.encode(), CONFIG: json.dumps(config).encode()})

    @classmethod
    def from_folder(cls, directory: Path, **fields: Any) -> Self | None:
        """Reads the files of a directory; None if it has no tokenizer. `fields` are attributes."""
        paths = [directory / name for name in NAMES if (directory / name).is_file()]
        contents = {path.name: without_mark(path.read_bytes(), str(path)) for path in paths}
        return cls(contents, **fields) if contents.keys() - {*NAMES[-3:]} else None


def _unknown(model: Mapping[str, Any]) -> str | None:
    """Returns the token for unknown text; None if there is none, as with CLIP's bytes."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def write(tokenizer: TokenizerFiles | None, directory: Path, inputs: Sequence[str]) -> list[Path]:
    """Writes the files of a tokenizer, if any; the model takes `inputs` of its outputs."""
    if tokenizer is None or not tokenizer.contents:
        return []
    config = json.loads(tokenizer.contents.get(CONFIG, b"{}"))
    config["model_input_names"] = list(inputs)
    contents = {**tokenizer.contents, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
    return [files.save_bytes(content, directory / name) for name, content in contents.items()]
