"""What every format gives and takes, and what several of them need."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

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

INTERPOLATIONS = ("bicubic", "bilinear")  # of our own runs; both antialiased
RESAMPLINGS = (*INTERPOLATIONS, "nearest", "box", "hamming", "lanczos")  # of Pillow
RESIZES = ("squash", "crop")
CROP_ROUNDINGS = ("even", "down")

# Fields that change how a model runs or starts, not what it computes.
_NO_MATTER = {
    *("parent", "name", "stochastic_depth", "logit_scale_init", "logit_bias_init"),
}


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model that was read.

    Attributes:
      module: complete: it computes what the source computes.
      params: path -> float32 array (see `vlp_jax.interop.trees`).
      notes: what the module does not say, a line each.
      extras: fields of `Extras` that the files say, for writing the model again.
    """

    module: Module
    params: Params
    notes: list[str]
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)


_CHOICES = (
    ("resize", RESIZES),
    ("interpolation", RESAMPLINGS),
    ("crop_rounding", CROP_ROUNDINGS),
    ("weights", WEIGHTS),
)


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a foreign config wants to know and our modules do not say.

    Attributes:
      bos_id, eos_id, pad_id: of the tokenizer; None takes what the text tower has (bos: none).
      image_mean, image_std: for an image tower alone, which does not have them.
      resize: how pixels come to the model's size: "squash" changes the aspect ratio, "crop" scales
        the shorter side and cuts the middle out.
      interpolation: one of `RESAMPLINGS`.
      scale: what an image is scaled to before the middle of the model's size is cut out; None: the
        model's size. With "squash" height and width. With "crop" the length of the shorter side, or
        a height and width that the image then covers.
      crop_rounding: where half a pixel before a cut goes: "even" as torchvision rounds, "down" as
        transformers does.
      norm_pix_loss, mask_ratio: of masked autoencoding.
      tokenizer: its files, for formats that have some.
      weights: of `precision.WEIGHTS`, to which the parameters have been rounded.
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
        """Whether files hold bfloat16."""
        return self.weights == "bfloat16"

    def __post_init__(self) -> None:
        for field, known in _CHOICES:
            if getattr(self, field) not in known:
                raise UserError(f"{field}={getattr(self, field)!r} must be {' or '.join(known)}")

    @property
    def pixels(self) -> Pixels:
        """How an image tower alone takes pixels."""
        return Pixels(tuple(self.image_mean), tuple(self.image_std))

    def pixels_of(self, module: Module) -> Pixels:
        """How a model takes pixels: by its own word, if it has one."""
        return getattr(module, "pixels", self.pixels)


class Format(Protocol):
    """A file of `vlp_jax.interop` that holds one foreign format.

    Attributes:
      KINDS: the modules of which it can hold some.
      LOADED_BY: a line of Python that loads a folder of it, in which `{}` stands for the folder and
        `{architecture}` for the class that its config names.
      HOLDS: those of `precision.WEIGHTS` that it has a place for.
    """

    KINDS: tuple[type, ...]
    LOADED_BY: str
    HOLDS: tuple[str, ...]

    def read(self, path: Path, like: Module | None) -> Imported:
        """Reads a file or a directory; `like` says what the files do not."""
        ...

    def check(self, module: Module, extras: Extras) -> list[str]:
        """All that the format cannot express of a module, a line each."""
        ...

    def write(self, module: Module, params: Params, directory: Path, extras: Extras) -> list[Path]:
        """Writes a module that `check` has nothing against; returns the files."""
        ...


# Layers of other kinds are language models' and of none of these formats.
_LAYERS = {
    "activation": ("gelu", "gelu_tanh", "quick_gelu"),
    **{name: (value,) for name, value in PLAIN_LAYERS.items()},
}


def requirements(
    model: str, part: str, tower: nn.Module, required: Mapping[str, tuple[Any, ...]]
) -> list[str]:
    """A line for each field of a tower whose value is not one of those that a model can have.

    Of the layers, no model can have those of language models.

    Args:
      model: the foreign class, for the message.
      part: "image", "text" or "decoder"; "" for the fields of the whole.
      required: field of the tower or of its `TransformerConfig` -> the values it may have.
    """
    lines, fields = [], tower_fields(tower)
    for field, allowed in ((_LAYERS if part else {}) | dict(required)).items():
        value = fields[field]
        if value not in allowed:
            name = f"{part}.{field}" if part else field
            lines.append(f"{model} has {name} {' or '.join(map(repr, allowed))}, not {value!r}")
    return lines


def square_problems(model: str, vit: VisionTransformer) -> list[str]:
    """A line if the images are not square."""
    height, width = vit.image_size
    return [] if height == width else [f"{model} takes square images, not {height} x {width} ones"]


def with_position_table(
    vit: VisionTransformer, params: Params, prefix: str = "image"
) -> tuple[VisionTransformer, Params]:
    """The same tower with a learned table that has a row for every token but the registers.

    Fixed sines and cosines become a table of them, no positions one of zeros; the row of a class
    token without a position is zero.
    """
    path = f"{prefix}/position_embedding"
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
    """The grid of so many patches: that of `like` if it has as many, else the square one.

    Raises:
      UserError: the number is no square and `like` does not have it.
    """
    if like is not None and image_of(like).patches == patches:
        return image_of(like).grid
    try:
        return square_grid(patches)
    except ValueError as error:
        raise UserError(f"{where}: {error}: give its config, or a model with that grid") from None


def tiled(size: tuple[int, int], patch: int, notes: list[str]) -> tuple[int, int]:
    """The pixels that patches cover; notes if some are left over at the right and the bottom."""
    covered = (size[0] // patch * patch, size[1] // patch * patch)
    if covered != size:
        notes.append(
            f"patches of {patch} do not tile {size[0]} x {size[1]} pixels: the source drops the "
            f"last ones, so this model takes {covered[0]} x {covered[1]}"
        )
    return covered


def pair(value: Any, what: str, where: object) -> tuple[int, int]:
    """Height and width of a side or a pair of them in a config.

    Raises:
      UserError: it is neither.
    """
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(f"{where}: {what} is {value!r}, neither a number nor two")
    return sides


def one_side(value: Any, what: str, where: object) -> int:
    """The side of a square in a config.

    Raises:
      UserError: it is none.
    """
    height, width = pair(value, what, where)
    if height != width:
        raise UserError(f"{where}: {what} {height} x {width} is not square, which is needed here")
    return height


def integer(config: Mapping[str, Any], name: str, where: object) -> int:
    """A positive whole number of a config.

    Raises:
      UserError: it is none.
    """
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {name} is {value!r}, not a positive whole number")
    return value


def number(config: Mapping[str, Any], name: str, where: object) -> float:
    """A number of a config.

    Raises:
      UserError: it is none.
    """
    value = config.get(name)
    if type(value) not in (int, float):
        raise UserError(f"{where}: {name} is {value!r}, not a number")
    return float(value)


def tower(kind: type[nn.Module], where: object, **fields: Any) -> Any:
    """A tower of class `kind` from its own fields and those of its layers.

    Raises:
      UserError: sizes that do not fit each other.
    """
    heads = fields["heads"]
    if type(heads) is not int or heads < 1:
        raise UserError(f"{where}: heads must be a number above 0, not {heads!r}")
    try:
        return make_tower(kind, **fields)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def shape_of(tensors: Mapping[str, np.ndarray], key: str, ndim: int, where: object) -> Shape:
    """The shape of a tensor from which sizes are taken.

    Raises:
      UserError: it is not there, or does not have so many dimensions.
    """
    if key not in tensors:
        raise UserError(f"{where} has no {key}, which every model of this format has")
    shape = tuple(tensors[key].shape)
    if len(shape) != ndim:
        raise UserError(f"{where}: {key} has the shape {list(shape)}, not {ndim} dimensions")
    return shape


def norm_after_pool_of(like: Module | None) -> bool:
    """Where the last LayerNorm of a class token stands: it makes no difference but to the path."""
    vit = None if like is None else image_of(like)
    return vit is not None and vit.pooling == "cls" and vit.norm_after_pool


def mlp_ratio(width: int, mlp_dim: int) -> float:
    """A factor such that `int(width * factor)`, as PyTorch libraries compute it, is `mlp_dim`."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else math.nextafter(ratio, math.inf)


def differences(source: Module, here: Module) -> list[str]:
    """A line for each field in which two models compute something else from the same parameters.

    A source that is an image tower alone is compared with the image tower here, and the other way
    round.
    """
    towers, ours = source.towers(), here.towers()
    lines = []
    both = [part for part in towers if part in ours]  # in the model's own order
    for part in both if type(source) is type(here) else ["image"]:
        lines += _fields(part, towers[part], ours[part])
    if any(module is image_of(module) for module in (source, here)):
        return lines  # a tower alone has no fields but its own
    own = {"image_mean", "image_std"}
    if type(source) is type(here):
        own = set(described(source)) - set(towers)
    return lines + _fields("", source, here, only=own)


def _fields(part: str, source: Any, here: Any, only: set[str] | None = None) -> list[str]:
    lines = []
    there, ours = (described(module) for module in (source, here))
    for name, a in there.items():
        if name in _NO_MATTER or (only is not None and name not in only):
            continue
        b = ours[name]
        if a != b and not _same(name, there, ours):
            label = f"{part}.{name}" if part else name
            lines.append(f"{label} is {a!r} in the source and {b!r} here")
    return lines


def described(module: nn.Module) -> dict[str, Any]:
    """The fields of a model that say what it computes, with those of its layers and its pixels."""
    fields = tower_fields(module)
    if hasattr(module, "compute"):
        fields["quantization"] = module.compute.quantization
    if isinstance(fields.get("pixels"), Pixels):
        pixels = fields.pop("pixels")
        fields |= {"image_mean": pixels.mean, "image_std": pixels.std}
    return fields


def _same(name: str, source: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether fields of different values come to the same."""
    both = (source, here)
    if name == "norm_after_pool":
        return all(vit["pooling"] == "cls" for vit in both)
    if name == "layer_scale":
        return all(tower["layer_scale"] is not None for tower in both)
    if name == "class_position":
        return not any(vit["class_token"] and vit["position"] == "learned" for vit in both)
    if name == "eos_id":
        return all(tower.get("pooling") not in ("eos", None) for tower in both)
    if name == "pad_id":
        return all(
            "pooling" in tower and not tower["padding_mask"] and tower["pooling"] != "mean"
            for tower in both
        )
    if name in ("image_mean", "image_std"):
        return np.allclose(source[name], here[name], atol=1e-6)
    return False
