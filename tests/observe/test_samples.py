"""Samples on their way to the writers."""

from unittest.mock import MagicMock

import numpy as np
import pytest

from vlp_jax.observe.samples import Sample, write_samples
from vlp_jax.observe.writers import MultiWriter, TensorBoardWriter


def picture(side=8):
    return np.full((side, side, 3), 100, np.uint8)


def test_boxes_are_drawn_where_they_are():
    sample = Sample(picture(64), boxes=np.array([[0.25, 0.5, 0.75, 1.0]]), box_labels=("cat",))
    drawn = sample.drawn()
    assert drawn.shape == (256, 256, 3)  # enlarged, so that lines and words can be seen
    changed = (drawn != 100).any(axis=-1)
    rows, columns = np.nonzero(changed)
    assert rows.min() == 64 and 190 <= rows.max() <= 192
    assert columns.min() == 128 and 253 <= columns.max() <= 255
    assert changed[64, 128:255].all() and not changed[:63].any() and not changed[:, :127].any()
    assert Sample(picture()).drawn() is not None and (Sample(picture()).drawn() == 100).all()
    with pytest.raises(ValueError, match="without a picture"):
        Sample(None).drawn()


def test_pictures_and_a_table_of_texts_are_written():
    writer = MagicMock()
    samples = [
        Sample(picture(), {"model": "a | b\nc", "reference": "d"}),
        Sample(None, {"model": "e"}),
    ]
    write_samples(writer, 7, "captions", samples)
    ((step, images),) = [call.args for call in writer.write_images.call_args_list]
    assert step == 7 and list(images) == ["samples/captions/0"]
    ((step, texts),) = [call.args for call in writer.write_text.call_args_list]
    assert texts == {
        "samples/captions": "||model|reference|\n|---|---|---|\n|0|a \\| b c|d|\n|1|e||"
    }
    writer = MagicMock()
    write_samples(writer, 7, "captions", [])
    assert not writer.write_images.called and not writer.write_text.called


def test_tensorboard_takes_them(tmp_path):
    writer = MultiWriter([TensorBoardWriter(tmp_path)])
    write_samples(writer, 3, "captions", [Sample(picture(), {"model": "a star"})])
    writer.close()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    assert b"samples/captions/0" in content and b"a star" in content
