"""Retrieval with lists of captions: ragged, with repeats, empty ones and images without any."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from toy_models import (
    SLOW,
    image_vectors,
    make_resources,
    make_world,
    text_vectors,
)

from vlp_jax.evaluators import make_evaluators
from vlp_jax.evaluators.base import Resources

N = 19
LEFT_OUT = (4, 18)  # images whose captions are all empty


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world, rng = make_world(), np.random.default_rng(3)
    world.pictures = rng.integers(0, 256, (N, 4, 4, 3)).astype(np.uint8)
    counts = rng.integers(1, 6, N)
    world.captions = [[f"Image {i}, {j}" for j in range(c)] for i, c in enumerate(counts)]
    world.captions[0][0] = world.captions[7][0] = world.captions[12][0] = "The Same"
    world.captions[3].insert(1, "  ")
    world.captions[4], world.captions[18] = ["", " "], [""]
    files = []
    for picture in world.pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        files.append(buffer.getvalue())
    table = pa.table({"image": files, "captions": world.captions})
    world.path = str(tmp_path_factory.mktemp("captions") / "x.parquet")
    pq.write_table(table, world.path)
    return world


def make(world, devices, batch_size, lowercase=True):
    # Without a `text` there is no operation on it: then the captions stay as they are.
    text = [("choose_text", {"field": "captions"}), ("lowercase", {})] if lowercase else []
    data = {
        "source": "parquet",
        "path": world.path,
        "preprocess": [*text, ("decode_image", {}), ("resize", {"size": 4})],
        "max_bad_fraction": 0.5,
    }
    resources = make_resources(devices, batch_size)
    section = {"name": "retrieval", "captions": "captions"}
    return make_evaluators({"x": section}, data, resources)["x"]


def expected_probability(matrix, own, k):
    """Brute force over each row: P(an own target among the first k), equals in random order."""
    found = []
    for row, mine in zip(matrix, own, strict=True):
        best = row[mine].max()
        above, equal = (row > best + 1e-9).sum(), (abs(row - best) <= 1e-9).sum()
        right = (abs(row[mine] - best) <= 1e-9).sum()
        miss = 1.0
        for place in range(min(max(k - above, 0), equal)):
            miss *= max(equal - right - place, 0) / (equal - place)
        found.append(1 - miss)
    return np.mean(found)


@pytest.mark.parametrize(
    ("devices", "batch_size", "lowercase"),
    [
        (2, 10, True),
        (8, 40, True),
        (2, 10, False),
        *(pytest.param(*layout, True, marks=SLOW) for layout in ((1, 8), (8, 16), (2, 4))),
    ],
)
def test_ragged_captions_equal_numpy(world, devices, batch_size, lowercase):
    outcome = make(world, devices, batch_size, lowercase).outcome(world.params)
    kept = [i for i in range(N) if i not in LEFT_OUT]
    texts = [[c.lower() if lowercase else c for c in world.captions[i] if c.strip()] for i in kept]
    flat = [caption for captions in texts for caption in captions]
    image = image_vectors(world, world.pictures[kept])
    text = text_vectors(world, flat)
    np.testing.assert_allclose(outcome.image, image, atol=1e-5)
    np.testing.assert_allclose(outcome.text, text, atol=1e-5)
    assert outcome.index.tolist() == kept
    owners = np.repeat(np.arange(len(kept)), [len(c) for c in texts])
    assert outcome.owners.tolist() == owners.tolist() and len(set(np.bincount(owners))) > 2
    scores, matrix = outcome.scores(), np.round(image @ text.T, 7)
    own = owners == np.arange(len(kept))[:, None]
    for k in (1, 5, 10):
        for name, rows, mine in (
            ("image_to_text", matrix, own),
            ("text_to_image", matrix.T, own.T),
        ):
            probability = expected_probability(rows, mine, k)
            assert scores[f"{name}_r{k}"] == pytest.approx(probability, abs=1e-6)
    assert scores["pairs"] == len(flat) and scores["images"] == N - 2
    same = [i for i, caption in enumerate(flat) if caption.lower() == "the same"]
    assert len(same) == 3 and (outcome.text[same] == outcome.text[same[0]]).all()


def test_captions_go_through_the_text_operations(world):
    upper = text_vectors(world, ["The Same"])
    outcome = make(world, 1, 8).outcome(world.params)
    assert not np.isclose(outcome.text, upper, atol=1e-3).all(axis=1).any()
    assert np.isclose(outcome.text, text_vectors(world, ["the same"]), atol=1e-5).all(1).sum() == 3


def test_a_model_whose_embeddings_depend_on_the_place_in_a_batch_still_ties(world):
    """As a GPU may round differently at the end of a batch."""
    jittered = make(world, 1, 8)
    embed = Resources.embed

    def embed_with_noise(self, params, batches, functions, keep=()):
        outputs, fields = embed(self, params, batches, functions, keep)
        rng = np.random.default_rng(0)
        noisy = {k: v + rng.normal(size=v.shape).astype("f") * 1e-7 for k, v in outputs.items()}
        return noisy, fields

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Resources, "embed", embed_with_noise)
        outcome = jittered.outcome(world.params)
    assert (outcome.image_to_text.equal > 1).any()
