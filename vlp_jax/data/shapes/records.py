"""The record of each index of each config, as plain Python, numpy and JPEG bytes.

Run as a module this is one rendering process: it writes its share of the records of a split to
stdout, pickled, for `stream_records` in the process that builds the dataset. Such a process imports
numpy, Pillow and jaxtyping alone, and does not import the main module of the program again as a
pool of `multiprocessing` would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from vlp_jax.data.shapes import captions, clips, geometry, questions, render, scenes, vocabulary

CHUNK = 64
_MIN_CHUNKS_FOR_PROCESSES = 20

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Spec:
    """One config of the dataset: records per split, and whether they are clips."""

    name: str
    sizes: dict[str, int]
    is_video: bool
    description: str
    seed: int = 0


SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(
            "default",
            {"train": 20_000, "validation": 1_000, "test": 3_000},
            False,
            "Pictures of 1 to 4 objects.",
        ),
        Spec(
            "tiny",
            {"train": 512, "validation": 64, "test": 256},
            False,
            "The first pictures of each split of `default`, for tests.",
        ),
        Spec(
            "video",
            {"train": 2_000, "validation": 200, "test": 400},
            True,
            "Clips of 8 frames of 1 or 2 moving objects.",
        ),
        Spec(
            "video_tiny",
            {"train": 64, "validation": 16, "test": 32},
            True,
            "The first clips of each split of `video`, for tests.",
        ),
    )
}


def _box(obj: scenes.SceneObject) -> tuple[float, float, float, float]:
    """(ymin, xmin, ymax, xmax) in [0, 1]."""
    left, top, right, bottom = (v / geometry.IMAGE_SIZE for v in obj.box)
    return top, left, bottom, right


def scene_record(seed: int, split: str, index: int) -> Record:
    """The record of a picture; boxes are (ymin, xmin, ymax, xmax) in [0, 1], the image is JPEG."""
    scene = scenes.sample_scene(seed, split, index)
    streams = [scenes.generator(seed, split, index, s) for s in range(4)]
    image = render.render_scene(scene, streams[scenes.STREAM_PIXELS])
    asked = questions.scene_questions(scene, split, streams[scenes.STREAM_QUESTIONS])
    return {
        "id": f"{split}-{index:06d}",
        "image": render.encode_jpeg(image),
        "captions": captions.scene_captions(scene, streams[scenes.STREAM_CAPTIONS]),
        "label": scene.objects[0].class_name,
        "num_objects": len(scene.objects),
        "unseen": scene.unseen,
        "background": scene.background.name,
        "objects": [
            {
                "bbox": _box(o),
                "label": o.class_name,
                "shape": o.shape,
                "color": o.color,
                "size": o.size,
                "texture": o.texture,
                "position": o.position,
            }
            for o in scene.objects
        ],
        "questions": [vars(q) | {"answer_label": q.answer} for q in asked],
    }


def clip_record(seed: int, split: str, index: int) -> Record:
    """The record of a clip: JPEG bytes of each frame, captions, motions, boxes (frames, 4)."""
    clip = clips.sample_clip(seed, split, index)
    frames = clips.render_clip(clip, scenes.generator(seed, split, index, scenes.STREAM_PIXELS))
    texts = scenes.generator(seed, split, index, scenes.STREAM_CAPTIONS)
    main = clip.objects[0]
    return {
        "id": f"{split}-{index:06d}",
        "video": [render.encode_jpeg(frame) for frame in frames],
        "captions": clips.clip_captions(clip, texts),
        "label": main.start.class_name,
        "motion": main.motion,
        "num_objects": len(clip.objects),
        "unseen": clip.unseen,
        "background": clip.background.name,
        "objects": [
            {
                "bboxes": np.array([_box(f) for f in o.frames], np.float32),
                "label": o.start.class_name,
                "shape": o.start.shape,
                "color": o.start.color,
                "texture": o.start.texture,
                "motion": o.motion,
            }
            for o in clip.objects
        ],
    }


def make_record(spec: Spec, split: str, index: int) -> Record:
    """The record number `index` of `split`: a pure function of (`spec.seed`, split, index)."""
    if split not in vocabulary.SPLITS:
        raise ValueError(f"no split {split!r}; there are {vocabulary.SPLITS}")
    make: Callable[[int, str, int], Record] = clip_record if spec.is_video else scene_record
    return make(spec.seed, split, index)


def _chunk(spec: Spec, split: str, number: int) -> list[Record]:
    stop = min((number + 1) * CHUNK, spec.sizes[split])
    return [make_record(spec, split, i) for i in range(number * CHUNK, stop)]


def default_num_workers() -> int:
    """The number of rendering processes: one for each CPU of this process, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def stream_records(spec: Spec, split: str, num_workers: int | None = None) -> Iterator[Record]:
    """All records of a split, in order of their index, whatever the number of processes.

    Args:
      spec: a value of `SPECS`.
      split: a name of `vocabulary.SPLITS`.
      num_workers: rendering processes; 0 renders in this one. None takes one per CPU, and 0 for a
        split that is rendered sooner than the processes start.

    Raises:
      RuntimeError: a rendering process ended early; its own error is on stderr.
    """
    num_chunks = -(-spec.sizes[split] // CHUNK)
    if num_workers is None:
        num_workers = default_num_workers() if num_chunks >= _MIN_CHUNKS_FOR_PROCESSES else 0
    if num_workers == 0:
        for number in range(num_chunks):
            yield from _chunk(spec, split, number)
        return
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(_Worker(spec.name, split, i, num_workers))
            for i in range(num_workers)
        ]
        # Worker i renders chunks i, i + n, ...: taking turns gives them in order.
        for number in range(num_chunks):
            yield from workers[number % num_workers].next_chunk()


class _Worker:
    """A process that renders chunks i, i + n, i + 2n, ..., and a thread that reads from it."""

    def __init__(self, config: str, split: str, number: int, num_workers: int):
        command = [sys.executable, "-m", __spec__.name, config, split, str(number)]
        path = os.pathsep.join([os.path.abspath(p or ".") for p in sys.path])
        self._process = subprocess.Popen(
            [*command, str(num_workers)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            # One thread each: the workers share the processors among them.
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        # Bounded, so that a fast worker waits for the writer instead of filling the memory.
        self._chunks: queue.Queue[list[Record] | None] = queue.Queue(maxsize=8)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> _Worker:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._process.kill()
        self._process.wait()
        self._thread.join()
        self._process.stdout.close()

    def _put(self, item: list[Record] | None) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                return self._chunks.put(item, timeout=0.2)

    def _read(self) -> None:
        while not self._closed.is_set():
            try:
                self._put(pickle.load(self._process.stdout))
            except (EOFError, pickle.UnpicklingError):
                return self._put(None)

    def next_chunk(self) -> list[Record]:
        chunk = self._chunks.get()
        if chunk is None:
            status = self._process.wait()
            raise RuntimeError(f"a process that renders `shapes` ended early (status {status})")
        return chunk


def write_share(output: IO[bytes], config: str, split: str, number: int, num_workers: int) -> None:
    """Pickles every `num_workers`-th chunk of the split, from chunk `number` on, to `output`."""
    spec = SPECS[config]
    for i in range(number, -(-spec.sizes[split] // CHUNK), num_workers):
        pickle.dump(_chunk(spec, split, i), output, protocol=pickle.HIGHEST_PROTOCOL)
        output.flush()


if __name__ == "__main__":
    try:
        write_share(sys.stdout.buffer, sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    except BrokenPipeError:
        # The process that builds has gone; there is nobody left to tell.
        os._exit(1)
