"""Embeds images and texts with the programs in this folder: python run.py a.png "a red circle"

It needs only jax, numpy, pillow and tokenizers. Arguments that are files are images, all others are
texts. It prints cosine similarities. To use it as a module: `Model(folder)`.
"""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax import export
from PIL import Image, ImageOps

DTYPES = {"F32": "float32", "BF16": jax.numpy.bfloat16, "I8": "int8"}
MAX_PIXELS = 2**26  # of an image whose shorter side has been resized


class Model:
    """The programs of a folder and their weights. It takes Pillow images and strings."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.signature = json.loads((self.folder / "signature.json").read_text(encoding="utf-8"))
        raw = (self.folder / "weights.safetensors").read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")  # safetensors: length, JSON, then bytes
        header, self.weights = json.loads(raw[8:start]), {}
        for name in self.signature["arrays"]:
            (begin, end), dtype = header[name]["data_offsets"], DTYPES[header[name]["dtype"]]
            array = np.frombuffer(raw[start + begin : start + end], dtype)
            self.weights[name] = array.reshape(header[name]["shape"])

    def __call__(self, function, *inputs):
        said = self.signature["functions"][function]
        # jax.export takes a bytearray, not bytes.
        program = export.deserialize(bytearray((self.folder / said["program"]).read_bytes()))
        weights = {name: self.weights[name] for name in said["weights"]}
        return np.asarray(jax.jit(program.call)(weights, *inputs))

    def pixels(self, images):
        said = self.signature["preprocessing"]
        (height, width), method = said["size"], Image.Resampling[said["interpolation"].upper()]
        rows = []
        for image in images:
            image = rgb(image)
            if said["resize"] == "crop":
                short, side = min(image.size), min(height, width)
                size = (image.width * side // short, image.height * side // short)
                if size[0] * size[1] > MAX_PIXELS:
                    raise ValueError(f"an image of {image.size} pixels is too long: crop it first")
                image = image.resize(size, method) if size != image.size else image
                # Python rounds halves to even, as torchvision's center crop does.
                left, top = round((image.width - width) / 2), round((image.height - height) / 2)
                image = image.crop((left, top, left + width, top + height))
            image = image.resize((width, height), method)  # nothing if it has that size
            rows.append(np.asarray(image, np.uint8))
        return np.stack(rows)

    def ids(self, texts):
        from tokenizers import Tokenizer

        tokenizer, said = Tokenizer.from_file(str(self.folder / "tokenizer.json")), self.signature
        length, pad = said["text"]["context_length"], said["text"]["pad_id"]
        tokenizer.encode_special_tokens = True  # a text that spells a special token is a text
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=pad, pad_token=tokenizer.id_to_token(pad))
        return np.array([row.ids for row in tokenizer.encode_batch(list(texts))], np.int32)


def rgb(image):
    """Converts an image to RGB as in training: upright, on white, the upper 8 of 16 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        shades = np.clip(np.asarray(image, np.int64), 0, 65535) >> 8
        image = Image.fromarray(shades.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def main(arguments):
    """Runs the command; see the module's docstring."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    model = Model(Path(__file__).resolve().parent)
    paths = [x for x in arguments if os.path.isfile(x)]
    texts = [x for x in arguments if x not in paths]
    if not paths or ("embed_text" in model.signature["functions"]) != bool(texts):
        sys.exit(f"error: give images and, if the model has them, texts: {arguments}")
    images = model("embed_image", model.pixels([Image.open(path) for path in paths]))
    others = model("embed_text", model.ids(texts)) if texts else images
    for path, row in zip(paths, images @ others.T):
        for name, similarity in zip(texts or paths, row):
            print(f"{similarity:8.4f}  {path}  {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
