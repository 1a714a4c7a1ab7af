"""Makes the `Setup` of a run from its config alone, for tools that compile and never run."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax.data.pipeline import BatchSpec
from vlp_jax.data.tokenizers import KEYS, TOKENIZERS, ByteTokenizer
from vlp_jax.data.tokenizers.base import BOS_ID, EOS_ID, PAD_ID, check_context_length
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.objectives import Objective, make_objective
from vlp_jax.objectives.base import SEPARATOR
from vlp_jax.training.setup import Setup, make_setup

# Vocabulary sizes of tokenizers that need no file from the user. 49,408 is from openai/CLIP,
# clip/simple_tokenizer.py.
KNOWN_VOCABULARIES = {"bytes": ByteTokenizer.vocab_size, "clip": 49_408}


@dataclasses.dataclass(frozen=True)
class TokenizerSizes:
    """The sizes and ids that a model reads from a tokenizer. It cannot tokenize."""

    vocab_size: int
    context_length: int
    pad_id: int = PAD_ID
    eos_id: int = EOS_ID
    bos_id: int = BOS_ID


def abstract_setup(config: ConfigDict, mesh: Mesh, epoch_examples: int | None = None) -> Setup:
    """Makes the `Setup` of the run that `config` describes, without data, tokenizer or devices.

    Images get the size that the model takes. Batches hold only the fields that the model reads, and
    the vocabulary may be larger than the real one (see `tokenizer_sizes`). A compute dtype that the
    config leaves open follows the devices of the mesh: bfloat16 on accelerators, float32 on CPU.

    Args:
      mesh: its devices may come from `jax.experimental.topologies`.
      epoch_examples: examples of the training set, for durations in epochs.

    Raises:
      UserError: the config does not fit the mesh or itself, or the size of the vocabulary or of an
        epoch is unknown.
    """
    config = config.copy_and_resolve_references()
    set_dtypes(config, "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16")
    tokenizer = tokenizer_sizes(config.tokenizer)
    objective = make_objective(config.objective, tokenizer)
    spec = batch_spec(config, objective)
    return make_setup(config, mesh, tokenizer, spec, epoch_examples)


def tokenizer_sizes(section: ConfigDict) -> TokenizerSizes | None:
    """Makes a stand-in for the tokenizer of `config.tokenizer`, without its file; None for {}.

    Raises:
      UserError: an unknown tokenizer or key, or a vocabulary of unknown size.
    """
    if not section:
        return None
    for key in section:
        if key not in KEYS:
            raise UserError(unknown_key_message(key, KEYS, "tokenizer"))
    name = section.get("name")
    if name not in TOKENIZERS:
        raise UserError(unknown_key_message(str(name), TOKENIZERS, "tokenizer.name"))
    vocab_size = section.get("vocab_size")
    if section.get("file") is None:
        vocab_size = KNOWN_VOCABULARIES.get(name, vocab_size)
    if vocab_size is None:
        raise UserError(
            f"the vocabulary of the {name} tokenizer is not known without its file; set "
            "--config.tokenizer.vocab_size, the number of its tokens"
        )
    return TokenizerSizes(vocab_size, check_context_length(section.get("context_length")))


def batch_spec(config: ConfigDict, objective: Objective) -> BatchSpec:
    """Returns shape and dtype of the fields of a global batch that the objective reads."""
    return {
        name: ((config.batch_size, *field.shape), np.dtype(field.dtype))
        for name, field in objective.reads.items()
        if SEPARATOR not in name or name.partition(SEPARATOR)[0] in config.extra_data
    }


def set_dtypes(config: ConfigDict, dtype: str) -> None:
    """Sets `dtype` for the objective, or each of its parts, unless the config sets it."""
    with config.unlocked():
        parts = config.objective.get("parts")
        for section in [config.objective] if parts is None else parts.values():
            if section.get("dtype") is None:
                section.dtype = dtype
