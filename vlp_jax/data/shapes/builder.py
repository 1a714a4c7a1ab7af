"""The tensorflow_datasets builder of `shapes`, and `prepare`, which writes the dataset once.

Importing this module imports tensorflow_datasets and registers the builder, so that afterwards
`tfds.builder("shapes/tiny", data_dir=...)` finds it too.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from vlp_jax import errors
from vlp_jax.data.shapes import clips, records, scenes, vocabulary

FILE_FORMAT = "array_record"


class ShapesConfig(tfds.core.BuilderConfig):
    """A config named as one of `records.SPECS`."""

    def __init__(self, spec: records.Spec):
        super().__init__(name=spec.name, description=spec.description)
        self.spec = spec


def _labels(**names: tuple[str, ...]) -> dict[str, tfds.features.ClassLabel]:
    return {field: tfds.features.ClassLabel(names=list(known)) for field, known in names.items()}


def _image() -> tfds.features.Image:
    size = scenes.IMAGE_SIZE
    return tfds.features.Image(shape=(size, size, 3), encoding_format="jpeg")


_OBJECT = {
    "label": vocabulary.CLASS_NAMES,
    "shape": vocabulary.SHAPES,
    "color": vocabulary.COLORS,
    "texture": vocabulary.TEXTURES,
}


def _scene_features() -> dict[str, Any]:
    names = _labels(**_OBJECT, size=vocabulary.SIZES, position=vocabulary.POSITIONS)
    text = {"question": tfds.features.Text(), "answer": tfds.features.Text()}
    answers = _labels(answer_label=vocabulary.ANSWERS, kind=vocabulary.QUESTION_KINDS)
    return {
        "image": _image(),
        "objects": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature(), **names}),
        "questions": tfds.features.Sequence({**text, **answers}),
    }


def _clip_features() -> dict[str, Any]:
    boxes = tfds.features.Tensor(shape=(clips.NUM_FRAMES, 4), dtype=np.float32)
    names = _labels(**_OBJECT, motion=vocabulary.MOTIONS)
    return {
        "video": tfds.features.Sequence(_image(), length=clips.NUM_FRAMES),
        **_labels(motion=vocabulary.MOTIONS),
        "objects": tfds.features.Sequence({"bboxes": boxes, **names}),
    }


class _DeterministicWriter(tfds.core.ExampleWriter):
    """Writes the features of each record sorted: their order differs between processes."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        ordered = (
            (key, tf_example_pb2.Example.FromString(e).SerializeToString(deterministic=True))
            for key, e in examples
        )
        return super().write(path, ordered)


class Shapes(tfds.core.GeneratorBasedBuilder):
    """Rendered scenes of one to four objects with captions, boxes, attributes and questions."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    BUILDER_CONFIGS = [ShapesConfig(spec) for spec in records.SPECS.values()]
    # Stated, because to infer it tensorflow_datasets 4.9.10 needs importlib_resources, which it
    # does not install.
    code_path = pathlib.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        is_video = self.builder_config.spec.is_video
        features = {
            "id": tfds.features.Text(),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            **_labels(label=vocabulary.CLASS_NAMES, background=vocabulary.BACKGROUNDS),
            "num_objects": tfds.features.Scalar(dtype=np.int64),
            "unseen": tfds.features.Scalar(dtype=np.bool_),
        }
        features |= _clip_features() if is_video else _scene_features()
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            # Records are independent draws, and record i has to be scene i.
            disable_shuffling=True,
        )

    def _example_writer(self) -> tfds.core.ExampleWriter:
        return _DeterministicWriter(file_format=self.info.file_format)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in self.builder_config.spec.sizes}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, record in enumerate(records.stream_records(self.builder_config.spec, split)):
            for obj in record["objects"]:
                if "bbox" in obj:
                    obj["bbox"] = tfds.features.BBox(*obj["bbox"])
            yield index, record


@contextlib.contextmanager
def _one_at_a_time(directory: str) -> Iterator[None]:
    """Waits while another process of this machine prepares in `directory`.

    Where files cannot be locked, two may prepare at once: each writes in a directory of its own and
    the first to finish gives its directory the final name.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, ".prepare.lock"), "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(config_name: str = "default", data_dir: str | os.PathLike[str] = "data") -> Shapes:
    """The builder of `shapes/config_name`; writes the dataset into `data_dir` if it is absent.

    What an interrupted call leaves behind is never taken for the dataset, and calls at the same
    time are safe: files are written in a directory of another name, which is renamed at the end.

    Args:
      config_name: "default", "tiny", "video" or "video_tiny".
      data_dir: a local directory, made if absent. Files are `data_dir/shapes/config_name/1.0.0`.

    Raises:
      UserError: there is no such config, or the directory cannot be written.
    """
    if config_name not in records.SPECS:
        raise errors.UserError(
            errors.unknown_key_message(config_name, records.SPECS, "the configs of `shapes`")
        )
    data_dir = os.path.abspath(os.path.expanduser(os.fspath(data_dir)))
    builder = _builder(config_name, data_dir)
    if _is_prepared(builder):
        return builder
    try:
        with _one_at_a_time(os.path.join(data_dir, Shapes.name, config_name)):
            builder = _builder(config_name, data_dir)
            if not _is_prepared(builder):
                print(f"preparing shapes/{config_name} in {data_dir} (once) ...", flush=True)
                _download_and_prepare(builder)
    except OSError as error:
        raise errors.UserError(
            f"cannot write shapes/{config_name} into {data_dir}: {error}; "
            "choose another data_dir or make room in this one"
        ) from error
    return _builder(config_name, data_dir)


def _builder(config_name: str, data_dir: str) -> Shapes:
    return Shapes(config=config_name, data_dir=data_dir, file_format=FILE_FORMAT)


def _is_prepared(builder: Shapes) -> bool:
    # The directory gets its name when all is in it. `builder.is_prepared()` asks the same, and
    # warns when the answer is no.
    return (builder.data_path / "dataset_info.json").exists()


def _download_and_prepare(builder: Shapes) -> None:
    # Progress bars would fill the log of a job.
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        # What tensorflow_datasets prints speaks of a download; there is none.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_config=config)
    except OSError:
        # Another machine was first to give its directory the final name: then that one is used.
        if not _is_prepared(builder):
            raise
