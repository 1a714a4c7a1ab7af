"""Writes compiled forms of a model, which run without its code: StableHLO and SavedModel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.handover import functions, saved_model, stablehlo
from vlp_jax.handover.functions import Function
from vlp_jax.interop import check_params, files, hf_tokenizer, precision
from vlp_jax.interop.base import Extras, image_of
from vlp_jax.interop.trees import Module, Params

ARTIFACTS: dict[str, Callable[[list[Function], dict[str, Any], Path], list[Path]]] = {
    "saved_model": saved_model.write,
    "stablehlo": stablehlo.write,
}
LOADED_BY = {
    "saved_model": 'tensorflow.saved_model.load("{}")',
    "stablehlo": "python {}/run.py --help",
}
KINDS = functions.KINDS
HOLDS = precision.WEIGHTS
SIGNATURE = "signature.json"
TOKENIZER_GIVES = ("input_ids",)


def write(
    format: str, module: Module, params: Params, directory: Path, dtype: str, **extras: Any
) -> list[Path]:
    """Writes one of `ARTIFACTS`, with signature.json and the tokenizer beside it.

    Args:
      module, params: a model and all its parameters.
      directory: an existing folder.
      dtype: dtype of the matrix products, one of `functions.DTYPES`.
      extras: fields of `vlp_jax.interop.Extras`.

    Raises:
      UserError: a required library is not installed.
    """
    check_params(module, params)
    given = Extras(**extras)
    offered = functions.artifact_functions(module, params, given, dtype)
    signature = signature_of(module, params, offered, given, dtype)
    written = ARTIFACTS[format](offered, signature, directory)
    return [
        *written,
        files.save_json(signature, directory / SIGNATURE),
        *hf_tokenizer.write(given.tokenizer, directory, TOKENIZER_GIVES),
    ]


def signature_of(
    module: Module, params: Params, offered: list[Function], extras: Extras, dtype: str
) -> dict[str, Any]:
    """Describes the functions and their inputs as JSON, for users; writers add their own keys."""
    pixels = extras.pixels_of(module)
    signature: dict[str, Any] = {
        "functions": {
            function.name: {
                "inputs": [
                    {
                        "name": x.name,
                        "shape": ["batch", *x.shape],
                        "dtype": x.dtype,
                        "meaning": x.meaning,
                    }
                    for x in function.inputs
                ],
                "output": {"dtype": "float32", "meaning": function.output},
                "weights": sorted(function.weights),
            }
            for function in offered
        },
        "weights": extras.weights,
        "computes_in": dtype,
        "preprocessing": {
            "size": list(image_of(module).image_size),
            "resize": extras.resize,
            "interpolation": extras.interpolation,
            "normalization": {"inside": True, "mean": list(pixels.mean), "std": list(pixels.std)},
        },
    }
    if "text" in module.towers():
        ids = {name: getattr(extras, name) for name in ("bos_id", "eos_id", "pad_id")}
        pad = module.text.pad_id if ids["pad_id"] is None else ids["pad_id"]
        bias = float(params.get("logit_bias", 0.0))
        signature["text"] = {
            **ids,
            "pad_id": pad,
            "context_length": module.text.context_length,
        }
        # The logit of a pair is logit_scale * cosine + logit_bias.
        signature["logit_scale"] = float(np.exp(params["logit_scale"]))
        signature["logit_bias"] = bias
    return signature
