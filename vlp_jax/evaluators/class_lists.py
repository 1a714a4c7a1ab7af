"""Names of classes and templates of prompts, from a config or from files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from etils import epath

from vlp_jax.errors import UserError

# Where the name goes: {}, or {c} as in CLIP_benchmark's zeroshot_classification_templates.txt.
PLACE = re.compile(r"\{c?\}")


def lines(value: Sequence[str] | str, key: str) -> tuple[str, ...]:
    """`value`, or the lines of the file that it names, without empty ones and # comments.

    Raises:
      UserError: the file cannot be read, or has no lines.
    """
    if not isinstance(value, str):
        return tuple(value)
    try:
        text = epath.Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: cannot read the file {value}: {error}") from error
    stripped = (line.strip() for line in text.splitlines())
    found = tuple(line for line in stripped if line and not line.startswith("#"))
    if not found:
        raise UserError(f"{key}: the file {value} has no lines")
    return found


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """`templates`; raises UserError if there are none, or one has no place for the class."""
    bad = [t for t in templates if not PLACE.search(t)]
    if bad or not templates:
        raise UserError(f"zero-shot templates need {{}} for the class; got {bad or 'none'}")
    return tuple(templates)


def fill(template: str, name: str) -> str:
    """`template` with the name of a class; all its other characters stay, braces too."""
    return PLACE.sub(lambda _: name, template)


def check_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """`names`; raises UserError that lists those that occur twice.

    Two classes of the same name have the same prompts, and no model can tell them apart.
    """
    twice = [f"{name!r} ({count} times)" for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"class_names: {', '.join(twice)}: every class needs a name of its own, since classes "
            "of one name cannot be told apart"
        )
    return tuple(names)
