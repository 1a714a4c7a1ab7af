"""The loaders of `tools.perf.data` in this process: our pipeline, and the limit of tf.data.

A loader yields batches, uint8 [batch, size, size, 3]. It is opened anew for each turn and closed
after it, so that nothing of it runs while another one is measured.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vlp_jax.data.image_ops.resize import Resampler
from vlp_jax.data.lazy_tensorflow import import_tensorflow

CPU_TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds, in which Linux counts
SETTLE_SECONDS = 0.2  # for the threads of a loader that was closed to come to rest


@dataclass(frozen=True)
class Task:
    """The work of every loader: the form of the images, and the cores of the machine.

    Attributes:
      size: side of the image that comes out.
      min_scale: the least area of the random crop, as a fraction of the photo's; the most is 1,
        and its width over its height is 3/4 to 4/3.
      antialias: whether the kernel widens as the image shrinks.
      cores: threads or processes that work at the same time.
    """

    size: int = 224
    batch_size: int = 64
    min_scale: float = 0.5
    antialias: bool = True
    cores: int = 1
    seed: int = 0

    @property
    def preprocess(self) -> dict[str, dict[str, Any]]:
        """The work as the operations of a data config."""
        crop = {"size": self.size, "min_scale": self.min_scale}
        return {
            "decode_image": {},
            "random_resized_crop": {**crop, "method": "bilinear", "antialias": self.antialias},
            "keep": {"fields": ["image"]},
        }


class Loader(Protocol):
    """Something that reads the photos."""

    def open(self, batches: int) -> Iterator[np.ndarray]:
        """A new stream of exactly so many batches."""
        ...


@dataclass
class PipelineLoader:
    """Our pipeline on one source: decoding, a random crop, resizing; no text."""

    config: Mapping[str, Any]
    task: Task
    _read: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        from vlp_jax.data.pipeline import TrainPipeline

        task = self.task
        self._pipeline = TrainPipeline(
            self.config, None, batch_size=task.batch_size, seed=task.seed
        )

    def open(self, batches: int) -> Iterator[np.ndarray]:
        """Reads the batches after the last turn's."""
        start, self._read = self._read, self._read + batches
        stream = self._pipeline.batches(start)
        try:
            yield from (batch["image"] for batch in itertools.islice(stream, batches))
        finally:
            stream.close()


@dataclass
class DecodeLimit:
    """The limit of tf.data: bytes in memory, known crops, one operation that decodes and cuts.

    A call handles a whole batch, one image after the other, in each of as many threads as there
    are cores; that is a little faster than a call an image and `batch` after it.
    """

    photos: list[bytes]
    task: Task

    def __post_init__(self) -> None:
        self._windows = windows(self.photos, self.task)

    def open(self, batches: int) -> Iterator[np.ndarray]:
        """Every photo once, then again from the first."""
        tf = import_tensorflow()
        task = self.task

        @tf.autograph.experimental.do_not_convert
        def process_batch(encoded: Any, window: Any) -> Any:
            return tf.map_fn(
                lambda pair: decode_crop_resize(*pair, task),
                (encoded, window),
                fn_output_signature=tf.uint8,
                parallel_iterations=1,
            )

        options = tf.data.Options()
        options.deterministic = True
        options.threading.private_threadpool_size = task.cores
        # The pool is as large as the cores: an operation that splits itself would only wait.
        options.threading.max_intra_op_parallelism = 1
        dataset = tf.data.Dataset.from_tensor_slices((np.array(self.photos, object), self._windows))
        dataset = dataset.repeat().batch(task.batch_size, drop_remainder=True)
        dataset = dataset.map(process_batch, num_parallel_calls=task.cores, deterministic=True)
        return dataset.take(batches).prefetch(2).with_options(options).as_numpy_iterator()


def windows(photos: list[bytes], task: Task) -> np.ndarray:
    """Draws a crop of each photo, int32 [photos, 4] (top, left, height, width).

    The operation is the one of `random_resized_crop`, so that crops are as large as our pipeline's.
    """
    tf = import_tensorflow()

    @tf.function(autograph=False)
    def draw(encoded: Any, seed: Any) -> Any:
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(encoded),
            tf.zeros([0, 0, 4], tf.float32),
            seed=seed,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(task.min_scale, 1.0),
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.concat([begin[:2], extent[:2]], 0)

    seeds = ((task.seed, number) for number in itertools.count())
    return np.stack(
        [draw(tf.constant(p), tf.constant(s)).numpy() for p, s in zip(photos, seeds, strict=False)]
    )


def decode_crop_resize(encoded: Any, window: Any, task: Task) -> Any:
    """Decodes one JPEG to uint8 [size, size, 3], by the fewest operations of TensorFlow.

    With antialiasing the resize is ours, which calls `ScaleAndTranslate` in the way in which it is
    fastest: the plain call takes three times as long, and would be no limit.
    """
    tf = import_tensorflow()
    size = [task.size, task.size]
    image = tf.io.decode_and_crop_jpeg(encoded, window, channels=3, dct_method="INTEGER_ACCURATE")
    if task.antialias:
        return Resampler("tools.perf.data", task.size, "bilinear", True).fit(image)
    resized = tf.raw_ops.ResizeBilinear(images=image[None], size=size, half_pixel_centers=True)
    return tf.ensure_shape(tf.cast(resized[0] + 0.5, tf.uint8), [*size, 3])


class Speed(NamedTuple):
    """Images a second by the clock, and a second that a processor worked for them.

    Where other jobs share the machine, the second depends far less on them.
    """

    second: float
    cpu_second: float


@dataclass(frozen=True)
class Turn:
    """How many batches a loader is opened for, and which of them are timed.

    Attributes:
      warm_up: batches that are not timed, in which buffers that were filled meanwhile are emptied.
      timed: batches that are.
      rest: batches after them, so that no worker is out of work while the clock runs.
    """

    warm_up: int
    timed: int
    rest: int

    @property
    def total(self) -> int:
        return self.warm_up + self.timed + self.rest

    def speed(self, loader: Loader, batch_size: int) -> Speed:
        """Returns the speed of one turn."""
        stream = loader.open(self.total)
        for _ in range(self.warm_up):
            next(stream)
        begin, cpu_begin = time.perf_counter(), cpu_seconds()
        for _ in range(self.timed):
            next(stream)
        seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu_begin
        # To the end, so that no worker computes into the next turn.
        for _ in stream:
            pass
        del stream
        gc.collect()
        time.sleep(SETTLE_SECONDS)
        images = self.timed * batch_size
        return Speed(images / seconds, images / max(cpu, CPU_TICK))


def cpu_seconds() -> float:
    """Returns the processor time of this process and its workers, all threads together."""
    ticks = 0
    for process in multiprocessing.active_children():
        with contextlib.suppress(OSError):  # it has just ended
            # proc(5): the name, in brackets, may hold spaces; utime and stime are fields 14 and 15.
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks * CPU_TICK
