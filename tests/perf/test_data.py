"""tools.perf.data: the photos, the limit that it measures with, and the command."""

import hashlib
import io
import json
import math
import multiprocessing
import random
import time
import types

import numpy as np
import pytest
from PIL import Image

from tools.perf import corpus as bench_corpus
from tools.perf import data as bench_data
from tools.perf import harness
from tools.perf import loaders as bench_loaders
from tools.perf.corpus import NAMES, Corpus, data_config
from tools.perf.loaders import DecodeLimit, PipelineLoader, Speed, Task, Turn
from vlp_jax.data.image_ops.crop import random_resized_crop
from vlp_jax.data.lazy_tensorflow import import_tensorflow
from vlp_jax.data.ops import build_ops
from vlp_jax.data.pipeline import EvalPipeline

COUNT = 10


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus(tmp_path_factory.mktemp("corpus"), COUNT)


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


# ------------------------------------------------------------------------------- the photos


def test_the_photos_are_a_function_of_the_seed(corpus, tmp_path):
    again = Corpus(tmp_path, COUNT)
    assert again.photos == corpus.photos and len(set(corpus.photos)) == COUNT
    other = Corpus(tmp_path, COUNT, seed=1)
    assert not set(other.photos) & set(corpus.photos)


def test_the_photos_are_as_hard_to_decode_as_photographs():
    photos = [bench_corpus.photo(0, number) for number in range(25)]
    assert 70_000 < np.mean([len(photo) for photo in photos]) < 90_000
    images = [pixels(photo) for photo in photos]
    heights, widths = zip(*(image.shape[:2] for image in images), strict=True)
    assert min(heights) >= 256 and max(heights) <= 400 and len(set(heights)) > 15
    assert min(widths) >= 256 and max(widths) <= 500
    for image in images[:5]:  # amplitude falls as 1/frequency
        grey = image[:256, :256].mean(-1) - image.mean()
        power = np.abs(np.fft.fft2(grey * np.outer(np.hanning(256), np.hanning(256))))
        low, high = (power[1 : 1 + n, 1 : 1 + n].mean() for n in (8, 64))
        assert 3 < low / high < 16


def test_files_that_are_there_are_not_written_again(corpus):
    path = corpus.path("webdataset")
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert len(before) == bench_corpus.SHARDS
    again = Corpus(corpus.folder, COUNT).path("webdataset")
    assert before == {file.name: file.stat().st_mtime_ns for file in again.iterdir()}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mixture"])
def test_every_format_holds_the_same_bytes(corpus, name):
    config = data_config(name, corpus, {"keep": {"fields": ["image"]}})
    pipeline = EvalPipeline(config, None, batch_size=4, extra_fields=["image"])
    read = [b for batch in pipeline.batches() for b in batch["image"][batch["mask"]]]
    digests = sorted(hashlib.sha256(photo).hexdigest() for photo in read)
    assert digests == sorted(hashlib.sha256(photo).hexdigest() for photo in corpus.photos)


SOURCES = [
    name if name == "mixture" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES
]


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_images(corpus, name):
    task = Task(size=32, batch_size=4)
    loader = PipelineLoader(data_config(name, corpus, task.preprocess), task)
    first, second = ([batch.copy() for batch in loader.open(3)] for _ in range(2))
    assert [(b.shape, b.dtype) for b in first] == [((4, 32, 32, 3), np.uint8)] * 3
    assert not np.array_equal(first[0], second[0])  # a turn goes on where the last one ended


# ------------------------------------------------------------------------------- the limit


@pytest.mark.parametrize("antialias", [True, False])
def test_the_limit_gives_the_images_of_our_operations(corpus, antialias):
    tf = import_tensorflow()
    task = Task(size=64, batch_size=COUNT, antialias=antialias)
    (_, decode), (_, crop) = build_ops({k: task.preprocess[k] for k in ("decode_image", CROP)})
    ours = []
    for number, photo in enumerate(corpus.photos):
        example = decode({"image": tf.constant(photo)}, None)
        ours.append(crop(example, tf.constant([task.seed, number]))["image"].numpy())
    (limit,) = DecodeLimit(corpus.photos, task).open(1)
    difference = np.abs(np.stack(ours).astype(int) - limit)
    assert limit.std() > 20 and difference.mean() < 0.5 and np.percentile(difference, 99) <= 2


CROP = random_resized_crop.__name__


@pytest.mark.slow
def test_all_crops_are_as_large_as_ours(corpus):
    torch_loaders = pytest.importorskip("tools.perf.torch_loaders")
    task = Task(min_scale=0.3)
    photos = corpus.photos * 30
    sizes = [pixels(photo).shape[1::-1] for photo in photos]
    limit = bench_loaders.windows(photos, task)
    random.seed(0)
    boxes = np.array([torch_loaders.random_box(*size, 0.3) for size in sizes])
    torch = np.stack([boxes[:, 1], boxes[:, 0], *(boxes[:, 2:] - boxes[:, :2]).T[::-1]], axis=1)
    means = []
    for top, left, height, width in (limit.T, torch.T):
        full_width, full_height = np.array(sizes).T
        assert (top >= 0).all() and (top + height <= full_height).all()
        assert (left >= 0).all() and (left + width <= full_width).all()
        shares = height * width / full_height / full_width
        assert 0.29 < min(shares) < 0.33 and 0.8 < max(shares) <= 1
        assert 0.74 < min(width / height) < 0.8 and 1.2 < max(width / height) < 1.36
        means.append(shares.mean())
    assert means[0] == pytest.approx(means[1], abs=0.04)


@pytest.mark.parametrize("resize", ["pillow", "torch"])
def test_pytorch_cuts_and_resizes_as_we_do(resize):
    torch_loaders = pytest.importorskip("tools.perf.torch_loaders")
    # A slope, so that an image says where in the photo it was: of a hundred grey steps.
    slope = np.linspace(20, 220, 400).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(np.broadcast_to(slope[None, :, None], (300, 400, 3)).copy()).save(
        stream, "jpeg", quality=98
    )
    transform = torch_loaders.Transform(64, 0.3, True, resize)
    left, right = [], []
    for _ in range(60):
        image = transform(stream.getvalue()).numpy()
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        columns = image.mean(axis=(0, 2))
        assert (np.diff(columns) > 0).all()
        left.append(columns[0])
        right.append(columns[-1])
    widths = (np.array(right) - np.array(left)) / 200
    assert 0.35 < widths.min() < 0.7 and 0.8 < widths.max() <= 1
    assert min(left) < 40 and max(right) > 200


# ----------------------------------------------------------------------------- the figures


class Clockwork:
    """A loader that takes a known time a batch; the first batches, and all after, take none."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.read = clock, seconds, 0

    def open(self, batches):
        for number in range(batches):
            self.clock.now += self.seconds if 2 <= number < 6 else 100
            self.read += 1
            yield number


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now

    def process_time(self):
        return self.now / 2

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench_loaders, "time", clock)
    monkeypatch.setattr(bench_loaders, "gc", types.SimpleNamespace(collect=lambda: None))  # slow
    return clock


def test_a_turn_times_the_batches_in_its_middle(clock):
    loader = Clockwork(clock, 0.5)
    turn = Turn(warm_up=2, timed=4, rest=3)
    speed = turn.speed(loader, batch_size=8)
    assert speed == pytest.approx((16, 32)) and loader.read == 9


def test_ratios_are_medians_of_the_rounds_and_rounds_begin_with_another(clock):
    order = []

    class Named(Clockwork):
        def open(self, batches):
            order.append(self.seconds)
            return super().open(batches)

    loaders = {str(s): Named(clock, s) for s in (1, 2, 4)}
    speeds = bench_data.measure(loaders, Turn(2, 4, 0), 4, 3)
    assert order == [1, 2, 4, 2, 4, 1, 4, 1, 2]
    assert speeds == {name: [(4 / float(name), 8 / float(name))] * 3 for name in loaders}
    # The machine was slower in the third round; the ratio of the medians would be 3.
    found = harness.ratio([30, 30, 20], [10, 20, 10]).as_json()
    assert found == {"median": 2, "min": 1.5, "max": 3, "rounds": [3, 1.5, 2]}


def test_the_work_of_other_processes_counts():
    before = bench_loaders.cpu_seconds()
    worker = multiprocessing.get_context("spawn").Process(target=work)
    worker.start()
    deadline = time.monotonic() + 60
    while bench_loaders.cpu_seconds() - before < 0.5 and time.monotonic() < deadline:
        time.sleep(0.05)
    spent = bench_loaders.cpu_seconds() - before
    worker.terminate()
    worker.join()
    assert spent >= 0.5


def work():
    while True:
        pass


@pytest.fixture(scope="module")
def result(corpus, tmp_path_factory):
    file = tmp_path_factory.mktemp("result") / "figures.json"
    arguments = (
        f"--sources folder --corpus {corpus.folder} --images {COUNT} --turn 8 --rounds 1 "
        f"--batch-size 4 --size 32 --antialias on --json {file}"
    )
    assert bench_data.main(arguments.split()) == 0
    return json.loads(file.read_text())


@pytest.mark.slow
def test_the_json_file_holds_what_was_measured(result):
    (source,) = result["sources"]
    others = {other["name"]: other for other in result["others"]}
    own = source["images_per_second"]
    assert source["name"] == "folder" and source["antialias"] is True
    assert source["images_per_second_per_core"] == own / result["settings"]["cores_used"]
    for other, key in {
        bench_data.LIMIT: "ratio_to_decode",
        bench_data.PILLOW: "ratio_to_pil",
        bench_data.TORCH: "ratio_to_torch_tensor",
        bench_data.WEBDATASET: "ratio_to_webdataset",
    }.items():
        assert source[key] == pytest.approx(own / others[other]["images_per_second"])
        assert source[key] > 0 and math.isfinite(source[key])
        assert source[f"cpu_{key}"] > 0 and math.isfinite(source[f"cpu_{key}"])
    assert "torch" in result["versions"]
    assert result["settings"]["mean_image_bytes"] > 50_000 and result["date"].startswith("20")


SPEEDS = {"source a": (6, 3), bench_data.LIMIT: (12, 4), bench_data.TORCH: (3, 1)}


def test_without_antialiasing_pillow_decodes_and_pytorch_resizes():
    speeds = {name: [Speed(*map(float, speed))] for name, speed in SPEEDS.items()}
    plain = bench_data.entry("source a", speeds, Task(antialias=False, cores=2))
    assert (plain["antialias"], plain["images_per_second_per_core"]) == (False, 3)
    assert (plain["ratio_to_decode"], plain["ratio_to_pil"]) == (0.5, 2)
    assert (plain["cpu_ratio_to_decode"], plain["cpu_ratio_to_pil"]) == (0.75, 3)
    assert plain["ratio_to_webdataset"] is None
    speeds[bench_data.PILLOW] = [Speed(4.0, 2.0)]
    smooth = bench_data.entry("source a", speeds, Task())
    assert (smooth["ratio_to_pil"], smooth["ratio_to_torch_tensor"]) == (1.5, 2)


@pytest.mark.slow
def test_the_tables_say_what_is_antialiased(result):
    console = bench_data.Console(record=True, width=80, file=io.StringIO())
    ways = {**result["settings"], "antialias": [False, True]}
    plain = [{**row, "antialias": False, "name": "plain"} for row in result["sources"]]
    both = {**result, "settings": ways, "sources": plain + result["sources"]}
    bench_data.show(both, console)
    first, second = console.export_text().split("bilinear, antialiased")
    assert "bilinear, not antialiased" in first and "plain" in first and "folder" not in first
    for name in ("folder", bench_data.LIMIT, bench_data.PILLOW, bench_data.WEBDATASET):
        assert name in second and name not in first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--sources folder,webdatset", "did you mean 'webdataset'?"),
        ("--rounds 0", "--rounds must be at least 1, not 0"),
        ("--batch-size 0", "--batch-size must be at least 1, not 0"),
        ("--min-scale 1.5", "--min-scale 1.5 is not in (0, 1]"),
    ],
)
def test_mistakes_end_in_one_line(arguments, words, capsys):
    assert bench_data.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
