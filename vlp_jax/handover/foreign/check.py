"""Loads an export with the library it is for, and computes outputs: a standalone program.

    python -I check.py LIBRARY FOLDER INPUTS.npz OUTPUTS.npz

LIBRARY is a key of `LIBRARIES`. The program prints one JSON object: {"library", "version"} or
{"skipped": reason}. Importing vlp_jax is an error here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

# No progress bars and notices, which would mix with this program's output. No network access.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
}
Arrays = dict[str, Any]


class NoVlpJax:
    """An import hook that refuses vlp_jax, even if it is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "vlp_jax":
            raise ImportError("this program does without vlp_jax")


def patch_torchvision() -> None:
    """Defines two operators that torchvision fails to find with a mismatched build of PyTorch.

    transformers, open_clip and timm import torchvision, but nothing here runs its operators.
    """
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        try:
            torch._C._get_schema(f"torchvision::{schema.split('(')[0]}", "")
        except RuntimeError:
            library.define(schema)
    patch_torchvision.kept = library  # PyTorch removes the operators when the object is collected


def with_transformers(folder: Path, inputs: Arrays) -> Arrays:
    """Computes outputs with `transformers`, in float32."""
    import torch

    patch_torchvision()
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config["architectures"][0]
    # transformers adds a pooler by default, for which the export has no weights.
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    kind = getattr(transformers, name)
    model, loading = kind.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[what]:
            raise ValueError(f"{what}: {sorted(map(str, loading[what]))[:4]}")
    model.eval()
    x = torch.from_numpy(inputs["pixels"])
    if name == "ViTMAEForPreTraining":
        return {"prediction": model(x, noise=torch.from_numpy(inputs["noise"])).logits}
    if name == "ViTModel":
        return {"features": pooled(model(x).last_hidden_state, str(inputs["pooling"]))}
    out = model(pixel_values=x, input_ids=torch.from_numpy(inputs["text"]).long())
    return {"image": out.image_embeds, "text": out.text_embeds, "logits": out.logits_per_image}


def pooled(tokens: Any, pooling: str) -> Any:
    """Pools tokens, of which the first is a class token, as our tower does."""
    if pooling == "cls":
        return tokens[:, 0]
    return tokens[:, 1:].mean(dim=1) if pooling == "mean" else tokens


def with_open_clip(folder: Path, inputs: Arrays) -> Arrays:
    """Computes outputs with `open_clip`."""
    import torch

    patch_torchvision()
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}").eval()
    out = model(torch.from_numpy(inputs["pixels"]), torch.from_numpy(inputs["text"]).long())
    scores = {}
    if isinstance(out, dict):  # a CoCa
        scores = {"scores": out["logits"]}
        names = ("image_features", "text_features", "logit_scale", "logit_bias")
        out = [out[name] for name in names if name in out]
    image, text, scale, *bias = out
    logits = scale * image @ text.T + (bias[0] if bias else 0.0)
    return {"image": image, "text": text, "logits": logits, **scores}


def with_timm(folder: Path, inputs: Arrays) -> Arrays:
    """Computes outputs with `timm`."""
    import torch

    patch_torchvision()
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.from_numpy(inputs["pixels"])
    whole = str(inputs["pooling"]) == "none"
    return {"features": model.forward_features(x) if whole else model(x)}


def with_jax(folder: Path, inputs: Arrays) -> Arrays:
    """Computes outputs with the StableHLO programs of a folder, through its run.py."""
    spec = importlib.util.spec_from_file_location("run", folder / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    model = run.Model(folder)
    outputs = {}
    for name, function in model.signature["functions"].items():
        arrays = [inputs[x["name"]] for x in function["inputs"]]
        outputs[name] = model(name, *arrays)
        single = model(name, *(array[:1] for array in arrays))  # another batch size, same program
        if single.shape[1:] != outputs[name].shape[1:] or len(single) != 1:
            raise ValueError(f"{name} does not take a batch of one")
    return outputs


def with_tensorflow(folder: Path, inputs: Arrays) -> Arrays:
    """Computes outputs with the signatures of a SavedModel."""
    import tensorflow as tf

    model = tf.saved_model.load(str(folder))
    signature = json.loads((folder / "signature.json").read_text(encoding="utf-8"))
    outputs = {}
    for name, function in signature["functions"].items():
        arrays = {x["name"]: tf.constant(inputs[x["name"]]) for x in function["inputs"]}
        (outputs[name],) = (x.numpy() for x in model.signatures[name](**arrays).values())
    return outputs


def with_safetensors(folder: Path, inputs: Arrays) -> Arrays:
    """Reads the arrays of our own format as float32, without a model to run."""
    import numpy as np
    import safetensors

    arrays = {}
    for name, entry in safetensors.deserialize((folder / "model.safetensors").read_bytes()):
        raw, kind = bytes(entry["data"]), entry["dtype"]
        if kind == "BF16":  # unknown to NumPy; it is the upper half of a float32
            x = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            x = np.frombuffer(raw, {"F32": "<f4", "I8": "i1"}[kind])
        arrays[name] = x.reshape(entry["shape"])
    return {
        name: x.astype(np.float32) * arrays.get(f"{name}.scale", np.float32(1))
        for name, x in arrays.items()
        if not name.endswith(".scale")
    }


# Distribution -> (the function that computes, modules that must be installed).
LIBRARIES = {
    "transformers": (with_transformers, ("torch", "transformers")),
    "open_clip_torch": (with_open_clip, ("torch", "open_clip")),
    "timm": (with_timm, ("torch", "timm")),
    "jax": (with_jax, ("jax",)),
    "tensorflow": (with_tensorflow, ("tensorflow",)),
    "safetensors": (with_safetensors, ("safetensors",)),
}


def main(library: str, folder: str, inputs: str, outputs: str) -> int:
    """Runs the program; see the module's docstring."""
    # Before the libraries are imported, which read these then.
    os.environ.update(QUIET)
    sys.meta_path.insert(0, NoVlpJax())
    compute, modules = LIBRARIES[library]
    for name in modules:
        if importlib.util.find_spec(name) is None:
            print(json.dumps({"skipped": f"{name} is not installed"}))
            return 0
    import numpy as np

    with np.load(inputs, allow_pickle=False) as arrays:
        results = compute(Path(folder), {name: arrays[name] for name in arrays.files})
    tensors = {name: x for name, x in results.items() if hasattr(x, "detach")}
    np.savez(outputs, **results | {name: x.detach().numpy() for name, x in tensors.items()})
    if any(name.partition(".")[0] == "vlp_jax" for name in sys.modules):
        raise AssertionError("vlp_jax was imported")
    print(json.dumps({"library": library, "version": version_of(library)}))
    return 0


def version_of(library: str) -> str:
    """Returns the version of a distribution."""
    if library == "tensorflow":  # distributed as tensorflow, tensorflow-cpu and others
        return importlib.import_module("tensorflow").__version__
    return importlib.metadata.version(library)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
