"""Scenes, pictures and clips of the embedded dataset."""

from __future__ import annotations

import collections
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vlp_jax.data.shapes import clips, records, render, scenes, vocabulary

BLACK = scenes.Background("black", "flat", (0.0, 0.0, 0.0), 0.0, 0.0)


def scenes_of(split, count):
    return [scenes.sample_scene(0, split, i) for i in range(count)]


def test_record_is_a_function_of_seed_split_and_index():
    spec = records.SPECS["tiny"]
    first = [records.make_record(spec, "test", i) for i in range(5)]
    assert first == [records.make_record(spec, "test", i) for i in reversed(range(5))][::-1]
    images = {r["image"] for r in first}
    images |= {records.make_record(spec, "train", i)["image"] for i in range(5)}
    images |= {records.scene_record(1, "test", i)["image"] for i in range(5)}
    assert len(images) == 15


def test_records_do_not_depend_on_the_number_of_processes():
    for spec in (records.SPECS["tiny"], records.SPECS["video_tiny"]):
        split = "train" if spec.is_video else "test"
        alone = list(map(str, records.stream_records(spec, split, 0)))
        assert len(alone) == spec.sizes[split]
        shared = records.stream_records(spec, split, 3)
        assert list(map(str, shared)) == alone


def test_a_rendering_process_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(records.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended early"):
        list(records.stream_records(records.SPECS["tiny"], "test", 2))


def test_rendering_needs_neither_tensorflow_nor_jax():
    code = (
        "import sys, vlp_jax.data.shapes.records as r; r.make_record(r.SPECS['tiny'], 'train', 0);"
        "print([m for m in ('tensorflow', 'tensorflow_datasets', 'jax') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="."
    )
    assert done.stdout.strip() == "[]"


def test_held_out_combinations_occur_in_a_third_of_the_test_scenes_only():
    for color in vocabulary.COLORS:
        assert sum(c == color for c, _ in vocabulary.HELD_OUT) == 1
    for shape in vocabulary.SHAPES:
        assert 1 <= sum(s == shape for _, s in vocabulary.HELD_OUT) <= 2
    for split in ("train", "validation"):
        assert not any(s.unseen for s in scenes_of(split, 1500))
    test = scenes_of("test", 1500)
    assert 0.28 < np.mean([s.unseen for s in test]) < 0.39
    single = [s.objects[0] for s in test if len(s.objects) == 1]
    seen = {(o.color, o.shape) for o in single if o.held_out}
    assert seen == vocabulary.HELD_OUT
    for index in range(300):
        assert not clips.sample_clip(0, "train", index).unseen
    assert any(clips.sample_clip(0, "test", i).unseen for i in range(30))


def test_classes_numbers_and_attributes_are_balanced():
    train = scenes_of("train", 4000)
    labels = collections.Counter(s.objects[0].class_name for s in train)
    assert len(labels) == len(vocabulary.SEEN) == 40
    assert min(labels.values()) > 65 and max(labels.values()) < 140
    numbers = collections.Counter(len(s.objects) for s in train)
    assert numbers.keys() == {1, 2, 3, 4} and 0.46 < numbers[1] / 4000 < 0.54
    objects = [o for s in train for o in s.objects]
    assert 0.45 < np.mean([o.texture == "solid" for o in objects]) < 0.55
    for name in ("color", "shape", "texture", "position"):
        counts = collections.Counter(getattr(o, name) for o in objects)
        counts.pop("solid", None)
        assert max(counts.values()) < 1.5 * min(counts.values()), counts
    assert 0.3 < np.mean([o.size == "large" for o in objects]) < 0.5


def test_objects_lie_in_their_cell_inside_the_picture_and_hardly_overlap():
    for scene in scenes_of("train", 800):
        assert len({o.position for o in scene.objects}) == len(scene.objects)
        assert scene.objects[0].radius == max(o.radius for o in scene.objects)
        for i, obj in enumerate(scene.objects):
            row, column = int(obj.y * 3 / 64), int(obj.x * 3 / 64)
            assert vocabulary.POSITIONS[3 * row + column] == obj.position
            assert min(obj.box) >= 0.99 and max(obj.box) <= 63.01
            others = scene.objects[:i]
            assert all(scenes.overlap(obj.box, o.box) <= scenes.MAX_OVERLAP for o in others)


def test_overlap_of_known_boxes():
    assert scenes.overlap((0, 0, 2, 2), (1, 0, 3, 2)) == 0.5
    assert scenes.overlap((0, 0, 2, 2), (2, 0, 3, 2)) == 0.0
    assert scenes.overlap((0, 0, 4, 4), (1, 1, 2, 2)) == 1.0


def test_boxes_are_tight_around_the_object_drawn_alone():
    for scene in scenes_of("test", 150):
        for obj in scene.objects:
            canvas = render.draw_background(BLACK, np.random.default_rng(0))
            render.paint(canvas, obj)
            drawn = canvas.max(axis=2) > 2
            rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
            mask = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert np.abs(np.subtract(mask, obj.box)).max() <= 1.2, (obj.shape, mask, obj.box)


def test_edges_are_anti_aliased_by_area():
    obj = next(
        s.objects[0]
        for s in scenes_of("train", 200)
        if len(s.objects) == 1 and (s.objects[0].shape, s.objects[0].texture) == ("circle", "solid")
    )
    _, body, marks = render.coverage(obj)
    partial = (body > 0.02) & (body < 0.98)
    circumference, area = 2 * np.pi * 0.95 * obj.radius, np.pi * (0.95 * obj.radius) ** 2
    assert 0.6 * circumference < partial.sum() < 1.8 * circumference
    assert len(np.unique(body[partial])) > 15
    assert abs(body.sum() / area - 1) < 0.03
    assert not marks.any()


def test_colors_stay_nearest_to_their_own_name():
    rng = np.random.default_rng(0)
    prototypes = np.array([scenes.COLOR_RGB[c] for c in vocabulary.COLORS], float)
    for i, color in enumerate(vocabulary.COLORS):
        jittered = np.array([scenes.jittered_rgb(rng, color) for _ in range(200)])
        assert jittered.std(axis=0).max() > 2
        distances = np.linalg.norm(jittered[:, None] - prototypes, axis=-1)
        assert (distances.argmin(axis=1) == i).all()
    gaps = np.linalg.norm(prototypes[:, None] - prototypes, axis=-1)
    assert gaps[~np.eye(len(prototypes), dtype=bool)].min() > 75


def test_textures_differ_in_what_they_cover():
    by_texture = collections.defaultdict(list)
    for scene in scenes_of("train", 400):
        for obj in scene.objects:
            _, body, marks = render.coverage(obj)
            filled = scenes.outline(obj.shape, 0, 0, obj.radius, 0)
            x, y = filled.T
            area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
            by_texture[obj.texture].append((body.sum() / area, marks.sum() / area))
    fill = {t: np.array(v) for t, v in by_texture.items()}
    assert (fill["outlined"][:, 0] < 0.8).all() and (fill["outlined"][:, 1] == 0).all()
    assert (fill["solid"][:, 0] > 0.95).all() and (fill["solid"][:, 1] == 0).all()
    for name in ("striped", "dotted"):
        assert (fill[name][:, 1] > 0.03).all() and (fill[name][:, 1] < 0.5).all()


def test_jpeg_is_close_to_the_picture_and_keeps_full_chroma():
    scene = scenes.sample_scene(0, "train", 3)
    image = render.render_scene(scene, np.random.default_rng(0))
    decoded = Image.open(io.BytesIO(render.encode_jpeg(image)))
    assert decoded.size == (64, 64) and all(layer[1:3] == (1, 1) for layer in decoded.layer)
    assert np.abs(np.asarray(decoded, float) - image).mean() < 4


def test_clips_move_as_they_say():
    seen = collections.Counter()
    for index in range(200):
        for obj in clips.sample_clip(0, "train", index).objects:
            boxes = np.array([f.box for f in obj.frames])
            assert boxes.shape == (clips.NUM_FRAMES, 4)
            assert boxes.min() >= 0.99 and boxes.max() <= 63.01
            move = (boxes[-1] - boxes[0]).reshape(2, 2).mean(axis=0)
            growth = (boxes[-1, 2] - boxes[-1, 0]) / (boxes[0, 2] - boxes[0, 0])
            turn = obj.frames[-1].rotation - obj.start.rotation
            steps = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
            if obj.motion in steps:
                assert move @ steps[obj.motion] >= 17.9
                assert abs(move @ steps[obj.motion][::-1]) < 1e-6
            elif obj.motion in ("grow", "shrink"):
                assert growth > 1.6 if obj.motion == "grow" else growth < 0.63
            elif obj.motion == "spin":
                assert abs(turn) > 1.2 and obj.start.shape != "circle"
            else:
                assert obj.motion == "still" and obj.start == obj.frames[-1]
            seen[obj.motion] += 1
    assert seen.keys() == set(vocabulary.MOTIONS) and min(seen.values()) > 15


def test_frames_show_the_motion():
    """The drawn object, not only its description, ends up where its last box is."""
    for index in range(40):
        clip = clips.sample_clip(0, "train", index)
        if len(clip.objects) > 1:
            continue
        still = clips.Clip(clip.objects, BLACK)
        frames = clips.render_clip(still, np.random.default_rng(0))
        assert frames.shape == (clips.NUM_FRAMES, 64, 64, 3) and frames.dtype == np.uint8
        for frame, drawn in zip(frames, clip.objects[0].frames, strict=True):
            rows, columns, _ = np.nonzero(frame > 2)
            mask = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.abs(np.subtract(mask, drawn.box)).max() <= 1.2


def test_class_prompts_name_the_class_with_its_article():
    assert vocabulary.class_prompts("orange heart")[0] == "an orange heart"
    assert "a picture of a red circle" in vocabulary.class_prompts("red circle")
    assert len(vocabulary.CLASS_NAMES) == 48
    assert len(set(vocabulary.ANSWERS)) == len(vocabulary.ANSWERS)
