"""Assignments on a command line: --config.KEY=VALUE, in one literal form for every kind of value.

VALUE is a Python literal, and text needs no quotes. A mapping gives a section, and a list or tuple
a list. A duration is a number with its unit: 40steps, 1000000examples, 30epochs, 5%.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from vlp_jax import image_size
from vlp_jax.defaults import COMPONENT_SECTIONS, DURATION_UNITS, duration
from vlp_jax.errors import OTHER_NAMES, UserError, unknown_key_message
from vlp_jax.preprocess import as_sections, plain

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
# Sections that hold sections by names of the user's own.
NAMED_SECTIONS = ("evaluators", "extra_data", "init_from.sources")
# Arguments of components that are durations: of an evaluator, and of a loss's weight.
DURATION_KEYS = ("every", "begin", "ramp", "end")
DURATION = re.compile(r"(\d[\d_.eE+-]*)\s*(step|example|epoch|percent|%)s?")
BRACKETS = {"{": "}", "[": "]", "(": ")"}


def apply(config: ConfigDict, assignments: list[str]) -> None:
    """Applies `["a.b=v", ...]` to `config` in place; see `vlp_jax.config.override`."""
    units: dict[str, str] = {}  # the unit that each duration got on this command line
    # The image size goes first, so that an operation with a size of its own keeps it.
    for assignment in sorted(assignments, key=lambda a: not a.startswith("image_size=")):
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--config.{path} needs a value: --config.{path}=VALUE")
        with as_sections(config, path):
            section, unit, where = _find(config, path)
            if _is_duration(section) and text != "None" and units.setdefault(where, unit) != unit:
                raise UserError(
                    f"--{where} gets {units[where]} and {unit}: give it one unit, such as "
                    f"--{where}={text}{unit}"
                )
            _assign(config, path, text)


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("a.b", value) of every leaf."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _assign(config: ConfigDict, path: str, text: str) -> None:
    """Sets the key at the dotted `path` to the value that `text` spells."""
    if path == "image_size":
        image_size.replace(config, _literal(path, text))
        return
    section, key, where = _find(config, path)
    if _is_duration(section):
        _require(config, key, dict.fromkeys(DURATION_UNITS), where)
        _set_unit(section, key, _parse(path, text, section, key), where)
        return
    may_go = path.rpartition(".")[0] in NAMED_SECTIONS or where.endswith(".preprocess")
    if key in section and may_go and text == "None":
        with config.unlocked():
            del section[key]
        return
    value = _value(config, path, text, section, key)
    with config.unlocked():
        # ConfigDict refuses a value of another type. A number becomes a float where one stood.
        changes = key in section and isinstance(value, ConfigDict | tuple | str)
        if changes and not isinstance(value, section.get_type(key)):
            del section[key]
        section[key] = value


def _value(config: ConfigDict, path: str, text: str, section: ConfigDict, key: str) -> Any:
    """The value that `text` spells for a key, which may be a new one of a component."""
    is_named = path.rpartition(".")[0] in NAMED_SECTIONS
    is_free = is_named or _is_component(path)  # a mapping takes the place of what stood there
    current = section.get(key)
    if _is_duration(current):
        return _as_duration(path, text)
    if key in section and not is_free and not isinstance(current, ConfigDict):
        return _parse(path, text, section, key)
    given = _literal(path, text, strict=not isinstance(current, str))
    if isinstance(current, str) and not _replaces_text(given):
        return None if text == "None" else text
    if isinstance(given, Mapping) and is_free:
        return _as_section(path, given)
    if isinstance(given, Mapping) and given and key in section:
        for name, item in given.items():
            _assign(config, f"{path}.{name}", item if isinstance(item, str) else repr(item))
        return current
    if key in section and isinstance(given, tuple) and not is_named and _takes_list(key, current):
        return given
    if isinstance(current, ConfigDict):
        raise UserError(_section_message(path, current, is_free))
    if key not in section and (is_named or not is_free):
        _require(config, key, section, f"config.{path}".removesuffix(f".{key}"))
    if key not in section:
        return _as_duration(path, text) if key in DURATION_KEYS else given
    if isinstance(given, str) and isinstance(current, tuple) and _are_texts(current):
        return given  # such as a file with one class name a line, instead of the names
    return _parse(path, text, section, key)


def _takes_list(key: str, current: Any) -> bool:
    """Whether a list may stand where `current` stands in a component."""
    if isinstance(current, ConfigDict):
        return key == "preprocess"  # pairs, which run as written
    return not isinstance(current, bool | int | float)


def _replaces_text(given: Any) -> bool:
    """Whether a literal takes the place of a text: "{}" and "(a photo)" are texts themselves."""
    return bool(given) and (
        isinstance(given, Mapping) or (isinstance(given, tuple) and _are_texts(given))
    )


def _are_texts(items: tuple) -> bool:
    return all(isinstance(item, str) for item in items)


def _section_message(path: str, section: ConfigDict, may_replace: bool) -> str:
    keys = ", ".join(f"--config.{path}.{name}" for name in section)
    message = f"set one of its keys: {keys}" if keys else "it has no keys yet"
    message = f"--config.{path} is a section; {message}"
    if may_replace:
        message += f"; or give all of it: --config.{path}='{{\"KEY\": VALUE}}'"
    if path.rpartition(".")[0] in NAMED_SECTIONS or ".preprocess." in path:
        message += f"; --config.{path}=None leaves it out"
    return message


def _find(config: ConfigDict, path: str) -> tuple[ConfigDict, str, str]:
    """The section that holds the last key of the dotted `path`, that key, the section's name."""
    *parents, key = path.split(".")
    section, where = config, "config"
    for parent in parents:
        _require(config, parent, section, where)
        section, where = section[parent], f"{where}.{parent}"
        if not isinstance(section, ConfigDict):
            raise UserError(f"{where} is a value, not a section: --config.{path} cannot be set")
    return section, key, where


def _is_component(path: str) -> bool:
    """Whether `path` is a component's section, or stands in one, or holds some."""
    if f"{path}.".startswith("init_from.sources."):
        return True
    root, *keys = path.split(".")
    return root in COMPONENT_SECTIONS and (root not in NAMED_SECTIONS or len(keys) != 1)


def _is_duration(section: Any) -> bool:
    """Whether a section is a duration; one in a component may have its own unit alone."""
    return isinstance(section, ConfigDict) and bool(section) and set(section) <= {*DURATION_UNITS}


def _set_unit(section: ConfigDict, unit: str, value: Any, where: str) -> None:
    """Gives a duration this unit instead of the one that it had."""
    with section.unlocked():
        if value is not None:
            # All units become None first, because a duration has exactly one.
            section.update(dict.fromkeys(section))
        try:
            section[unit] = value
        except TypeError as error:
            kind = "a whole number" if unit in ("steps", "examples") else "a number"
            raise UserError(f"--{where}.{unit}={value}: not {kind}") from error


def _as_duration(path: str, given: Any) -> ConfigDict:
    """Returns the duration that "40steps" or {"steps": 40} spells; UserError if it is none."""
    if isinstance(given, str):
        found = DURATION.fullmatch(given.strip())
        if found:
            unit = {"percent": "percent", "%": "percent"}.get(found[2], f"{found[2]}s")
            given = {unit: _literal(path, found[1])}
        else:
            given = _literal(path, given)
    if not isinstance(given, Mapping) or len(given) != 1 or not set(given) <= {*DURATION_UNITS}:
        raise UserError(
            f"--config.{path}={given}: a duration is a number with its unit, such as 40steps, "
            "1000000examples, 30epochs or 5%"
        )
    length = duration()
    (unit, number), *_ = given.items()
    _set_unit(length, unit, number, f"config.{path}")
    return length


def _as_section(path: str, given: Mapping[str, Any]) -> ConfigDict:
    """The section of a mapping, with lists as tuples and durations as sections."""
    section = ConfigDict()
    for key, value in given.items():
        if not isinstance(key, str) or "." in key:
            raise UserError(
                f"--config.{path}: the keys of a section are texts without dots, not {key!r}"
            )
        if key in DURATION_KEYS:
            value = _as_duration(f"{path}.{key}", value)
        elif isinstance(value, Mapping):
            value = _as_section(f"{path}.{key}", value)
        section[key] = value
    return section


def _literal(path: str, text: str, strict: bool = True) -> Any:
    """Returns the Python value that `text` spells, else the text; `strict` refuses bad brackets."""
    # Also in lower case, which Python's literals do not have.
    if text.lower() in ("true", "false"):
        return BOOLEANS[text.lower()]
    try:
        return plain(ast.literal_eval(text))
    except (SyntaxError, TypeError, ValueError):
        if strict and text.strip() and BRACKETS.get(text.strip()[0]) == text.strip()[-1]:
            raise UserError(
                f"--config.{path}={text} is no Python literal; write '{{\"KEY\": VALUE}}' or "
                '\'["a", "b"]\', with single quotes around the whole for the shell'
            ) from None
        return text


def _require(config: ConfigDict, key: str, known: Mapping[str, Any], where: str) -> None:
    """Raises UserError if `key` is not in the section `known`; it says what was meant."""
    if key in known:
        return
    meant = _elsewhere(config, key) if where == "config" else []
    if not meant:
        raise UserError(unknown_key_message(key, known, where))
    listed = " or ".join(f"--config.{path}" for path in meant)
    raise UserError(f"unknown key {key!r} in config; did you mean {listed}?")


def _elsewhere(config: ConfigDict, key: str) -> list[str]:
    """The paths that end in `key`, as near to the top as there are; an evaluator's do not count."""
    key = OTHER_NAMES.get(key, key)
    paths = [path for path, _ in flatten(config) if not path.startswith("evaluators.")]
    if "image" in config.objective:
        paths.append("objective.image.patch_size")  # which most configs say by `variant`
    found = [path for path in dict.fromkeys(paths) if path.rpartition(".")[2] == key]
    fewest = min((path.count(".") for path in found), default=0)
    return [path for path in found if path.count(".") == fewest]


def _parse(path: str, text: str, section: ConfigDict, key: str) -> Any:
    """Returns `text` as a value of the type that `section` has there; else UserError."""
    expected = section.get_type(key) if key in section else type(None)
    if text == "None":
        return None
    if expected is str:
        return text
    given = BOOLEANS.get(text.lower()) if expected is bool else _literal(path, text)
    untyped = expected in (type(None), object)
    fits = isinstance(given, expected) or (expected is float and isinstance(given, int))
    # A bool is an int in Python, but "true" is no number.
    if given is None or not (untyped or fits) or (isinstance(given, bool) and expected is int):
        raise UserError(f"--config.{path}={text}: not a value of type {expected.__name__}")
    return given
