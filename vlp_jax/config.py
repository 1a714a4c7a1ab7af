"""Loads configs from files, overrides keys from the command line, and checks them.

A config file is Python with a function `get_config(arg)` that starts from `base()`, changes what it
needs to and returns an `ml_collections.ConfigDict`. Sections that name a component (`objective`,
`data`, `tokenizer`, each of `evaluators`) become the arguments of that component.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlp_jax import image_size, overrides
from vlp_jax.defaults import COMPONENT_SECTIONS, DATA_DEFAULTS, DURATION_UNITS, base
from vlp_jax.defaults import duration as duration  # a config asks this module for it
from vlp_jax.errors import UserError, first_line, unknown_key_message
from vlp_jax.files import without_mark
from vlp_jax.overrides import flatten as flatten  # for whoever reads a config
from vlp_jax.preprocess import normalize, plain

# Annotation of an argument -> the types it accepts. Other annotations are not checked here.
PLAIN_TYPES = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
# A link to configs/ in a checkout, a copy of it in an installed package. `load` puts the folder
# above a config's on `sys.path`; "share" keeps the package's own modules off it.
INSTALLED = Path(__file__).parent / "share" / "configs"


def load(spec: str) -> ConfigDict:
    """Loads the config "FILE" or "FILE:ARG"; locks and checks it.

    A bare name, "demo" or "mae_then_clip:clip", is one of the configs of the package.

    Raises:
      UserError: the file or its `get_config` is missing, or it sets a key that does not exist.
    """
    path, _, argument = spec.partition(":")
    file = _find_file(path)
    without_mark(file.read_bytes(), path)  # Python's own error for UTF-16 does not say what to do
    root = str(file.resolve().parent.parent)
    if root not in sys.path:  # lets a config derive from another: `from configs import clip_b16`
        sys.path.insert(0, root)
    module_spec = importlib.util.spec_from_file_location(f"vlp_jax_config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path} has no function get_config(arg)")
        config = module.get_config(argument or None)
    except (AttributeError, KeyError, TypeError) as error:
        # ConfigDict's error names the key that its locked parent does not have.
        raise UserError(f"{path}: {first_line(error)}") from error
    check(config)
    complete(config)
    return config.lock()


def _find_file(path: str) -> Path:
    """Returns the file that `path` names, else the installed config of that name."""
    if Path(path).is_file():
        return Path(path)
    if not re.fullmatch(r"\w+", path):
        raise UserError(f"config file {path} does not exist")
    names = [file.stem for file in INSTALLED.glob("[!_]*.py")]
    if path not in names:
        raise UserError(unknown_key_message(path, names, "--config"))
    return INSTALLED / f"{path}.py"


def complete(config: ConfigDict) -> None:
    """Adds what follows from the rest: keys of all data, `every` of evaluators, image sizes."""
    with config.unlocked():
        for data in (config.data, *config.extra_data.values()):
            for key, value in DATA_DEFAULTS.items():
                if data and key not in data:
                    data[key] = value
        for evaluator in config.evaluators.values():
            if isinstance(evaluator, ConfigDict) and "every" not in evaluator:
                evaluator.every = duration(percent=100.0)
        normalize(config)
        image_size.fill(config)


def check(config: ConfigDict) -> None:
    """Raises UserError if a key outside the component sections is not one of `base()`'s."""
    _check_keys(config, base(), "config", skip=COMPONENT_SECTIONS)
    for key in COMPONENT_SECTIONS:
        if not isinstance(config[key], ConfigDict):
            raise UserError(f"config.{key} must be a ConfigDict")


def _check_keys(
    config: ConfigDict, known: ConfigDict, where: str, skip: tuple[str, ...] = ()
) -> None:
    for key in config:
        if key not in known:
            raise UserError(unknown_key_message(key, known, where))
        if key not in skip and isinstance(known[key], ConfigDict):
            if not isinstance(config[key], ConfigDict):
                raise UserError(f"{where}.{key} must be a section, not {config[key]!r}")
            if known[key]:  # an empty section takes any names, such as config.init_from.sources
                _check_keys(config[key], known[key], f"{where}.{key}")
        elif config[key] is None and known[key] is not None and key not in DURATION_UNITS:
            raise UserError(f"{where}.{key} must not be None")


def override(config: ConfigDict, assignments: list[str]) -> None:
    """Applies `["a.b=v", ...]` in place, in the literal form of `vlp_jax.overrides`.

    A mapping gives a section, a new key in a component's section is an argument of it, None leaves
    out what has a name of the user's own, and a size that changes is followed by all that had it
    (docs/configs.md has the rules).

    Raises:
      UserError: a key that does not exist (the error names the nearest one that does), or a value
        of another type.
    """
    overrides.apply(config, assignments)
    complete(config)


def to_json(config: ConfigDict) -> str:
    """Writes the resolved config as JSON; `from_json` reads it back."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """Reads what `to_json` wrote, lists as tuples; keys that it lacks get their defaults."""
    config = ConfigDict(plain(json.loads(text)))
    # Before `check`, which asks for the component sections of today.
    _add_missing(config, base())
    check(config)
    complete(config)
    return config.lock()


def _add_missing(config: ConfigDict, defaults: ConfigDict) -> None:
    for key, value in defaults.items():
        if key not in config:
            config[key] = value
        elif isinstance(value, ConfigDict) and isinstance(config[key], ConfigDict):
            _add_missing(config[key], value)


def build(constructor: Callable[..., Any], section: Mapping[str, Any], where: str, **more: Any):
    """Calls `constructor(**section, **more)`, without the key `name` that selected it.

    Raises:
      UserError: unknown or missing keys, a value that does not fit an annotation in `PLAIN_TYPES`,
        or a TypeError or ValueError of the constructor.
    """
    arguments = {key: value for key, value in section.items() if key != "name"}
    parameters = inspect.signature(constructor).parameters
    known = {n: p for n, p in parameters.items() if n not in more}  # the caller passes the rest
    for key in arguments:
        if key not in known:
            raise UserError(unknown_key_message(key, known, where))
    required = {n for n, p in known.items() if p.default is p.empty}
    missing = sorted(required - set(arguments))
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    for key, value in arguments.items():
        _check_type(f"{where}.{key}", value, known[key].annotation)
    try:
        return constructor(**arguments, **more)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {first_line(error)}") from error


def _check_type(where: str, value: Any, annotation: Any) -> None:
    """Raises UserError if `annotation` is in `PLAIN_TYPES` and `value` has another type."""
    name = annotation.removesuffix(" | None") if isinstance(annotation, str) else ""
    if name not in PLAIN_TYPES or value is None:
        return
    kinds = PLAIN_TYPES[name]
    # A bool is an int in Python, but `depth=True` is a mistake.
    if not isinstance(value, kinds) or (isinstance(value, bool) and name != "bool"):
        raise UserError(f"{where}={value!r}: not a value of type {name}")


def select(table: Mapping[str, Any], section: Mapping[str, Any], where: str) -> Any:
    """Returns `table[section.name]`; raises a UserError that names the nearest known name."""
    if "name" not in section:
        raise UserError(f"{where} lacks a name (known: {', '.join(sorted(table))})")
    if section["name"] not in table:
        raise UserError(unknown_key_message(section["name"], table, f"{where}.name"))
    return table[section["name"]]
