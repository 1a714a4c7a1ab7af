"""The image processor of Hugging Face `transformers`: preprocessor_config.json.

Source: transformers 5.24, image_processing_backends.py (`TorchvisionBackend`, `PilBackend`),
image_processing_utils.py (`get_size_dict`) and models/auto/image_processing_auto.py. All classes in
`DEFAULTS` take the same steps: resize, center crop, rescale, normalize. They differ in the defaults
of keys that a file lacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError
from vlp_jax.interop import base, files
from vlp_jax.interop.base import Extras
from vlp_jax.interop.trees import Module
from vlp_jax.models.values import Pixels

FILE, NESTED = "preprocessor_config.json", "processor_config.json"

# Image processors give PIL's resampling method by its number.
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}

_OF_ALL = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": base.HALF,
    "image_std": base.HALF,
    "size": {"height": 224, "width": 224},
    "crop_size": {"height": 224, "width": 224},
    "resample": RESAMPLING["bicubic"],
    "default_to_square": True,
}
_OPENAI = {"image_mean": base.OPENAI_MEAN, "image_std": base.OPENAI_STD}
_CLIP = {
    **_OF_ALL,
    **_OPENAI,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "default_to_square": False,
}
# Class without "ImageProcessor" -> its defaults. ViTHybrid exists in transformers 4 alone.
DEFAULTS: dict[str, dict[str, Any]] = {
    "Bit": _CLIP,
    "Blip": {**_OF_ALL, **_OPENAI, "size": {"height": 384, "width": 384}},
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "DeiT": {**_OF_ALL, "size": {"height": 256, "width": 256}, "do_center_crop": True},
    "Siglip": {**_OF_ALL, "default_to_square": False},
    "ViT": {**_OF_ALL, "resample": RESAMPLING["bilinear"]},
    "ViTHybrid": _CLIP,
}
# Steps that are handled here, and steps without effect on an RGB image of the model's size.
_STEPS = {name for name in _OF_ALL if name.startswith("do_")} | {"do_convert_rgb", "do_pad"}


def read(
    directory: Path,
    kind: str,
    size: tuple[int, int],
    like: Module | None,
    notes: list[str],
    **without: tuple[float, ...],
) -> dict[str, Any]:
    """Reads a folder's image processor as fields of `Extras`; notes steps that cannot be done here.

    A file without a class is of the class `kind`. Without a file the normalization is in `like`,
    else in `without`, else the default of the class. Raises UserError for invalid values.
    """
    # As in transformers, a section of processor_config.json precedes preprocessor_config.json.
    config = files.load_json_if_there(directory / NESTED).get("image_processor")
    nested = isinstance(config, dict) and bool(config)
    file = directory / (NESTED if nested else FILE)
    config = config if nested else files.load_json_if_there(file)
    if not config:
        settings = {**DEFAULTS[kind], **without}
        default = Pixels(tuple(settings["image_mean"]), tuple(settings["image_std"]))
        pixels = getattr(like, "pixels", default)
        normal = {"image_mean": pixels.mean, "image_std": pixels.std}
        # The class's default sizes are another model's: this model's own size takes their place.
        cut = settings["do_center_crop"]
        settings["size"] = {"shortest_edge": min(size)} if cut else list(size)
        settings["crop_size"] = list(size)
        notes.append(
            f"{directory} has no image processor: image_mean {normal['image_mean']}, image_std "
            f"{normal['image_std']}, resized as by a {kind}ImageProcessor"
        )
    else:
        # A null means the default, but turns off `do_...`.
        set_keys = {
            name: config[name]
            for name in _OF_ALL.keys() & config.keys()
            if config[name] is not None or name.startswith("do_")
        }
        settings = {**_defaults(config, kind, notes), **set_keys}
        normal = _normalization(settings, file)
        _note_unknown_steps(config, size, notes)
    names = {number: name for name, number in RESAMPLING.items()}
    if settings["resample"] not in names:
        raise UserError(
            f"{file}: resample is {settings['resample']!r}, not one of PIL's methods 0 to 5"
        )
    interpolation, geometry = names[settings["resample"]], _geometry(settings, size, file, notes)
    return {**normal, "interpolation": interpolation, **geometry, "crop_rounding": "down"}


def normalization(extras: Mapping[str, Any]) -> Pixels:
    """Selects from the result of `read` the normalization, which a module holds itself."""
    return Pixels(extras["image_mean"], extras["image_std"])


def write(module: Module, directory: Path, extras: Extras, kind: str) -> Path:
    """Writes preprocessor_config.json.

    Args:
      kind: a key of `DEFAULTS`, the class without a crop; with a crop it is CLIP's.
    """
    pixels = extras.pixels_of(module)
    height, width = base.image_of(module).image_size
    size = crop_size = {"height": height, "width": width}
    crop = extras.resize == "crop" or extras.scale is not None
    kind = "CLIP" if crop else kind
    if extras.resize == "crop":
        shortest = min(height, width) if extras.scale is None else extras.scale
        size = {"shortest_edge": shortest}
    elif crop:
        size = dict(zip(("height", "width"), extras.scale, strict=True))
    config: dict[str, Any] = {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": RESAMPLING[extras.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        **({"do_center_crop": crop} if kind == "CLIP" else {}),  # its default is to crop
        **({"crop_size": crop_size} if crop else {}),
    }
    return files.save_json(config, directory / FILE)


def problems(model: str, extras: Extras) -> list[str]:
    """Returns a line if the resize cannot be expressed."""
    if extras.resize == "crop" and isinstance(extras.scale, tuple):
        height, width = extras.scale
        return [
            f"{model}'s image processor scales the shorter side to a length, not an image until it "
            f"covers {height} x {width}: give --resize"
        ]
    return []


def _defaults(config: Mapping[str, Any], kind: str, notes: list[str]) -> dict[str, Any]:
    old = str(config.get("feature_extractor_type") or "").replace("FeatureExtractor", "")
    name = str(config.get("image_processor_type") or old or kind)
    for ending in ("Fast", "Pil", "ImageProcessor"):
        name = name.removesuffix(ending)
    if name not in DEFAULTS:
        notes.append(
            f"its image processor {name}ImageProcessor is not known here: images are prepared as a "
            f"{kind}ImageProcessor with the same settings does it"
        )
    return DEFAULTS.get(name, DEFAULTS[kind])


def _note_unknown_steps(config: Mapping[str, Any], size: tuple[int, int], notes: list[str]) -> None:
    unknown = [key for key in config if config[key] and key.startswith(("do_", "use_square"))]
    unknown = sorted(set(unknown) - _STEPS)
    if unknown:
        notes.append(f"its image processor has {', '.join(unknown)}, which is left out here")
    pad = config.get("pad_size")
    if config.get("do_pad") and pad is not None and _pair(pad) != size:
        notes.append(f"its image processor pads images to {pad}, which is left out here")


def _normalization(settings: Mapping[str, Any], file: Path) -> dict[str, tuple[float, ...]]:
    """Computes `image_mean` and `image_std` for pixels in [0, 1].

    transformers computes (x * factor - mean) / std for x in [0, 255], with any factor.

    Raises:
      UserError: mean or std is neither one number nor three, or std is zero.
    """
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
        raise UserError(f"{file}: rescale_factor is {factor!r}, not a number above 0")
    # (255 f x' - mean) / std = (x' - mean / 255 f) / (std / 255 f), for x' in [0, 1].
    # Exactly 1 for the usual factor, which files round: then mean and std stay as they are written.
    unit = 1.0 if math.isclose(factor, 1 / 255, rel_tol=1e-6) else 255 * factor
    given = {"image_mean": settings["image_mean"], "image_std": settings["image_std"]}
    if not settings["do_normalize"]:
        given = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    scaled = {
        name: tuple(x / unit for x in base.three_numbers(values, name, file))
        for name, values in given.items()
    }
    if not all(scaled["image_std"]):
        raise UserError(
            f"{file}: image_std is {given['image_std']!r}, and pixels are divided by it"
        )
    return scaled


def _pair(size: Any) -> tuple[int, int] | None:
    """Returns height and width of a size that has both; else None."""
    if isinstance(size, Mapping):
        size = [size.get("height"), size.get("width")]
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    whole = len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)
    return sides if whole else None


def _geometry(
    settings: Mapping[str, Any], size: tuple[int, int], file: Path, notes: list[str]
) -> dict[str, Any]:
    """Computes `resize` and `scale`; notes steps that cannot be done, or that give another size.

    Raises:
      UserError: a size is invalid.
    """
    takes = f"the model takes {size[0]} x {size[1]}"
    cut = settings["do_center_crop"]
    if cut and _pair(settings["crop_size"]) != size:
        notes.append(f"its image processor cuts {settings['crop_size']} out, and {takes}")
    if not settings["do_resize"]:
        notes.append(f"its image processor does not resize images, and here they are: {takes}")
        return {"resize": "crop" if cut else "squash", "scale": None}
    wanted = settings["size"]
    # transformers reads one number as a square, unless the class says otherwise (`get_size_dict`).
    if type(wanted) is int and not settings["default_to_square"]:
        wanted = {"shortest_edge": wanted}
    both = _pair(wanted)
    if both is not None:
        if cut:
            return {"resize": "squash", "scale": None if both == size else both}
        if both != size:
            notes.append(f"its image processor makes {both[0]} x {both[1]} pixels, and {takes}")
        return {"resize": "squash", "scale": None}
    if not isinstance(wanted, Mapping):
        raise UserError(f"{file}: size is {wanted!r}, not a number, two, or a mapping of them")
    short = wanted.get("shortest_edge")
    if type(short) is not int or short < 1 or wanted.get("longest_edge") is not None:
        notes.append(
            f"its image processor scales to {dict(wanted)}, here images are scaled to cover "
            f"{size[0]} x {size[1]} and their middle is cut out"
        )
        return {"resize": "crop", "scale": None}
    if not cut:
        notes.append(
            f"its image processor keeps the shape of images and cuts nothing, and {takes}: here "
            f"their middle is cut out"
        )
    return {"resize": "crop", "scale": None if short == min(size) else short}
