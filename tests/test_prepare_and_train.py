"""From photos to losses: preparing is killed and run again, then each format is trained on."""

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("apache_beam")
from prepare_cases import OUTPUTS, read_shard

from vlp_jax import config as configs
from vlp_jax import train
from vlp_jax.commands import prepare_data
from vlp_jax.data.order import Order
from vlp_jax.data.pipeline import TrainPipeline

ROOT = Path(__file__).resolve().parent.parent
SEED, STEPS, BATCH, CLASSES = 7, 12, 32, 5
CONFIG = """
from ml_collections import ConfigDict
from configs import clip_folder
from vlp_jax.config import duration

def get_config(arg=None):
    config = clip_folder.get_config("32")
    config.batch_size = {batch}
    config.duration = duration(steps={steps})
    config.log.every = duration(steps=1)
    config.checkpoint.every = duration(steps={steps})
    config.writers.tensorboard = False
    config.evaluators = ConfigDict()
    config.tokenizer = ConfigDict({{"name": "bytes", "context_length": 32}})
    config.objective.embed_dim = 32
    for tower in (config.objective.image, config.objective.text):
        tower.update(width=32, depth=1, mlp_dim=64, heads=2)
    del config.data.split
    config.data.update(order="examples", cache_dir={cache!r})
    {printed}
    return config
"""
# Keeps a small job from finishing before the kill.
SLOWLY = """
import sys, time
from vlp_jax.data.prepare import paths
put = paths.put
paths.put = lambda *a: (time.sleep(0.1), put(*a))
from vlp_jax.commands.prepare_data import main
sys.exit(main())
"""


@dataclass(frozen=True)
class Case:
    """A corpus of `count` examples of so many `photos`, and into how many shards it is cut.

    A small one is quick: its first preparation is slowed down, so that it can be killed, and what
    is not to be killed runs in this process instead of its own.
    """

    count: int
    photos: int
    shards: int
    quick: bool


@functools.cache
def photo(number):
    """A JPEG of 256 to 500 pixels a side: like a photograph, as much detail at every scale."""
    rng = np.random.default_rng(number)
    width, height = (int(n) for n in rng.integers(256, 501, 2))
    pixels = np.full((height, width, 3), 128.0, np.float32)
    for side in (2, 8, 32, 128, 512):
        noise = rng.normal(0, 1, (min(side, height), min(side, width), 3))
        part = Image.fromarray(np.uint8(np.clip(128 + 40 * noise, 0, 255)))
        pixels += (np.asarray(part.resize((width, height)), np.float32) - 128) * 0.45
    stream = io.BytesIO()
    image = Image.fromarray(np.uint8(np.clip(pixels, 0, 255)))
    image.save(stream, "JPEG", quality=89)
    return stream.getvalue()


def numbered(number, photos):
    """A photo whose bytes no other example has: its number stands in a comment."""
    jpeg, comment = photo(number % photos), f"number {number}".encode()
    return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment + jpeg[2:]


def name_of(number):
    return f"{number % 50:02d}/photo.{number:05d}.jpg"


def captions_of(number):
    """One or two, each with the number."""
    return [f"number {number}", f"the {number}. photo"][: 1 + number % 2]


def write_corpus(folder, case):
    rows, size = [("path", "caption", "class")], 0
    for number in range(case.count):
        file = folder / name_of(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        size += file.write_bytes(numbered(number, case.photos))
        label = f"class {number % CLASSES}"
        rows += [(name_of(number), caption, label) for caption in captions_of(number)]
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    print(f"corpus: {case.count} JPEGs, {size:,} bytes, {size // case.count:,} on average")
    assert 60_000 < size / case.count < 100_000


def arguments(folder, output, output_format, case):
    where = ["--input", str(folder), "--input-format", "folder", "--output", str(output)]
    how = ["--output-format", output_format, "--shards", str(case.shards), "--seed", str(SEED)]
    return [*where, *how, "--fields", "label=class"]


def start(program, arguments):
    environment = {
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla"),
    }
    return subprocess.Popen(
        [sys.executable, *program, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(module, arguments, case, status=0):
    """What the command says that a module is."""
    if case.quick:
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            found = module.main(arguments)
        said = stream.getvalue()
    else:
        process = start(["-m", module.__name__], arguments)
        said, found = process.communicate(timeout=600)[0], process.returncode
    assert found == status, said
    print(said)
    return said


def finished(output):
    """Shard -> what changes when it is written again."""
    stats = {file.name: file.stat() for file in output.glob("train-*-of-*.array_record")}
    return {name: (s.st_ino, s.st_mtime_ns, s.st_size) for name, s in stats.items()}


def killed_and_run_again(folder, output, case):
    """Prepares ArrayRecord shards, killed with kill -9 at half; returns what the rerun printed."""
    again = arguments(folder, output, "array_record", case)
    program = ["-c", SLOWLY] if case.quick else ["-m", "tools.prepare_data"]
    process = start(program, again)
    while len(finished(output)) < case.shards // 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    before = finished(output)
    hidden = [f.name for f in output.iterdir() if f.name.endswith(".tmp")]
    print(f"killed: {len(before)} of {case.shards} shards are there, {len(hidden)} begun")
    assert case.shards // 2 <= len(before) < case.shards
    assert not (output / "train.manifest.json").exists()

    begin = time.monotonic()
    said = run(prepare_data, again, case)
    after = finished(output)
    kept = {name for name in before if before[name] == after[name]}
    took = time.monotonic() - begin
    print(f"run again: {len(after)} shards, {len(kept)} of them as they were, {took:.0f}s")
    assert kept == set(before)
    return said


def expected_ids(case):
    """All ids in the order that the documentation promises."""
    ids = [name_of(number) for number in range(case.count)]
    return sorted(ids, key=lambda id: hashlib.sha256(f"{SEED}:{id}".encode()).hexdigest())


def assert_nothing_lost_or_doubled(folder, output, output_format, case):
    """The manifest is right, and the shards hold what the input does, once and in its order."""
    manifest = json.loads((output / "train.manifest.json").read_text())
    shards = manifest["shards"]
    assert (manifest["format"], manifest["split"]) == (output_format, "train")
    assert (manifest["examples"], manifest["seed"]) == (case.count, SEED)
    assert manifest["skipped"] == {} and len(shards) == case.shards
    assert {file.name for file in output.iterdir()} == {
        *(shard["file"] for shard in shards),
        "train.manifest.json",
    }
    ids = iter(expected_ids(case))
    for shard in shards:
        path = output / shard["file"]
        with path.open("rb") as stream:
            assert shard["sha256"] == hashlib.file_digest(stream, "sha256").hexdigest()
        assert shard["bytes"] == path.stat().st_size
        assert shard["examples"] - case.count // case.shards in (0, 1)
        examples = read_shard(path)
        assert len(examples) == shard["examples"]
        for example in examples:
            assert example["id"] == next(ids)
            number = int(example["id"].split(".")[1])
            assert example["image"] == (folder / example["id"]).read_bytes()
            assert f"number {number}".encode() == example["image"][6:][: len(f"number {number}")]
            assert example["captions"] == captions_of(number)
            assert example["label"] == [number % CLASSES]
    assert next(ids, None) is None
    sizes = sum(shard["bytes"] for shard in shards)
    print(f"{output_format}: {case.count} examples, each once and as it was, {sizes:,} bytes")


def assert_verify_finds_a_wrong_byte(folder, output, case):
    """And the same command then writes that shard again as it was."""
    manifest = (output / "train.manifest.json").read_text()
    shard = output / json.loads(manifest)["shards"][1]["file"]
    good = hashlib.sha256(shard.read_bytes()).digest()
    verify = ["--verify", "--output", str(output)]
    whole = run(prepare_data, verify, case)
    assert f"{case.count:,} examples in {case.shards} shards" in whole
    assert "all checksums are right" in whole
    with shard.open("r+b") as stream:
        stream.seek(shard.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    said = run(prepare_data, verify, case, status=2)
    assert str(shard) in said and f"1 of {case.shards} shards are damaged" in said
    run(prepare_data, [*arguments(folder, output, "array_record", case), "--verify"], case)
    assert hashlib.sha256(shard.read_bytes()).digest() == good
    assert (output / "train.manifest.json").read_text() == manifest
    assert run(prepare_data, verify, case) == whole


def config_lines(said):
    """The lines for a config that a preparation ends with, as they are."""
    _, found, lines = said.partition("To train on them:\n")
    assert found
    return [line.strip() for line in lines.splitlines()]


def metrics(workdir):
    """Step -> everything that training logged of it, as it was written."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {
        record["step"]: {key: value for key, value in record.items() if key.startswith("train/")}
        for record in records
        if "train/loss" in record
    }


def examples_of(config_file):
    """(id, caption) of the examples of the first steps, in the order in which they are trained."""
    config = configs.load(str(config_file))
    keep = {"choose_text": {}, "keep": {"fields": ("id", "text", "label")}}
    data = {**config.data.to_dict(), "preprocess": keep}
    pipeline = TrainPipeline(
        data, None, batch_size=BATCH, seed=config.seed, extra_fields=("id", "text_raw")
    )
    found = []
    for _, batch in zip(range(STEPS), pipeline.batches(), strict=False):
        columns = (batch["id"], batch["text_raw"], batch["label"])
        found += [(i.decode(), t.decode(), int(n)) for i, t, n in zip(*columns, strict=True)]
    return found


def assert_trains_the_same(folder, printed, case):
    """Runs with the config lines that were printed for each format: one order, the same losses."""
    seen, logged = {}, {}
    for output_format, lines in printed.items():
        file = folder / f"{output_format}.py"
        settings = {"batch": BATCH, "steps": STEPS, "cache": str(folder / "cache")}
        file.write_text(CONFIG.format(printed="\n    ".join(lines), **settings))
        run(train, ["--config", str(file), "--workdir", str(folder / output_format)], case)
        logged[output_format] = metrics(folder / output_format)
        losses = [record["train/loss"] for record in logged[output_format].values()]
        print(f"{output_format}: losses {losses}")
        seen[output_format] = examples_of(file)
        assert sorted(logged[output_format]) == list(range(STEPS))
        assert len(set(losses)) == STEPS and np.isfinite(losses).all()
    ids, order = expected_ids(case), Order(case.count, seed=0)
    places = order.indices(np.arange(STEPS * BATCH))
    for output_format in printed:
        assert [id for id, _, _ in seen[output_format]] == [ids[place] for place in places]
        assert seen[output_format] == seen["array_record"]
        assert logged[output_format] == logged["array_record"], output_format
    for id, caption, label in seen["array_record"]:
        number = int(id.split(".")[1])
        assert caption in captions_of(number) and label == number % CLASSES


def check(tmp_path, case):
    folder, runs = tmp_path / "photos", tmp_path / "runs"
    runs.mkdir()
    write_corpus(folder, case)
    outputs = {name: tmp_path / f"prepared_{name}" for name in OUTPUTS}
    said = {"array_record": killed_and_run_again(folder, outputs["array_record"], case)}
    for name in OUTPUTS[1:]:
        said[name] = run(prepare_data, arguments(folder, outputs[name], name, case), case)
    for name, output in outputs.items():
        assert_nothing_lost_or_doubled(folder, output, name, case)
    assert_verify_finds_a_wrong_byte(folder, outputs["array_record"], case)
    printed = {name: config_lines(said[name]) for name in OUTPUTS}
    assert_trains_the_same(runs, printed, case)


@pytest.mark.slow
def test_prepared_again_after_a_kill_and_trained_on_from_every_format(tmp_path):
    check(tmp_path, Case(count=301, photos=30, shards=12, quick=True))


@pytest.mark.slow
def test_20000_photos_prepared_again_after_a_kill_and_trained_on(tmp_path):
    check(tmp_path, Case(count=20_000, photos=300, shards=32, quick=False))
