"""Computes the zero-shot accuracy of an export with the library it is for: a standalone program.

    python -I zero_shot.py FORMAT FOLDER DATA

DATA holds image files and task.json: {"images": [file, ...], "labels": [...], "prompts": [[prompts
of a class], ...]}. The library's own tokenizer and image processor are used. The program prints one
JSON object: {"library", "version", "top1", "examples"} or {"skipped": reason}. Importing vlp_jax is
an error here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

BATCH = 128


def sibling(name: str) -> Any:
    """Imports a module from this folder, which is not on the path; caches it."""
    key = f"sibling_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, Path(__file__).with_name(f"{name}.py"))
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


def batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yields items in groups of BATCH."""
    for first in range(0, len(items), BATCH):
        yield items[first : first + BATCH]


def by_transformers(folder: Path) -> tuple[Callable, Callable]:
    """Returns functions that embed pictures and texts as unit vectors, by transformers."""
    import torch

    sibling("check").patch_torchvision()
    import transformers

    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    blank = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}

    def embed(pictures: Any, texts: Any) -> Any:
        with torch.no_grad():
            return model(**processor(text=list(texts), images=list(pictures), **blank))

    from PIL import Image

    # The model takes images and texts in one call, so each call gets a stand-in of the other kind.
    empty = [Image.new("RGB", (64, 64))]
    return (
        lambda pictures: embed(pictures, [""]).image_embeds.numpy(),
        lambda texts: embed(empty, texts).text_embeds.numpy(),
    )


def by_open_clip(folder: Path) -> tuple[Callable, Callable]:
    """Returns functions that embed pictures and texts as unit vectors, by open_clip."""
    sibling("check").patch_torchvision()
    import open_clip
    import torch

    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model, tokenizer = model.eval(), open_clip.get_tokenizer(name)

    def images(pictures: Any) -> Any:
        with torch.no_grad():
            batch = torch.stack([transform(picture) for picture in pictures])
            return model.encode_image(batch, normalize=True).numpy()

    def texts(prompts: Any) -> Any:
        with torch.no_grad():
            return model.encode_text(tokenizer(list(prompts)), normalize=True).numpy()

    return images, texts


def by_jax(folder: Path) -> tuple[Callable, Callable]:
    """Returns functions that embed pictures and texts, by the run.py in the folder."""
    spec = importlib.util.spec_from_file_location("run", folder / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    model = run.Model(folder)
    return (
        lambda pictures: model("embed_image", model.pixels(pictures)),
        lambda prompts: model("embed_text", model.ids(prompts)),
    )


def by_tensorflow(folder: Path) -> tuple[Callable, Callable]:
    """Returns functions that embed pictures and texts, by a SavedModel.

    It has no processor: run_stablehlo.py makes pixels and ids by the same signature.json.
    """
    import tensorflow as tf

    model = tf.saved_model.load(str(folder))
    kind = sibling("run_stablehlo").Model
    run = kind.__new__(kind)  # without __init__, which loads programs: only preprocessing is used
    run.folder = folder
    run.signature = json.loads((folder / "signature.json").read_text(encoding="utf-8"))
    return (
        lambda pictures: model.embed_image(run.pixels(pictures)).numpy(),
        lambda prompts: model.embed_text(run.ids(prompts)).numpy(),
    )


# Format -> (modules that must be installed, distribution to report, function that loads).
LIBRARIES = {
    "hf": (("torch", "transformers"), "transformers", by_transformers),
    "open_clip": (("torch", "open_clip"), "open_clip_torch", by_open_clip),
    "stablehlo": (("jax", "tokenizers", "PIL"), "jax", by_jax),
    "saved_model": (("tensorflow", "tokenizers", "PIL"), "tensorflow", by_tensorflow),
}


def top1(embed_images: Callable, embed_texts: Callable, data: Path) -> tuple[float, int]:
    """Returns top-1 accuracy (a tie is a miss) and the number of images.

    The vector of a class is the normalized mean of the unit vectors of its prompts.
    """
    import numpy as np
    from PIL import Image

    task = json.loads((data / "task.json").read_text(encoding="utf-8"))
    prompts = [prompt for of_class in task["prompts"] for prompt in of_class]
    vectors = np.concatenate([embed_texts(batch) for batch in batches(prompts)])
    classes = vectors.reshape(len(task["prompts"]), -1, vectors.shape[-1]).mean(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    rows = []
    for names in batches(task["images"]):
        rows.append(embed_images([Image.open(data / name).convert("RGB") for name in names]))
    scores = np.concatenate(rows) @ classes.T
    right = np.take_along_axis(scores, np.asarray(task["labels"])[:, None], axis=1)
    hits = (scores >= right).sum(axis=1) == 1
    return float(hits.mean()), len(hits)


def main(format: str, folder: str, data: str) -> int:
    """Runs the program; see the module's docstring."""
    check = sibling("check")
    os.environ.update(check.QUIET)
    sys.meta_path.insert(0, check.NoVlpJax())
    modules, library, load = LIBRARIES[format]
    for name in modules:
        if importlib.util.find_spec(name) is None:
            print(json.dumps({"skipped": f"{name} is not installed"}))
            return 0
    accuracy, examples = top1(*load(Path(folder)), Path(data))
    if any(name.partition(".")[0] == "vlp_jax" for name in sys.modules):
        raise AssertionError("vlp_jax was imported")
    head = {"library": library, "version": check.version_of(library)}
    print(json.dumps({**head, "top1": accuracy, "examples": examples}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
