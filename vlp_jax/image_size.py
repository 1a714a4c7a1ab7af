"""`config.image_size`: said once, and followed by models, operations on images and evaluators.

A model or an operation without a size of its own takes this one. Where it is replaced on the
command line, all that had the same size follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from vlp_jax.errors import UserError
from vlp_jax.preprocess import as_pairs, is_sequence, labelled, name_and_number

# Operations whose `size` is the side of the image that a model gets.
SIZED = (
    "random_resized_crop",
    "resize",
    "resize_shortest_and_center_crop",
    "resize_shortest_and_random_crop",
)
Change = Callable[[str, dict[str, Any]], dict[str, Any]]


def fill(config: ConfigDict) -> None:
    """Gives `config.image_size`, or else the one size of its models, to all that lacks a size."""
    if config.image_size is None:
        sizes = {model.image_size for model in _models(config.objective) if "image_size" in model}
        config.image_size = sizes.pop() if len(sizes) == 1 else None
    size = config.image_size
    if size is None:
        return
    for model in _models(config.objective):
        if "image_size" not in model:
            model.image_size = size
    if isinstance(size, int):  # operations make squares
        _change_operations(
            config, lambda name, given: {"size": size, **given} if name in SIZED else given
        )


def replace(config: ConfigDict, size: Any) -> None:
    """Makes `size` the size of the models and operations that had the config's, in place.

    `min_side` of an operation that decodes images grows or shrinks with it.

    Raises:
      UserError: it is no size, or the models of the config have several.
    """
    sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"config.image_size={size!r} is neither a side in pixels nor two")
    old = config.image_size
    if old is None and any("image_size" in model for model in _models(config.objective)):
        raise UserError("the models have several image sizes: set the image_size of each")

    def follow(name: str, given: dict[str, Any]) -> dict[str, Any]:
        if name in SIZED and given.get("size") == old and isinstance(size, int):
            return {**given, "size": size}
        if name == "decode_image" and given.get("min_side") and isinstance(old, int):
            return {**given, "min_side": given["min_side"] * max(sides) // old}
        return given

    with config.unlocked():
        config.image_size = size
        for model in _models(config.objective):
            if model.get("image_size") == old:
                model.image_size = size
        _change_operations(config, follow)


def _models(section: ConfigDict) -> Iterator[ConfigDict]:
    """Yields the sections of image towers in the section of an objective and of its parts."""
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            yield from (value,) if key == "image" else _models(value)


def _change_operations(config: ConfigDict, change: Change) -> None:
    """Puts `change(name, arguments)` in the place of the arguments of every operation."""
    seen: set[int] = set()  # two datasets may have one and the same section

    def visit(section: ConfigDict) -> None:
        for key, value in list(section.items()):
            if key == "preprocess" and id(value) not in seen:
                seen.add(id(value))
                _change_preprocess(section, change)
            elif isinstance(value, ConfigDict):
                visit(value)

    visit(config)


def _change_preprocess(data: ConfigDict, change: Change) -> None:
    if data.preprocess is None:
        return
    before = {label: dict(given) for label, given in labelled(data.preprocess).items()}
    after = {label: change(name_and_number(label)[0], x) for label, x in before.items()}
    if is_sequence(data.preprocess) and after != before:
        data.preprocess = as_pairs(after)
    elif after != before:
        data.preprocess.update(after)
