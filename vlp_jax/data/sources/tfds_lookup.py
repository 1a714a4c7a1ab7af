"""Looks for datasets of tensorflow_datasets on disk, without any network access."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError

EMBEDDED = "shapes"
ARRAY_RECORD = "array_record"
FORMATS = (ARRAY_RECORD, "tfrecord")  # the formats that are read here, the best first


def find_builder(dataset: str, data_dir: str | None) -> Any:
    """The tensorflow_datasets builder of a prepared dataset.

    Only files are consulted (never a bucket or a community index), so that a wrong name fails at
    once on a machine without a network.

    Args:
      dataset: "name", "name/config" or "name/config:version".
      data_dir: where prepared datasets lie; None is the default of tensorflow_datasets.

    Raises:
      UserError: if it is not there, or not in ArrayRecord or TFRecord files.
    """
    import tensorflow_datasets as tfds

    root = data_dir or str(tfds.core.constants.DATA_DIR)
    if "://" not in root:
        root = str(Path(root).expanduser())
    name, _, config = dataset.partition("/")
    if name == EMBEDDED:
        from vlp_jax.data.shapes.builder import prepare

        return prepare(config or "default", root)
    try:
        builder = tfds.core.read_only_builder.builder_from_files(dataset, data_dir=root)
    except tfds.core.DatasetNotFoundError:
        raise UserError(_not_found(dataset, root)) from None
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"data.dataset={dataset!r} is not a dataset name: {reason}") from None
    formats = [_value(builder.info.file_format)]
    formats += [_value(each) for each in builder.info.alternative_file_formats]
    readable = [name for name in FORMATS if name in formats]
    if not readable:
        raise UserError(
            f"dataset {dataset!r} in {root} has {formats[0]} files, which are not read here; "
            f"prepare it as ArrayRecord in another folder and set data.data_dir to it: "
            f"{_command(dataset, '<new folder>')}"
        )
    # The builder reads the format it was prepared in first, which may be the slower one.
    if formats[0] != readable[0]:
        builder = tfds.core.read_only_builder.builder_from_files(
            dataset, data_dir=root, file_format=readable[0]
        )
    return builder


def file_format(builder: Any) -> str:
    """The format of a builder's files, one of `FORMATS`."""
    return _value(builder.info.file_format)


def _value(each: Any) -> str:
    return getattr(each, "value", each)


def split_info(builder: Any, dataset: str, split: str) -> Any:
    """The tensorflow_datasets split info of `split`, a name or a slice.

    Raises:
      UserError: for a split that the dataset lacks, a malformed slice, or an empty one.
    """
    splits = builder.info.splits
    listing = ", ".join(f"{name} ({info.num_examples})" for name, info in splits.items())
    try:
        info = splits[split]
        sizes = [instruction.take for instruction in info.file_instructions]
    except (KeyError, ValueError):
        raise UserError(
            f"data.split={split!r} is not a split of {dataset}{_nearest(split, splits)} "
            f"(splits: {listing}; slices look like train[:10%])"
        ) from None
    if not sizes or min(sizes) < 0 or sum(sizes) < 1:
        raise UserError(f"data.split={split!r} of {dataset} holds no examples (splits: {listing})")
    return info


def _not_found(dataset: str, root: str) -> str:
    import tensorflow_datasets as tfds

    name = dataset.partition("/")[0].partition(":")[0]
    there = _folders(Path(root) / name)
    if there:
        return (
            f"dataset {dataset!r} is not in {root}; of {name!r} there is: {', '.join(there)}; "
            f"set data.dataset to name/config:version"
        )
    known = tfds.list_builders(with_community_datasets=False)
    if name in known:
        return (
            f"dataset {dataset!r} is not prepared in {root}; prepare it with: "
            f"{_command(dataset, root)}"
        )
    hint = _nearest(name, [*known, *_folders(Path(root)), EMBEDDED])
    return (
        f"no dataset is named {name!r}{hint} (looked in {root} and among the names of "
        f"tensorflow_datasets; the embedded one is {EMBEDDED!r})"
    )


def _folders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


def _nearest(name: str, known: Any) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _command(dataset: str, data_dir: str) -> str:
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{dataset}', data_dir='{data_dir}', file_format='{ARRAY_RECORD}')"
        '.download_and_prepare()"'
    )
