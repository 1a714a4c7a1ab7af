"""Reads the two forms of `data.preprocess`, a list of operations on an example with arguments.

A sequence of (name, arguments) pairs runs as written. A mapping of names to arguments has no order,
because ml_collections sorts its keys: `vlp_jax.data.ops` runs it in the order of its table. In both
forms an operation has a label: its name, and for a further one of the same name "name#2" and so on.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vlp_jax.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# For smoke tests: arguments that name fields which the embedded data does not have. They are
# removed.
SMOKE_OTHER_FIELDS = {
    "choose_text": ("field", "fields", "weights"),
    "choose_question": ("question", "answer", "kind"),
    "random_resized_crop": ("box_fields", "min_box_share"),
    "resize_shortest_and_random_crop": ("box_fields", "min_box_share"),
    "resize_shortest_and_center_crop": ("box_fields", "min_box_share"),
}
# Operations that read a stored field -> the embedded data's field to read instead.
SMOKE_READ = {"decode_image": "image", "tokenize": "text"}
SMOKE_WITHOUT = ("pad_rows",)  # the embedded data has no lists of numbers under usual names


def is_sequence(preprocess: Any) -> bool:
    """Whether a config's `preprocess` is a sequence of pairs."""
    return isinstance(preprocess, list | tuple)


def labelled(preprocess: Any) -> dict[str, Any]:
    """Returns label -> arguments of operations, in the config's order; UserError for no form."""
    if not is_sequence(preprocess):
        operations = dict(preprocess.items())
    else:
        operations, counts = {}, Counter()
        for pair in preprocess:
            if not is_sequence(pair) or len(pair) != 2 or not isinstance(pair[0], str):
                raise UserError(
                    f"data.preprocess: a list holds (operation, arguments) pairs, such as "
                    f'("resize", {{"size": 224}}), got {pair!r}'
                )
            name = pair[0]
            if "#" in name:
                raise UserError(
                    f"data.preprocess: a list repeats an operation by its plain name, "
                    f"{name.partition('#')[0]!r}, got {name!r}"
                )
            counts[name] += 1
            operations[name if counts[name] == 1 else f"{name}#{counts[name]}"] = pair[1]
    for label, arguments in operations.items():
        if arguments is not None and not hasattr(arguments, "items"):
            raise UserError(
                f"data.preprocess.{label}: the arguments must be a mapping, got {arguments!r}"
            )
    return {label: {} if value is None else value for label, value in operations.items()}


def name_and_number(label: str) -> tuple[str, int]:
    """Splits a label into the operation's name and its number among equal names, from 1."""
    name, mark, number = str(label).partition("#")
    if not mark:
        return name, 1
    if not number.isdecimal() or int(number) < 2:
        raise UserError(
            f"data.preprocess.{label}: a further {name} is {name}#2, then {name}#3 and so on"
        )
    return name, int(number)


def as_pairs(operations: Mapping[str, Any]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Converts operations by label to (name, arguments) pairs."""
    return tuple((name_and_number(k)[0], plain(v)) for k, v in operations.items())


def plain(value: Any) -> Any:
    """Copies a value with mappings as dicts and sequences as tuples."""
    if hasattr(value, "items"):
        return {key: plain(item) for key, item in value.items()}
    return tuple(plain(item) for item in value) if is_sequence(value) else value


def normalize(config: ConfigDict) -> None:
    """Turns the sequences of pairs in an unlocked config into tuples of plain values, in place."""
    for key, value in list(config.items()):
        if hasattr(value, "items"):
            normalize(value)
        elif key == "preprocess" and is_sequence(value):
            del config[key]
            config[key] = as_pairs(labelled(value))


@contextlib.contextmanager
def as_sections(config: ConfigDict, path: str) -> Iterator[None]:
    """Turns a sequence of pairs on the dotted `path` into a section by label, until the exit."""
    section = config
    *parents, _ = path.split(".")
    for key in parents:
        if not hasattr(section, "items") or key not in section:
            break
        if key == "preprocess" and is_sequence(section[key]):
            break
        section = section[key]
    else:
        yield
        return
    if not hasattr(section, "items") or key not in section:
        yield
        return
    before = section[key]
    operations = labelled(before)
    with config.unlocked():
        del section[key]
        section[key] = dict(operations)  # which becomes a ConfigDict
    try:
        yield
        changed = section[key]
        order = [label for label in operations if label in changed]
        order += [label for label in changed if label not in operations]
        before = as_pairs({label: changed[label] for label in order})
    # Also after an error, when `before` is still the old sequence.
    finally:
        with config.unlocked():
            del section[key]
            section[key] = before


def smoke_preprocess(preprocess: Any, image_size: int | None) -> Any:
    """Adapts operations to the embedded data, and keeps their form (list or mapping).

    Images get `image_size`. Arguments that name fields of the real data are removed. An operation
    that reads such a field reads `image` or `text` instead, before others change these.
    """
    kept, moved = [], []
    made: set[str] = set()
    operations = labelled(preprocess)
    order = operations if is_sequence(preprocess) else sorted(operations, key=name_and_number)
    for label in order:
        name = name_and_number(label)[0]
        gone = SMOKE_OTHER_FIELDS.get(name, ())
        arguments = {k: v for k, v in operations[label].items() if k not in gone}
        if name in SMOKE_WITHOUT:
            continue
        if "size" in arguments:
            arguments["size"] = image_size
        field, into = arguments.get("field"), arguments.get("into")
        read = SMOKE_READ.get(name)
        if read and field is not None and field != read and field not in made:
            moved.append((name, {**arguments, "field": read, "into": into or field}))
        else:
            kept.append((name, arguments))
        made.add(into or field or read or "")
    pairs = [(name, plain(arguments)) for name, arguments in (*moved, *kept)]
    chosen = any(name == "choose_text" for name, _ in kept)
    if not chosen or (moved and is_sequence(preprocess)):
        pairs.insert(0, ("choose_text", {}))  # without it the embedded data has no field `text`
    return tuple(pairs) if is_sequence(preprocess) else labelled(pairs)
