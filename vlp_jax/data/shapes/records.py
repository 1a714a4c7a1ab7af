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
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from vlp_jax.data.shapes import captions, clips, questions, render, scenes, vocabulary

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


def _specs() -> dict[str, Spec]:
    pictures = {"train": 20_000, "validation": 1_000, "test": 3_000}
    few = {"train": 512, "validation": 64, "test": 256}
    moving = {"train": 2_000, "validation": 200, "test": 400}
    few_clips = {"train": 64, "validation": 16, "test": 32}
    beginning = "The first {} of each split of `{}`, for tests."
    specs = (
        Spec("default", pictures, False, "Pictures of 1 to 4 objects."),
        Spec("tiny", few, False, beginning.format("pictures", "default")),
        Spec("video", moving, True, "Clips of 8 frames of 1 or 2 moving objects."),
        Spec("video_tiny", few_clips, True, beginning.format("clips", "video")),
    )
    return {spec.name: spec for spec in specs}


SPECS = _specs()


def _box(obj: scenes.SceneObject) -> tuple[float, float, float, float]:
    """(ymin, xmin, ymax, xmax) in [0, 1]."""
    left, top, right, bottom = (v / scenes.IMAGE_SIZE for v in obj.box)
    return top, left, bottom, right


def _names(obj: scenes.SceneObject, *attributes: str) -> dict[str, str]:
    return {"label": obj.class_name, **{name: getattr(obj, name) for name in attributes}}


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
            {"bbox": _box(o), **_names(o, "shape", "color", "size", "texture", "position")}
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
                **_names(o.start, "shape", "color", "texture"),
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


def stream_records(spec: Spec, split: str, num_workers: int | None = None) -> Iterator[Record]:
    """All records of a split, in order of their index, whatever the number of processes.

    With `num_workers` 0 they are rendered in this process. None takes a process for each CPU, at
    most 8, and none for a split that is rendered sooner than they start.
    """
    num_chunks = -(-spec.sizes[split] // CHUNK)
    if num_workers is None:
        own = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))
        num_workers = min(8, len(own(0))) if num_chunks >= _MIN_CHUNKS_FOR_PROCESSES else 0
    if num_workers == 0:
        for number in range(num_chunks):
            yield from _chunk(spec, split, number)
        return
    with contextlib.ExitStack() as stack:
        pipes = [
            stack.enter_context(_worker(spec.name, split, number, num_workers))
            for number in range(num_workers)
        ]
        # Worker i renders chunks i, i + n, ...: taking turns gives them in order. A pipe that is
        # full makes a fast worker wait.
        for number in range(num_chunks):
            try:
                yield from pickle.load(pipes[number % num_workers])
            except (EOFError, pickle.UnpicklingError):
                raise RuntimeError("a process that renders `shapes` ended early") from None


@contextlib.contextmanager
def _worker(config: str, split: str, number: int, num_workers: int) -> Iterator[IO[bytes]]:
    """A process that renders chunks i, i + n, i + 2n, ...: the stream that it writes them to."""
    path = os.pathsep.join([os.path.abspath(p or ".") for p in sys.path])
    process = subprocess.Popen(
        [sys.executable, "-m", __spec__.name, config, split, str(number), str(num_workers)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        # One thread each: the workers share the processors among them.
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    with process:
        try:
            yield process.stdout
        finally:
            process.kill()


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
