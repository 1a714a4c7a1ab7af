"""The keys of a config for `--help`: also those with a default in a constructor, with meanings.

A meaning is the entry of the key in a docstring, under "Args", "Attributes" or "Keys".
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vlp_jax import defaults
from vlp_jax.data.ops import OPS
from vlp_jax.data.sources import SOURCES
from vlp_jax.evaluators import EVALUATORS
from vlp_jax.objectives import OBJECTIVES
from vlp_jax.preprocess import labelled, name_and_number

LONGEST_VALUE, LONGEST_MEANING = 120, 180  # characters
# Arguments that the program gives, not the config.
GIVEN = {
    *("tokenizer", "steps_of", "compute", "vocab_size", "context_length", "extra_tokens"),
    *("bos_id", "eos_id", "pad_id", "data", "train_data", "resources", "parts"),
}
TITLE = re.compile(r"(Args|Attributes|Keys)( .*)?:")
POINTER = re.compile(r"(?:\w+ ){1,3}`(\w+)(?:\.\w+)?`\.?")  # such as "see `Captioning`"
ENTRY = re.compile(r"  ([\w.]+(?:, [\w.]+)*): (.*)")


class Key(NamedTuple):
    """A key that may be set, as after `--config.`, its value, and a line of meaning or ""."""

    path: str
    value: Any
    meaning: str

    def __str__(self) -> str:
        value = textwrap.shorten(str(self.value), LONGEST_VALUE)
        meaning = textwrap.shorten(self.meaning, LONGEST_MEANING, placeholder=" ...")
        return f"  --config.{self.path}={value}" + (f"\n      {meaning}" if meaning else "")


@functools.cache
def entries(docstring: str) -> dict[str, tuple[str, int]]:
    """Name -> its text in a docstring, and its place among the names that share the text."""
    texts: list[tuple[list[str], list[str]]] = []
    inside = False
    for line in inspect.cleandoc(docstring).splitlines():
        entry = ENTRY.fullmatch(line)
        if line and not line.startswith(" "):
            inside = bool(TITLE.fullmatch(line))
        elif inside and entry:
            texts.append((entry[1].split(", "), [entry[2]]))
        elif inside and line and texts:
            texts[-1][1].append(line.strip())
    return {
        name: (" ".join(lines), place) for names, lines in texts for place, name in enumerate(names)
    }


def meaning(kind: Callable[..., Any], name: str) -> str:
    """Returns the meaning of an argument of a function or class; "" if no docstring has one.

    An entry such as "see `Captioning`" leads there. An argument without an entry is looked up in
    what the function takes it for (`keywords_of`), what it returns, and what its docstring names.
    """
    doc = inspect.cleandoc(kind.__doc__ or "")
    text, _ = entries(doc).get(name, ("", 0))
    pointer = POINTER.fullmatch(text)
    if text and not pointer:
        return text
    sources = [_named(kind, pointer[1])] if pointer else []
    if not pointer:
        returned = str(getattr(kind, "__annotations__", {}).get("return", ""))
        named = re.findall(r"`(\w+)`", doc)
        sources += [*getattr(kind, "keyword_sources", ()), _named(kind, returned)]
        sources += [target for target in (_named(kind, x) for x in named) if _takes(target, name)]
    for source in sources:
        if source is not None and source is not kind and (there := meaning(source, name)):
            return there
    return text


def _takes(target: Any, name: str) -> bool:
    return inspect.isfunction(target) and name in inspect.signature(target).parameters


def _named(kind: Callable[..., Any], name: str) -> Any:
    """The object that a name stands for in the module of a function or class."""
    return getattr(sys.modules[kind.__module__], name, None)


def _section_of(kind: Callable[..., Any], name: str) -> Callable[..., Any] | None:
    """The function `make_...` whose arguments a section is, as the docstring of `kind` says."""
    text, place = entries(kind.__doc__ or "").get(name, ("", 0))
    makers = re.findall(r"`(make_\w+)`", text)
    # In "image, text: arguments of `make_vit` and `make_text`", the second name has the second
    # maker.
    return _named(kind, makers[min(place, len(makers) - 1)]) if makers else None


def keys(config: ConfigDict) -> Iterator[Key]:
    """Every key that may be set, in the order of the sections."""
    for name, section in config.items():
        if name == "objective":
            yield from _objective(section, name)
        elif name in ("data", "extra_data"):
            parts = {name: section} if name == "data" else section
            for part, data in parts.items():
                yield from _data(data, part if name == "data" else f"{name}.{part}")
        elif name == "evaluators":
            for key, evaluator in section.items():
                yield from _evaluator(evaluator, f"{name}.{key}", config.data.get("source"))
        else:
            yield from _plain({name: section}, "", _base_meaning)


def _base_meaning(path: str) -> str:
    """The meaning of a key of `vlp_jax.defaults`."""
    top, _, rest = path.partition(".")
    made = entries(defaults.SECTIONS[top].__doc__) if top in defaults.SECTIONS else {}
    for entry in (made.get(rest), entries(defaults.base.__doc__).get(path)):
        if entry:
            return entry[0]
    return _common(path) or _common(path.rpartition(".")[2])


def _common(path: str) -> str:
    """The meaning of a key that components of one kind share."""
    return entries(defaults.__doc__).get(path, ("", 0))[0]


def _plain(
    section: Mapping[str, Any], prefix: str, meaning_of: Callable[[str], str]
) -> Iterator[Key]:
    """The keys that a section has; a duration is one key."""
    for name, value in section.items():
        path = f"{prefix}{name}"
        if isinstance(value, ConfigDict) and value and set(value) <= {*defaults.DURATION_UNITS}:
            yield Key(path, _duration(value), meaning_of(path))
        elif isinstance(value, ConfigDict) and value:
            yield from _plain(value, f"{path}.", meaning_of)
        else:
            yield Key(path, {} if isinstance(value, ConfigDict) else value, meaning_of(path))


def _duration(section: ConfigDict) -> str | None:
    """A duration as it may be written on a command line."""
    for unit, number in section.items():
        if number is not None:
            return f"{number:g}%" if unit == "percent" else f"{number}{unit}"
    return None


def _arguments(
    kind: Callable[..., Any], section: Mapping[str, Any], path: str, drop: set[str] = frozenset()
) -> Iterator[Key]:
    """The arguments of a constructor, with the values that a section has for them."""
    for name, parameter in inspect.signature(kind).parameters.items():
        if name in GIVEN or name in drop:
            continue
        inner, value = _section_of(kind, name), section.get(name, parameter.default)
        if inner and (isinstance(value, Mapping | ConfigDict) or value is parameter.empty):
            # A section that others are made for, such as the encoder of a decoder.
            own = {} if value is parameter.empty else value
            yield from _arguments(inner, own, f"{path}.{name}", {"image"})
        elif isinstance(value, ConfigDict) and value:
            yield from _plain({name: value}, f"{path}.", lambda _, n=name: meaning(kind, n))
        else:
            missing, text = value is parameter.empty, meaning(kind, name) or _common(name)
            yield Key(f"{path}.{name}", "(needed)" if missing else value, text)


def _objective(section: ConfigDict, path: str) -> Iterator[Key]:
    if "name" not in section or section.name not in OBJECTIVES:
        yield Key(f"{path}.name", section.get("name"), _common("objective.name"))
        return
    for key in ("name", "weight", "data"):
        if key in section:
            yield from _plain(
                {key: section[key]}, f"{path}.", lambda _, k=key: _common(f"objective.{k}")
            )
    for name, part in section.get("parts", {}).items():
        yield from _objective(part, f"{path}.parts.{name}")
    yield from _arguments(OBJECTIVES[section.name], section, path)


def _evaluator(section: ConfigDict, path: str, source: str | None) -> Iterator[Key]:
    kind = EVALUATORS.get(section.get("name"))
    for key in ("name", "every"):
        yield from _plain(
            {key: section.get(key)}, f"{path}.", lambda _, k=key: _common(f"evaluators.{k}")
        )
    if kind is not None:
        yield from _arguments(kind, section, path)
    for key in ("data", "train_data"):
        if key in section:
            yield from _data(section[key], f"{path}.{key}", source)


def _data(section: ConfigDict, path: str, base: str | None = None) -> Iterator[Key]:
    """The keys of a dataset, or of what differs from one with the source `base`."""
    whole, source = base is None, section.get("source", base)
    kind = (
        getattr(import_module(SOURCES[source][0]), SOURCES[source][1], None)
        if (source in SOURCES)
        else None
    )
    own = {n: p.default for n, p in inspect.signature(kind).parameters.items()} if kind else {}
    common = ("where", "limit", "fields") if whole else ()
    known = {**own, **dict.fromkeys(common)} if whole else {}
    for name in dict.fromkeys((*(("source",) if whole else ()), *known, *section)):
        if name == "preprocess":
            yield from _operations(section.preprocess, f"{path}.preprocess")
        elif name == "parts":
            for part, data in section.parts.items():
                yield from _data(data, f"{path}.parts.{part}")
        elif name in section or name in known:
            value = section.get(name, known.get(name))
            value = "(needed)" if value is inspect.Parameter.empty else value
            text = _common(f"data.{name}") or (meaning(kind, name) if name in own else "")
            yield from _plain({name: value}, f"{path}.", lambda _, t=text: t)


def _operations(preprocess: Any, path: str) -> Iterator[Key]:
    for label, given in labelled(preprocess or {}).items():
        op = OPS.get(name_and_number(label)[0])
        if op is not None:
            yield from _arguments(op, given, f"{path}.{label}")
