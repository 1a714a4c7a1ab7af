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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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

    @cached_property
    def photos(self) -> list[bytes]:
        """The encoded photos, from the files in the format "folder"."""
        files = self.path("folder")
        return [(files / _file_name(number)).read_bytes() for number in range(self.count)]

    @property
    def files(self) -> list[str]:
        """The photos as files of their own."""
        files = self.path("folder")
        return [str(files / _file_name(number)) for number in range(self.count)]

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

    def shards(self) -> list[range]:
        """Returns the numbers of the photos in each shard; no shard is empty."""
        bounds = np.linspace(0, self.count, min(SHARDS, self.count) + 1).astype(int)
        return [range(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]


def caption(number: int) -> str:
    """Returns the caption of a photo, which no measurement reads."""
    return f"synthetic photo number {number}"


def _file_name(number: int) -> str:
    return f"{number:06d}.jpg"


def _write_folder(corpus: Corpus, path: Path) -> None:
    with (path / "captions.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("path", "caption"))
        for number in range(corpus.count):
            (path / _file_name(number)).write_bytes(photo(corpus.seed, number))
            rows.writerow((_file_name(number), caption(number)))


def _write_webdataset(corpus: Corpus, path: Path) -> None:
    for shard, numbers in enumerate(corpus.shards()):
        with tarfile.open(path / f"photos-{shard:03d}.tar", "w") as tar:
            for number in numbers:
                members = {"jpg": corpus.photos[number], "txt": caption(number).encode()}
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{number:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _serialized(corpus: Corpus, numbers: Iterable[int]) -> Iterable[bytes]:
    import tensorflow as tf

    for number in numbers:
        values = {"image": corpus.photos[number], "caption": caption(number).encode()}
        feature = {
            name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
            for name, value in values.items()
        }
        yield tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def _write_tfrecord(corpus: Corpus, path: Path) -> None:
    import tensorflow as tf

    for shard, numbers in enumerate(corpus.shards()):
        with tf.io.TFRecordWriter(str(path / f"photos-{shard:03d}.tfrecord")) as writer:
            for record in _serialized(corpus, numbers):
                writer.write(record)


def _write_array_record(corpus: Corpus, path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    for shard, numbers in enumerate(corpus.shards()):
        # One record a group: a group is what a random access reads.
        writer = ArrayRecordWriter(str(path / f"photos-{shard:03d}.array_record"), "group_size:1")
        for record in _serialized(corpus, numbers):
            writer.write(record)
        writer.close()


def _write_parquet(corpus: Corpus, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for shard, numbers in enumerate(corpus.shards()):
        images = [{"bytes": corpus.photos[n], "path": _file_name(n)} for n in numbers]
        texts = [caption(number) for number in numbers]
        table = pa.table({"image": pa.array(images, image), "caption": texts})
        file = path / f"photos-{shard:03d}.parquet"
        pyarrow.parquet.write_table(table, file, row_group_size=100)


def _write_tfds(corpus: Corpus, path: Path) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    features = {"image": tfds.features.Image(encoding_format="jpeg"), "text": tfds.features.Text()}
    with contextlib.redirect_stdout(io.StringIO()):  # it says at length what it does
        tfds.dataset_builders.store_as_tfds_dataset(
            name="bench_photos",
            version="1.0.0",
            data_dir=path,
            features=tfds.features.FeaturesDict(features),
            split_datasets={
                "train": [
                    (number, {"image": image, "text": caption(number)})
                    for number, image in enumerate(corpus.photos)
                ]
            },
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


def _folder(corpus: Corpus) -> dict[str, Any]:
    return {"source": "folder", "path": str(corpus.path("folder")), "split": "all"}


def _arrays(corpus: Corpus) -> dict[str, Any]:
    return {"source": "arrays", "arrays": {"image": corpus.photos}}


def _tfds(corpus: Corpus) -> dict[str, Any]:
    path = str(corpus.path("tfds"))
    return {"source": "tfds", "dataset": "bench_photos", "split": "train", "data_dir": path}


def _files(source: str, pattern: str, image: str, text: str) -> Callable[[Corpus], dict[str, Any]]:
    def config(corpus: Corpus) -> dict[str, Any]:
        path = str(corpus.path(source) / pattern)
        return {"source": source, "path": path, "fields": {"image": image, "text": text}}

    return config


# source -> its data config, but for `preprocess`
CONFIGS: dict[str, Callable[[Corpus], dict[str, Any]]] = {
    "arrays": _arrays,
    "folder": _folder,
    "tfds": _tfds,
    "webdataset": _files("webdataset", "*.tar", "jpg", "txt"),
    "tfrecord": _files("tfrecord", "*.tfrecord", "image", "caption"),
    "array_record": _files("array_record", "*.array_record", "image", "caption"),
    "parquet": _files("parquet", "*.parquet", "image", "caption"),
}
# The parts of the mixture that is measured, and their weights.
MIXED = {"folder": 2.0, "webdataset": 1.0}
NAMES = (*CONFIGS, "mixture")


def data_config(name: str, corpus: Corpus, preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the data config of a source in `NAMES` that reads the corpus; writes its files."""
    if name != "mixture":
        return {**CONFIGS[name](corpus), "preprocess": dict(preprocess)}
    parts = {
        part: {"weight": weight, **data_config(part, corpus, preprocess)}
        for part, weight in MIXED.items()
    }
    return {"source": "mixture", "parts": parts}
