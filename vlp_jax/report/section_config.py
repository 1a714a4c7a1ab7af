"""The section of the config: its differences from another config, and all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax import defaults
from vlp_jax.report.blocks import Block, Code, Fold, Section, Table, Text

_LONGEST_VALUE = 90  # letters
_LONGEST_TEXT = 150_000  # letters; a config may hold thousands of class names
ABSENT = "\N{EN DASH}"


def config_section(config: ConfigDict, other: ConfigDict | None, title: str) -> Section:
    """Builds a table of differences, with the whole config folded away.

    Args:
      other: the config to compare with; None for the defaults.
      title: the name of the other config.
    """
    own = flat(config)
    blocks: list[Block] = []
    if other is not None:
        blocks.append(_difference_table({title: flat(other), "this run": own}))
    else:
        base = flat(defaults.base())
        # Arguments of parts have no common default: they are listed by themselves.
        changed = {key: value for key, value in own.items() if key in base}
        blocks.append(_difference_table({"default": base, "this run": changed}))
        parts = {k: v for k, v in own.items() if k not in base}
        rows = [[key, written(value)] for key, value in parts.items()]
        table = Table("Keys of the parts that the config chooses", ["key", "value"], rows)
        blocks.append(Fold(f"{len(rows)} keys that have no common default", [table]))
    text = config_lib.to_json(config)
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT] + "\n(cut here)\n"
    blocks.append(Fold("The whole config", [Code("config.json", text)]))
    return Section("config", "Config", blocks)


def differences(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the keys whose values are not the same in all flat configs, in order."""
    first, *others = configs.values()
    keys = sorted({key for config in configs.values() for key in config})
    missing = object()  # None is a value of many keys
    return [k for k in keys if any(o.get(k, missing) != first.get(k, missing) for o in others)]


def difference_table(configs: Mapping[str, ConfigDict]) -> Table | Text:
    """Builds a table of the keys that differ, with the value in each config."""
    return _difference_table({name: flat(config) for name, config in configs.items()})


def flat(config: ConfigDict) -> dict[str, Any]:
    """Returns dotted key -> value."""
    # Through JSON, as the configs of runs came: else a tuple would differ from a list.
    return dict(config_lib.flatten(config_lib.from_json(config_lib.to_json(config))))


def written(value: Any) -> str:
    """Writes a value; a long one is cut in the middle."""
    text = repr(value) if not isinstance(value, str) else value
    if len(text) <= _LONGEST_VALUE:
        return text or "''"
    many = (
        f" {len(value):,} in all"
        if isinstance(value, Sequence) and not isinstance(value, str)
        else ""
    )
    return f"{text[: _LONGEST_VALUE - 20]} …{many}"


def _difference_table(configs: Mapping[str, Mapping[str, Any]]) -> Table | Text:
    keys = differences(configs)
    if not keys:
        return Text(f"No key differs: {' and '.join(configs)} are the same.")
    rows = [
        [key, *(written(c[key]) if key in c else ABSENT for c in configs.values())] for key in keys
    ]
    caption = f"{len(keys)} keys that differ" if len(keys) > 1 else "1 key that differs"
    return Table(caption, ["key", *configs], rows)
