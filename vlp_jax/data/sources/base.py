"""The interface of a source of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vlp_jax.data.lazy_tensorflow import tf


@dataclass(frozen=True)
class FieldSpec:
    """The type of one field of an example.

    Attributes:
      shape: its dimensions; None where they differ between examples.
      dtype: a NumPy dtype; `object` means byte strings.
    """

    shape: tuple[int | None, ...]
    dtype: np.dtype

    @property
    def is_string(self) -> bool:
        return self.dtype == np.dtype(object)

    @property
    def is_array(self) -> bool:
        """Whether examples can be stacked and put on a device: numbers of one fixed shape."""
        return not self.is_string and None not in self.shape


STRING = FieldSpec((), np.dtype(object))
STRINGS = FieldSpec((None,), np.dtype(object))
Names = Sequence[str] | None


@dataclass(frozen=True, eq=False)
class Blocks:
    """Consecutive runs of examples.

    Attributes:
      sizes: examples of each, int64 [blocks], in the order of the examples.
      window: how many may be open at a time in each of the lanes that read side by side.
      memory, room: bytes of the largest, if open blocks are held in memory, and bytes for all.
    """

    sizes: np.ndarray
    window: int
    memory: int = 0
    room: int = 0


class Source(Protocol):
    """Numbered examples. An example is a flat dict of named fields.

    Reading has two halves, so that Python handles many examples at a time and TensorFlow one:
    `fetch` reads records of many examples in NumPy, and `parse` turns the record of one example
    into its fields inside a tf.data graph. Neither decodes an image.
    """

    @property
    def needs_tensorflow(self) -> bool:
        """False if records are the examples themselves, so that `parse` need not be called."""
        return True

    def __len__(self) -> int: ...

    def fields(self) -> Mapping[str, FieldSpec]:
        """The fields of an example. Encoded images and text are byte strings."""
        ...

    def look_for(self, name: str) -> str:
        """Looks for a field that `fields` may lack; returns why it is not there, or "".

        A source that knows its fields from its first records looks into more of them, and adds the
        field to `fields` if it is there.
        """
        return ""

    def record_fields(self) -> Mapping[str, FieldSpec]:
        """The fields of a record, as `fetch` returns them, without the leading dimension."""
        ...

    def fetch(self, indices: np.ndarray, names: Names = None) -> dict[str, np.ndarray]:
        """The `record_fields` of the examples at `indices`, int64 [n]; every array is [n, ...].

        `names` are the fields that `parse` will be asked for; None for all. Of what only other
        fields need, a record may hold anything. `faults.FAULT` in a record says why it cannot be
        used.
        """
        ...

    def parse(self, record: dict[str, tf.Tensor], names: Sequence[str]) -> dict[str, tf.Tensor]:
        """The fields `names` of one example from its record, in graph mode."""
        ...

    def column(self, name: str) -> np.ndarray:
        """The scalar field `name` of every example, [len(self)], reading no image.

        A masked array where records are damaged or lack the field.
        """
        ...

    def class_names(self, field: str) -> tuple[str, ...] | None:
        """The names of the classes that the integer `field` counts, or None if not known."""
        return None

    def describe(self, index: int) -> str:
        """Where example `index` lies, for messages: a file, or a shard and a record."""
        ...

    def fingerprint(self) -> str:
        """A string that changes if examples get other numbers, so that an order cannot go on."""
        ...

    def blocks(self) -> Blocks | None:
        """The blocks that are best read one by one; None if any order is as good."""
        return None

    def will_read(self, indices: np.ndarray) -> None:
        """Prepares for examples that will be read in a while; returns at once."""


@dataclass(frozen=True, eq=False)
class WrappedSource:
    """Another source, which is asked whatever a subclass does not answer."""

    source: Source

    def __getattr__(self, name: str) -> Any:
        if name == "source":  # while a copy is made of it
            raise AttributeError(name)
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)


def as_plain(value: Any) -> Any:
    """Turns a config value's ml_collections mappings into dicts, all levels deep."""
    if hasattr(value, "items"):
        return {key: as_plain(item) for key, item in value.items()}
    return value
