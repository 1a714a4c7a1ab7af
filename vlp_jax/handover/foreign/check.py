"""Loads an export with the library it is for, and computes: a standalone program.

    python -I check.py LIBRARY FOLDER INPUTS.npz OUTPUTS.npz
    python -I check.py --zero-shot LIBRARY FOLDER DATA

The first form computes the outputs of a batch. The second computes the top-1 accuracy of zero-shot
classification with the library's own tokenizer and image processor; DATA holds image files and
task.json: {"images": [file, ...], "labels": [...], "prompts": [[prompts of a class], ...]}.

LIBRARY is a key of `LIBRARIES`. The program prints one JSON object: {"library", "version"}, with
"top1" and "examples" in the second form, or {"skipped": reason}. Importing vlp_jax is an error
here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
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
BATCH = 128  # images or texts that are classified at a time
Arrays = dict[str, Any]
Embedders = tuple[Callable[[Any], Any], Callable[[Any], Any]]  # of images, of texts


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
    model, loading = getattr(transformers, name).from_pretrained(
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
        tokens = model(x).last_hidden_state  # the first is a class token
        pooled = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(dim=1)}
        return {"features": pooled.get(str(inputs["pooling"]), tokens)}
    out = model(pixel_values=x, input_ids=torch.from_numpy(inputs["text"]).long())
    return {"image": out.image_embeds, "text": out.text_embeds, "logits": out.logits_per_image}


def by_transformers(folder: Path) -> Embedders:
    """Returns functions that embed pictures and texts as unit vectors, by `transformers`."""
    import torch

    patch_torchvision()
    import transformers
    from PIL import Image

    torch.set_grad_enabled(False)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)

    def embed(pictures: Any, texts: Any) -> Any:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return model(**processor(text=list(texts), images=list(pictures), **options))

    # The model takes images and texts in one call, so each call gets a stand-in of the other kind.
    empty = [Image.new("RGB", (64, 64))]
    return (
        lambda pictures: embed(pictures, [""]).image_embeds,
        lambda texts: embed(empty, texts).text_embeds,
    )


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


def by_open_clip(folder: Path) -> Embedders:
    """Returns functions that embed pictures and texts as unit vectors, by `open_clip`."""
    import torch

    patch_torchvision()
    import open_clip

    torch.set_grad_enabled(False)
    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model, tokenizer = model.eval(), open_clip.get_tokenizer(name)
    return (
        lambda x: model.encode_image(torch.stack([*map(transform, x)]), normalize=True),
        lambda prompts: model.encode_text(tokenizer(list(prompts)), normalize=True),
    )


def with_timm(folder: Path, inputs: Arrays) -> Arrays:
    """Computes outputs with `timm`."""
    import torch

    patch_torchvision()
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.from_numpy(inputs["pixels"])
    whole = str(inputs["pooling"]) == "none"
    return {"features": model.forward_features(x) if whole else model(x)}


def program_at(path: Path) -> Any:
    """Imports a file that is on no path."""
    spec = importlib.util.spec_from_file_location("run", path)
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    return run


def with_jax(folder: Path, inputs: Arrays) -> Arrays:
    """Computes outputs with the StableHLO programs of a folder, through its run.py."""
    model = program_at(folder / "run.py").Model(folder)
    outputs = {}
    for name, function in model.signature["functions"].items():
        arrays = [inputs[x["name"]] for x in function["inputs"]]
        outputs[name] = model(name, *arrays)
        single = model(name, *(array[:1] for array in arrays))  # another batch size, same program
        if single.shape[1:] != outputs[name].shape[1:] or len(single) != 1:
            raise ValueError(f"{name} does not take a batch of one")
    return outputs


def by_jax(folder: Path) -> Embedders:
    """Returns functions that embed pictures and texts, by the run.py in the folder."""
    model = program_at(folder / "run.py").Model(folder)
    return (
        lambda pictures: model("embed_image", model.pixels(pictures)),
        lambda prompts: model("embed_text", model.ids(prompts)),
    )


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


def by_tensorflow(folder: Path) -> Embedders:
    """Returns functions that embed pictures and texts, by a SavedModel.

    It has no processor: run_stablehlo.py makes pixels and ids by the same signature.json.
    """
    import tensorflow as tf

    model = tf.saved_model.load(str(folder))
    kind = program_at(Path(__file__).with_name("run_stablehlo.py")).Model
    run = kind.__new__(kind)  # without __init__, which loads programs: only preprocessing is used
    run.folder = folder
    run.signature = json.loads((folder / "signature.json").read_text(encoding="utf-8"))
    return (
        lambda pictures: model.embed_image(run.pixels(pictures)).numpy(),
        lambda prompts: model.embed_text(run.ids(prompts)).numpy(),
    )


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


# Distribution -> (modules that must be installed, the function that computes, the function that
# returns `Embedders`).
LIBRARIES: dict[str, tuple[Any, ...]] = {
    "transformers": (("torch", "transformers"), with_transformers, by_transformers),
    "open_clip_torch": (("torch", "open_clip"), with_open_clip, by_open_clip),
    "timm": (("torch", "timm"), with_timm, None),
    "jax": (("jax",), with_jax, by_jax),
    "tensorflow": (("tensorflow",), with_tensorflow, by_tensorflow),
    "safetensors": (("safetensors",), with_safetensors, None),
}


def as_array(x: Any) -> Any:
    """Converts a library's tensor to a NumPy array."""
    return x.detach().numpy() if hasattr(x, "detach") else x


def batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yields items in groups of BATCH."""
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def top1(embed_images: Callable, embed_texts: Callable, data: Path) -> dict[str, Any]:
    """Returns top-1 accuracy (a tie is a miss) and the number of images.

    The vector of a class is the normalized mean of the unit vectors of its prompts.
    """
    import numpy as np
    from PIL import Image

    task = json.loads((data / "task.json").read_text(encoding="utf-8"))
    prompts = [prompt for of_class in task["prompts"] for prompt in of_class]
    vectors = np.concatenate([as_array(embed_texts(batch)) for batch in batches(prompts)])
    classes = vectors.reshape(len(task["prompts"]), -1, vectors.shape[-1]).mean(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    rows = []
    for names in batches(task["images"]):
        pictures = [Image.open(data / name).convert("RGB") for name in names]
        rows.append(as_array(embed_images(pictures)))
    scores = np.concatenate(rows) @ classes.T
    right = np.take_along_axis(scores, np.asarray(task["labels"])[:, None], axis=1)
    hits = (scores >= right).sum(axis=1) == 1
    return {"top1": float(hits.mean()), "examples": len(hits)}


def main(*arguments: str) -> int:
    """Runs the program; see the module's docstring."""
    # Before the libraries are imported, which read these then.
    os.environ.update(QUIET)
    sys.meta_path.insert(0, NoVlpJax())
    zero_shot = arguments[0] == "--zero-shot"
    library, folder, *paths = arguments[zero_shot:]
    modules, compute, embedders = LIBRARIES[library]
    for name in (*modules, *(("tokenizers", "PIL") if zero_shot else ())):
        if importlib.util.find_spec(name) is None:
            print(json.dumps({"skipped": f"{name} is not installed"}))
            return 0
    import numpy as np

    scores: dict[str, Any] = {}
    if zero_shot:
        scores = top1(*embedders(Path(folder)), Path(paths[0]))
    else:
        with np.load(paths[0], allow_pickle=False) as arrays:
            results = compute(Path(folder), dict(arrays))
        np.savez(paths[1], **{name: as_array(x) for name, x in results.items()})
    if any(name.partition(".")[0] == "vlp_jax" for name in sys.modules):
        raise AssertionError("vlp_jax was imported")
    if library == "tensorflow":  # distributed as tensorflow, tensorflow-cpu and others
        version = importlib.import_module("tensorflow").__version__
    else:
        version = importlib.metadata.version(library)
    print(json.dumps({"library": library, "version": version, **scores}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
