"""What an objective says of a batch that lacks a field."""

import dataclasses

import jax
import numpy as np
import pytest

from vlp_jax.objectives.base import Field, Objective, check_reads

SPEC = {
    "image_file": jax.ShapeDtypeStruct((8,), np.int32),
    "label": jax.ShapeDtypeStruct((8,), np.int64),
}


@dataclasses.dataclass(frozen=True)
class Reader(Objective):
    """Reads one field."""

    name: str
    field: Field

    @property
    def reads(self):
        return {self.name: self.field}


@pytest.mark.parametrize(
    ("name", "field", "operation"),
    [
        ("image", Field.pixels((4, 4)), "decode_image and a resize or crop"),
        ("prefix", Field.tokens(8), "tokenize"),
        ("answer", Field.labels(3, "answers"), "data.fields"),
    ],
)
def test_a_missing_field_names_those_that_there_are_and_what_makes_it(name, field, operation):
    with pytest.raises(ValueError, match=f"it has no '{name}', which the objective") as caught:
        check_reads(Reader(name, field), SPEC)
    message = str(caught.value)
    assert field.kind in message and "there are: image_file, label" in message
    assert operation in message and "\n" not in message


def test_a_field_of_another_length_is_refused():
    spec = {**SPEC, "prefix": jax.ShapeDtypeStruct((8, 16), np.int32)}
    with pytest.raises(ValueError, match=r"'prefix' is int32\[16\] .* takes int32\[8\]"):
        check_reads(Reader("prefix", Field.tokens(8)), spec)
    check_reads(Reader("prefix", Field.tokens(16)), spec)
