"""The photos that `tools.perf.data` reads: synthetic, always the same, in every format.

A photo is noise whose amplitude falls as 1/frequency, as in photographs (Field 1987), so that JPEG
takes as many bits for it, and its decoder as much time. Every format holds the same bytes.
"""

from __future__ import annotations

import contextlib
import csv
import io
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlp_jax.errors import UserError

VERSION = 1  # of the photos; another one is another corpus
SHARDS = 8
QUALITY = 90
_CONTRAST = 45  # standard deviation of grey, of 255; with it a photo has about 79 kB


def photo(seed: int, number: int) -> bytes:
    """Makes photo `number`, a JPEG of quality 90, 256 to 500 pixels wide and 256 to 400 high."""
    random = np.random.default_rng([seed, number])
    width, height = int(random.integers(256, 501)), int(random.integers(256, 401))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    # The mean has frequency 0, whose amplitude would be infinite.
    frequency = np.maximum(frequency, 1 / max(height, width))
    shape = (3, *frequency.shape)
    noise = random.standard_normal(shape) + 1j * random.standard_normal(shape)
    fields = np.fft.irfft2(noise / frequency, (height, width))
    grey, blue, red = fields / fields.std(axis=(1, 2), keepdims=True)
    colors = (grey + 0.25 * red, grey - 0.12 * red - 0.12 * blue, grey + 0.25 * blue)
    pixels = np.clip(128 + _CONTRAST * np.stack(colors, -1), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg", quality=QUALITY)
    return stream.getvalue()


@dataclass(frozen=True)
class Corpus:
    """The photos 0 to count - 1 of a seed, and the files of them below a folder.

    Attributes:
      folder: each format lies in a folder of its own in a folder of this one, and is written when
        it is first asked for.
    """

    folder: Path
    count: int
    seed: int = 0

    @property
    def files(self) -> list[Path]:
        """The photos as files of their own."""
        return [self.path("folder") / f"{number:06d}.jpg" for number in range(self.count)]

    @cached_property
    def photos(self) -> list[bytes]:
        """The encoded photos, from the files in the format "folder"."""
        return [file.read_bytes() for file in self.files]

    def path(self, name: str) -> Path:
        """Returns the folder of a format, a name in `WRITERS`; writes it if it is not there."""
        path = self.folder / f"photos-v{VERSION}-{self.count}-seed{self.seed}" / name
        if not path.exists():
            # Renamed when it is whole: a run that was stopped leaves nothing that looks finished.
            unfinished = path.with_name(f"{name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            try:
                unfinished.mkdir(parents=True)
                WRITERS[name](self, unfinished)
                unfinished.rename(path)
            except OSError as error:
                raise UserError(f"the photos cannot be written to {path}: {error}") from None
        return path

    def shards(self) -> Iterator[tuple[str, list[Photo]]]:
        """Yields (name without suffix, photos) of each shard; no shard is empty."""
        photos = [
            Photo(f"{number:06d}", encoded, caption(number))
            for number, encoded in enumerate(self.photos)
        ]
        for shard, part in enumerate(np.array_split(range(self.count), min(SHARDS, self.count))):
            yield f"photos-{shard:03d}", [photos[number] for number in part]


class Photo(NamedTuple):
    """One example of a file."""

    key: str
    encoded: bytes
    caption: str


def caption(number: int) -> str:
    """Returns the caption of a photo, which no measurement reads."""
    return f"synthetic photo number {number}"


def _write_folder(corpus: Corpus, path: Path) -> None:
    with (path / "captions.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("path", "caption"))
        for number in range(corpus.count):
            file = path / f"{number:06d}.jpg"
            file.write_bytes(photo(corpus.seed, number))
            rows.writerow((file.name, caption(number)))


def _write_webdataset(corpus: Corpus, path: Path) -> None:
    for name, photos in corpus.shards():
        with tarfile.open(path / f"{name}.tar", "w") as tar:
            for one in photos:
                for suffix, content in (("jpg", one.encoded), ("txt", one.caption.encode())):
                    member = tarfile.TarInfo(f"{one.key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _serialized(one: Photo) -> bytes:
    import tensorflow as tf

    feature = {
        name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        for name, value in (("image", one.encoded), ("caption", one.caption.encode()))
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def _write_tfrecord(corpus: Corpus, path: Path) -> None:
    import tensorflow as tf

    for name, photos in corpus.shards():
        with tf.io.TFRecordWriter(str(path / f"{name}.tfrecord")) as writer:
            for one in photos:
                writer.write(_serialized(one))


def _write_array_record(corpus: Corpus, path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    for name, photos in corpus.shards():
        # One record a group: a group is what a random access reads.
        writer = ArrayRecordWriter(str(path / f"{name}.array_record"), "group_size:1")
        for one in photos:
            writer.write(_serialized(one))
        writer.close()


def _write_parquet(corpus: Corpus, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for name, photos in corpus.shards():
        images = [{"bytes": one.encoded, "path": f"{one.key}.jpg"} for one in photos]
        texts = [one.caption for one in photos]
        table = pa.table({"image": pa.array(images, image), "caption": texts})
        pyarrow.parquet.write_table(table, path / f"{name}.parquet", row_group_size=100)


def _write_tfds(corpus: Corpus, path: Path) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    features = {"image": tfds.features.Image(encoding_format="jpeg"), "text": tfds.features.Text()}
    examples = [
        (number, {"image": image, "text": caption(number)})
        for number, image in enumerate(corpus.photos)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it says at length what it does
        tfds.dataset_builders.store_as_tfds_dataset(
            name="bench_photos",
            version="1.0.0",
            data_dir=path,
            features=tfds.features.FeaturesDict(features),
            split_datasets={"train": examples},
            file_format="array_record",
        )


# format -> what writes it into an empty folder
WRITERS: dict[str, Callable[[Corpus, Path], None]] = {
    "folder": _write_folder,
    "webdataset": _write_webdataset,
    "tfrecord": _write_tfrecord,
    "array_record": _write_array_record,
    "parquet": _write_parquet,
    "tfds": _write_tfds,
}
# Formats of shards: the pattern of their files, the fields of image and text.
SHARDED = {
    "webdataset": ("*.tar", "jpg", "txt"),
    "tfrecord": ("*.tfrecord", "image", "caption"),
    "array_record": ("*.array_record", "image", "caption"),
    "parquet": ("*.parquet", "image", "caption"),
}
# The parts of the mixture that is measured, and their weights.
MIXED = {"folder": 2.0, "webdataset": 1.0}
NAMES = ("arrays", "folder", "tfds", *SHARDED, "mixture")


def data_config(name: str, corpus: Corpus, preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the data config of a source in `NAMES` that reads the corpus; writes its files."""
    if name == "mixture":
        parts = {
            part: {"weight": weight, **data_config(part, corpus, preprocess)}
            for part, weight in MIXED.items()
        }
        return {"source": name, "parts": parts}
    config: dict[str, Any] = {"source": name, "preprocess": dict(preprocess)}
    if name == "arrays":
        return config | {"arrays": {"image": corpus.photos}}
    path = corpus.path(name)
    if name == "folder":
        return config | {"path": str(path), "split": "all"}
    if name == "tfds":
        return config | {"dataset": "bench_photos", "split": "train", "data_dir": str(path)}
    pattern, image, text = SHARDED[name]
    return config | {"path": str(path / pattern), "fields": {"image": image, "text": text}}
