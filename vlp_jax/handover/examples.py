"""Python examples for model cards: load an exported folder, to be run inside the folder."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vlp_jax.interop.trees import Module, image_of

PICTURE = 'image = Image.new("RGB", ({width}, {height}), "red")  # or Image.open("FILE")'

STABLEHLO = """
from PIL import Image
from run import Model  # run.py in this folder

model = Model(".")
{picture}
features = model("embed_image", model.pixels([image]))
"""
TWO_TOWERS = {
    "hf": """
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")
{picture}
inputs = processor(
    text={texts}, images=[image], padding="max_length", truncation=True, return_tensors="pt"
)
print(model(**inputs).logits_per_image.softmax(dim=-1))
""",
    "open_clip": """
import open_clip
from PIL import Image

model, _, transform = open_clip.create_model_and_transforms("local-dir:.")
tokenizer = open_clip.get_tokenizer("local-dir:.")
{picture}
features = model.eval().encode_image(transform(image)[None], normalize=True)
texts = model.encode_text(tokenizer({texts}), normalize=True)
print(features @ texts.T)
""",
    "stablehlo": STABLEHLO
    + """texts = model("embed_text", model.ids({texts}))
print(features @ texts.T)
""",
    "saved_model": """
import json
import numpy as np
import tensorflow as tf
from PIL import Image
from tokenizers import Tokenizer

signature = json.load(open("signature.json"))
height, width = signature["preprocessing"]["size"]
length, pad = (signature["text"][name] for name in ("context_length", "pad_id"))
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.encode_special_tokens = True
tokenizer.enable_truncation(length)
tokenizer.enable_padding(length=length, pad_id=pad, pad_token=tokenizer.id_to_token(pad))

model = tf.saved_model.load(".")
{picture}
pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))[None]
ids = np.array([row.ids for row in tokenizer.encode_batch({texts})], np.int32)
print(model.embed_image(pixels) @ tf.transpose(model.embed_text(ids)))
""",
    "safetensors": """
from vlp_jax import interop

imported = interop.read("safetensors:.")
tree = {{"params": interop.to_tree(imported.module, imported.params)}}
# imported.module.apply(tree, images, method="embed_image"), and "embed_text" of ids
print(type(imported.module).__name__, sum(x.size for x in imported.params.values()))
""",
    "big_vision": """
import numpy as np

with np.load("model.npz") as arrays:
    print(len(arrays.files), "arrays, as big_vision's load_params takes them")
""",
}
IMAGES = {
    "hf": """
from PIL import Image
from transformers import AutoImageProcessor, {architecture}

model = {architecture}.from_pretrained("."{options})
processor = AutoImageProcessor.from_pretrained(".")
{picture}
outputs = model(**processor(images=[image], return_tensors="pt"))
print({output}.shape)
""",
    "timm": """
import timm
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{picture}
print(model(transform(image)[None]).shape)
""",
    "stablehlo": f"{STABLEHLO}print(features.shape)\n",
    "saved_model": """
import numpy as np
import tensorflow as tf
from PIL import Image

model = tf.saved_model.load(".")
{picture}
print(model.embed_image(np.asarray(image)[None]).shape)
""",
    "safetensors": TWO_TOWERS["safetensors"],
    "big_vision": TWO_TOWERS["big_vision"],
}
# Class of transformers -> arguments of `from_pretrained`, and the output to print.
HF_IMAGES = {
    "ViTMAEForPreTraining": {"options": "", "output": "outputs.logits"},
    "ViTModel": {"options": ", add_pooling_layer=False", "output": "outputs.last_hidden_state"},
}
TEXTS = ("a red circle", "a blue square")


def example(
    format: str, module: Module, architecture: str = "", texts: Sequence[str] = TEXTS
) -> str:
    """Returns Python code that loads the current folder and computes something.

    Args:
      architecture: the class of `transformers`, for its formats.
      texts: example texts, for a model with a text tower.
    """
    table = TWO_TOWERS if "text" in module.towers() else IMAGES
    height, width = image_of(module).image_size
    return (
        table[format.split("_")[0] if format.startswith("hf_") else format]
        .strip()
        .format(
            picture=PICTURE.format(height=height, width=width),
            texts=json.dumps(list(texts), ensure_ascii=False),
            architecture=architecture,
            **HF_IMAGES.get(architecture, {}),
        )
    )
