"""The interface of a format (`Format`), its data types, and helpers that several formats share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.interop.hf_tokenizer import TokenizerFiles
from vlp_jax.interop.precision import WEIGHTS
from vlp_jax.interop.tables import Shape
from vlp_jax.interop.trees import Module, Params, image_of
from vlp_jax.models.positions import sincos_2d, square_grid
from vlp_jax.models.values import PLAIN_LAYERS, Pixels, make_tower, tower_fields
from vlp_jax.models.vit import VisionTransformer

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # openai/CLIP, clip.py `_transform`
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

INTERPOLATIONS = ("bicubic", "bilinear")  # supported by our data pipeline; both antialiased
RESAMPLINGS = (*INTERPOLATIONS, "nearest", "box", "hamming", "lanczos")  # known to Pillow
RESIZES = ("squash", "crop")
# Field of `Extras`, or of what prepares images by it -> its values.
RESIZE_CHOICES = {
    "resize": RESIZES,
    "interpolation": RESAMPLINGS,
    "crop_rounding": ("even", "down"),
}

# Fields that change how a model is run or initialized, and not its function. `differences` ignores
# them.
_NO_MATTER = {"stochastic_depth", "logit_scale_init", "logit_bias_init"}


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model that was read from foreign files.

    Attributes:
      module: the model. It computes the same function as the source.
      params: path -> float32 array (see `vlp_jax.interop.trees`).
      notes: lines for the user about the source that the module does not express.
      extras: fields of `Extras` that the files contain, for writing the model again.
    """

    module: Module
    params: Params
    notes: list[str]
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def grids(self) -> dict[str, tuple[int, int]]:
        """Path of a position table -> the rows and columns of patches that it is for."""
        # The decoder of a masked autoencoder has the image tower's grid.
        tables = ("image/position_embedding", "decoder/position_embedding")
        return {path: image_of(self.module).grid for path in tables if path in self.params}


@dataclasses.dataclass(frozen=True)
class Extras:
    """Settings in foreign configs that our modules do not hold.

    Attributes:
      bos_id, eos_id, pad_id: ids of the tokenizer; None takes the text tower's (bos: none).
      image_mean, image_std: normalization for an image tower alone, which does not hold it.
      resize: how images get the model's size: "squash" changes the aspect ratio; "crop" scales the
        shorter side and crops the center.
      interpolation: one of `RESAMPLINGS`.
      scale: the size to scale to before the center is cropped; None for the model's size. With
        "squash" it is a height and width. With "crop" it is the length of the shorter side, or a
        height and width that the scaled image covers.
      crop_rounding: rounding of half a pixel at the crop's corner: "even" like torchvision, "down"
        like transformers.
      norm_pix_loss, mask_ratio: settings of masked autoencoding.
      tokenizer: the tokenizer's files, for formats that include them.
      weights: the name in `precision.WEIGHTS` to which the parameters have been rounded.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    image_mean: tuple[float, ...] = HALF
    image_std: tuple[float, ...] = HALF
    resize: str = "squash"
    interpolation: str = "bicubic"
    scale: int | tuple[int, int] | None = None
    crop_rounding: str = "even"
    norm_pix_loss: bool = False
    mask_ratio: float = 0.75
    tokenizer: TokenizerFiles | None = None
    weights: str = "float32"

    @property
    def narrow(self) -> bool:
        """Whether files contain bfloat16."""
        return self.weights == "bfloat16"

    def __post_init__(self) -> None:
        check_choices(self, {**RESIZE_CHOICES, "weights": WEIGHTS})

    @property
    def pixels(self) -> Pixels:
        """The normalization of pixels for an image tower alone."""
        return Pixels(tuple(self.image_mean), tuple(self.image_std))

    def pixels_of(self, module: Module) -> Pixels:
        """Returns a model's normalization of pixels, or `self.pixels` if it has none."""
        return getattr(module, "pixels", self.pixels)


def check_choices(settings: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Raises UserError if a field of `settings` has a value that is not among its choices."""
    for field, known in choices.items():
        if getattr(settings, field) not in known:
            raise UserError(f"{field}={getattr(settings, field)!r} must be {' or '.join(known)}")


@dataclasses.dataclass(frozen=True)
class Format:
    """A foreign format.

    Attributes:
      kinds: the classes of models that it may be able to express.
      loaded_by: a line of Python that loads its folder, with `{}` for the folder and
        `{architecture}` for the class that its config names.
      holds: the names in `precision.WEIGHTS` that it can store.
      read: reads a file or a directory; the second argument is a model that supplies settings that
        the files lack, or None. Raises UserError if they hold no model that can be expressed here.
      check: returns a line for each property of a module that the format cannot express.
      write: writes a module for which `check` returns no lines; returns the files.
    """

    kinds: tuple[type, ...]
    loaded_by: str
    holds: tuple[str, ...]
    read: Callable[[Path, Module | None], Imported]
    check: Callable[[Module, Extras], list[str]]
    write: Callable[[Module, Params, Path, Extras], list[Path]]


# Values that these formats can express for every tower. Other kinds of layers belong to language
# models.
_LAYERS = {
    "activation": ("gelu", "gelu_tanh", "quick_gelu"),
    **{name: (value,) for name, value in PLAIN_LAYERS.items()},
}
# Values of further fields, of towers that are as plain as most published ones.
PLAIN_TEXT: Mapping[str, tuple[Any, ...]] = {
    "padding_mask": (False,),
    "qk_norm": (False,),
    "layer_scale": (None,),
}
PLAIN_TOWER: Mapping[str, tuple[Any, ...]] = {
    "registers": (0,),
    "qk_norm": (False,),
    "layer_scale": (None,),
}


def requirements(
    model: str, part: str, tower: nn.Module, required: Mapping[str, tuple[Any, ...]]
) -> list[str]:
    """Returns a line for each field of a tower that a foreign class (`model`) cannot express.

    `required` has the values that a field may have. A `part` ("image", "text", "decoder"; "" for
    the whole model) needs the values in `_LAYERS` too.
    """
    lines, fields = [], tower_fields(tower)
    for field, allowed in ((_LAYERS if part else {}) | dict(required)).items():
        value = fields[field]
        if value not in allowed:
            name = f"{part}.{field}" if part else field
            lines.append(f"{model} has {name} {' or '.join(map(repr, allowed))}, not {value!r}")
    return lines


def first(has: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Selects the first value of each field."""
    return {name: values[0] for name, values in has.items()}


def eos_problems(text: Any, extras: Extras) -> list[str]:
    """Returns a line if the tokenizer ends texts with another token than the tower pools."""
    if text.pooling != "eos" or extras.eos_id in (None, text.eos_id):
        return []
    return [f"eos_id {extras.eos_id} is not text.eos_id {text.eos_id}, at which it pools"]


def special_ids(text: Any, extras: Extras) -> dict[str, int | None]:
    """Returns the ids of bos (None if unknown), eos and padding, the tower's by default."""
    ids = {"bos_id": None, "eos_id": text.eos_id, "pad_id": text.pad_id}
    given = {name: getattr(extras, name) for name in ids}
    return {name: ids[name] if x is None else x for name, x in given.items()}


def square_problems(model: str, vit: VisionTransformer) -> list[str]:
    """Returns a line if the images are not square."""
    height, width = vit.image_size
    return [] if height == width else [f"{model} takes square images, not {height} x {width} ones"]


def with_position_table(vit: VisionTransformer, params: Params) -> tuple[VisionTransformer, Params]:
    """Gives a tower a learned position table with a row for every token but the registers.

    Fixed sines and cosines become a table of them. A tower without positions gets a table of zeros.
    The row of a class token without a position is zero. The function does not change.
    """
    path = "image/position_embedding"
    if vit.position == "learned":
        table = params[path]
    elif vit.position == "sincos":
        table = sincos_2d(vit.grid, vit.width)
    else:
        table = np.zeros((vit.patches, vit.width), np.float32)
    if len(table) == vit.patches and vit.class_token:
        table = np.concatenate([np.zeros((1, vit.width), np.float32), table])
    return vit.clone(position="learned", class_position=True), {**params, path: table}


def grid_of(patches: int, like: Module | None, where: object) -> tuple[int, int]:
    """Returns the grid of `like` if it has as many patches, else a square, or a UserError."""
    if like is not None and image_of(like).patches == patches:
        return image_of(like).grid
    try:
        return square_grid(patches)
    except ValueError as error:
        raise UserError(f"{where}: {error}: give its config, or a model with that grid") from None


def tiled(size: tuple[int, int], patch: int, notes: list[str]) -> tuple[int, int]:
    """Returns the pixels that whole patches cover; adds a note if the source drops a margin."""
    covered = (size[0] // patch * patch, size[1] // patch * patch)
    if covered != size:
        notes.append(
            f"patches of {patch} do not tile {size[0]} x {size[1]} pixels: the source drops the "
            f"last ones, so this model takes {covered[0]} x {covered[1]}"
        )
    return covered


def pair(value: Any, what: str, where: object) -> tuple[int, int]:
    """Reads a height and width, given as one number or two; raises UserError for anything else."""
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(f"{where}: {what} is {value!r}, neither a number nor two")
    return sides


def three_numbers(value: Any, what: str, where: object) -> tuple[float, ...]:
    """Reads a value for each channel, given as one number or three; raises UserError otherwise."""
    numbers = [value] * 3 if isinstance(value, int | float) else value
    fits = isinstance(numbers, list | tuple) and len(numbers) == 3
    if not fits or not all(isinstance(x, int | float) for x in numbers):
        raise UserError(f"{where}: {what} is {value!r}, not three numbers")
    return tuple(float(x) for x in numbers)


def one_side(value: Any, what: str, where: object) -> int:
    """Reads the side of a square; raises UserError if there are two that differ."""
    height, width = pair(value, what, where)
    if height != width:
        raise UserError(f"{where}: {what} {height} x {width} is not square, which is needed here")
    return height


def one_or_two(size: tuple[int, int]) -> int | list[int]:
    """Writes a height and width for `pair`: as one number if they are equal."""
    return size[0] if size[0] == size[1] else list(size)


def one_of(names: Mapping[str, str], theirs: Any, what: str, where: object) -> str:
    """Returns our name for theirs; raises UserError if there is none."""
    ours = {value: key for key, value in names.items()}
    if theirs not in ours:
        raise UserError(f"{where}: {what} {theirs!r} cannot be expressed here")
    return ours[theirs]


def integer(config: Mapping[str, Any], name: str, where: object) -> int:
    """Reads a positive whole number from a config; raises UserError if it is none or missing."""
    value = config.get(name)
    # Not isinstance: a bool is an int in Python, and a `true` in JSON is no size.
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {name} is {value!r}, not a positive whole number")
    return value


def number(config: Mapping[str, Any], name: str, where: object) -> float:
    """Reads a number from a config; raises UserError if it is none or missing."""
    value = config.get(name)
    if type(value) not in (int, float):
        raise UserError(f"{where}: {name} is {value!r}, not a number")
    return float(value)


def tower(kind: type[nn.Module], where: object, **fields: Any) -> Any:
    """Makes a tower, see `make_tower`; raises UserError for sizes that do not fit each other."""
    heads = fields["heads"]
    if type(heads) is not int or heads < 1:
        raise UserError(f"{where}: heads must be a number above 0, not {heads!r}")
    try:
        return make_tower(kind, **fields)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def shape_of(tensors: Mapping[str, np.ndarray], key: str, ndim: int, where: object) -> Shape:
    """Returns the shape of a tensor; raises UserError if it is missing or has other dimensions."""
    if key not in tensors:
        raise UserError(f"{where} has no {key}, which every model of this format has")
    shape = tuple(tensors[key].shape)
    if len(shape) != ndim:
        raise UserError(f"{where}: {key} has the shape {list(shape)}, not {ndim} dimensions")
    return shape


def norm_after_pool_of(like: Module | None) -> bool:
    """Whether `like` pools a class token before its last norm, which only changes the paths."""
    vit = None if like is None else image_of(like)
    return vit is not None and vit.pooling == "cls" and vit.norm_after_pool


def mlp_ratio(width: int, mlp_dim: int) -> float:
    """Returns a factor for which `int(width * factor)`, as PyTorch libraries do, is `mlp_dim`."""
    ratio = mlp_dim / width
    # If rounding leaves the product just below mlp_dim, the next larger float does it.
    return ratio if int(width * ratio) == mlp_dim else math.nextafter(ratio, math.inf)


def differences(source: Module, here: Module) -> list[str]:
    """Returns a line for each field that makes two models with equal parameters differ.

    If one model is an image tower alone, only the image towers are compared. Models of different
    classes have only the image tower and the normalization of pixels in common.
    """
    towers, ours, alike = source.towers(), here.towers(), type(source) is type(here)
    pairs = {part: (towers[part], ours[part]) for part in towers if part in ours}
    pairs = pairs if alike else {"image": pairs["image"]}
    if not any(module is image_of(module) for module in (source, here)):
        pairs[""] = (source, here)
    lines = []
    for part, both in pairs.items():
        there, ours = (described(module) for module in both)
        skipped = _NO_MATTER | towers.keys() if part == "" else _NO_MATTER
        for name in there if part or alike else ("image_mean", "image_std"):
            a, b = there[name], ours[name]
            if name not in skipped and a != b and not _same(name, there, ours):
                label = f"{part}.{name}" if part else name
                lines.append(f"{label} is {a!r} in the source and {b!r} here")
    return lines


def described(module: nn.Module) -> dict[str, Any]:
    """Returns the fields that define a model's function, including layers and pixels."""
    fields = tower_fields(module)
    if hasattr(module, "compute"):
        fields["quantization"] = module.compute.quantization
    if isinstance(fields.get("pixels"), Pixels):
        pixels = fields.pop("pixels")
        fields |= {"image_mean": pixels.mean, "image_std": pixels.std}
    return fields


def _same(name: str, source: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether a field with different values makes no difference to the function."""
    both = (source, here)
    # A norm treats each token by itself, so it may come before or after the choice of one.
    if name == "norm_after_pool":
        return all(vit["pooling"] == "cls" for vit in both)
    if name == "layer_scale":  # its value is the initial one; only its presence matters
        return all(tower["layer_scale"] is not None for tower in both)
    # The field only says whether a learned table has a row for the class token.
    if name == "class_position":
        return not any(vit["class_token"] and vit["position"] == "learned" for vit in both)
    if name == "eos_id":  # only the pooling reads it
        return all(tower.get("pooling") not in ("eos", None) for tower in both)
    if name == "pad_id":  # only the padding mask and the mean read it
        return all(
            "pooling" in tower and not tower["padding_mask"] and tower["pooling"] != "mean"
            for tower in both
        )
    if name in ("image_mean", "image_std"):
        return np.allclose(source[name], here[name], atol=1e-6)
    return False
