"""The kept index: what is embedded again, what is left out, what is damaged."""

import numpy as np
import PIL.Image
import pytest

from vlp_jax.errors import UserError
from vlp_jax.serve import index as index_lib
from vlp_jax.serve.explorer import Classes
from vlp_jax.serve.index import Folder, build_index


class Counting:
    """An encoder that counts the images it embeds."""

    def __init__(self, encoder):
        self.images, self.module, self.weights = encoder.images, encoder.module, encoder.weights
        self._encoder, self.embedded = encoder, 0

    def apply(self, name, rows):
        self.embedded += len(rows)
        return self._encoder.apply(name, rows)


def built(encoder, folder, place, limit=100):
    counting, said = Counting(encoder), []
    index = build_index(counting, Folder(folder, limit), place, lambda n: None, said.append)
    return index, counting.embedded, said


def test_only_new_and_changed_images_are_embedded(encoder, folder, tmp_path):
    place = tmp_path / "index"
    first, embedded, said = built(encoder, folder, place)
    assert embedded == len(first) == 5
    assert len(said) == 1 and said[0].startswith("left out: broken.jpg")
    second, embedded, _ = built(encoder, folder, place)
    assert embedded == 0 and len(second) == 5
    query = encoder.embed_text("a red circle")[0]
    assert first.nearest(query, 5) == second.nearest(query, 5)

    PIL.Image.new("RGB", (50, 50), "yellow").save(folder / "red.png")  # changed
    PIL.Image.new("RGB", (50, 50), "black").save(folder / "new.png")
    (folder / "more" / "green.png").unlink()
    third, embedded, _ = built(encoder, folder, place)
    assert embedded == 2 and len(third) == 5
    pictures = Folder(folder, 100)
    found = {pictures.names[n]: score for n, score in third.nearest(query, 9)}
    for name, score in found.items():
        expected = encoder.embed_image(folder / name)[0] @ query
        assert score == pytest.approx(float(expected), abs=1e-5), name


def test_another_model_or_a_torn_file_is_embedded_anew(encoder, folder, tmp_path):
    place = tmp_path / "index"
    built(encoder, folder, place)
    other = Counting(encoder)
    other.weights = {**encoder.weights, "logit_scale": encoder.weights["logit_scale"] + 1}
    build_index(other, Folder(folder, 9), place, lambda n: None, print)
    assert other.embedded == 5
    for name in (index_lib.VECTORS, index_lib.ENTRIES):
        built(encoder, folder, place)
        content = (place / name).read_bytes()
        (place / name).write_bytes(content[: len(content) // 2])
        assert built(encoder, folder, place)[1] == 5, name
        assert built(encoder, folder, place)[1] == 0, name


def test_a_graph_finds_the_nearest_of_many(monkeypatch):
    monkeypatch.setattr(index_lib, "EXACT_UP_TO", 10)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = index_lib.ImageIndex(index_lib._faiss_index(vectors), range(500))
    assert type(index._vectors).__name__.startswith("IndexHNSW")
    hits = sum(index.nearest(v, 1)[0][0] == n for n, v in enumerate(vectors))
    assert hits >= 490


def test_mistakes(tmp_path, encoder):
    with pytest.raises(UserError, match="is no folder"):
        Folder(tmp_path / "none", 5)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="holds no image"):
        Folder(tmp_path, 5)
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(UserError, match="none of the images can be read"):
        built(encoder, tmp_path, tmp_path / "index")
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be kept in .*file.*name another"):
        built(encoder, tmp_path, tmp_path / "file" / "index")
    with pytest.raises(UserError, match="hold 'a' more than once"):
        Classes.of_names("the classes", ["a", "b", "a"], ["{}"])
    with pytest.raises(UserError, match="has no {} for the name"):
        Classes.of_names("the classes", ["a"], ["photo"])
