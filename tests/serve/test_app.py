"""What the page answers over HTTP: results, limits, and what other sites may not ask."""

import io
import re

import numpy as np
import PIL.Image
import pytest
from starlette.testclient import TestClient

NAMES = ("a red circle", "a blue box", "a Red box")


@pytest.fixture
def client(app):
    return TestClient(app)


def png(size=(50, 30), color="red"):
    file = io.BytesIO()
    PIL.Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def test_search_ranks_images_as_their_embeddings_do(client, encoder, folder):
    answer = client.post("/api/search", json={"text": "A Red circle", "count": 3}).json()
    names = [r["name"] for r in answer["results"]]
    files = sorted(f for f in folder.rglob("*.png"))
    cosine = encoder.embed_image(files) @ encoder.embed_text("a red circle")[0]
    best = np.argsort(-cosine)[:3]
    assert names == [str(files[i].relative_to(folder)) for i in best]
    np.testing.assert_allclose(
        [r["similarity"] for r in answer["results"]], cosine[best], atol=1e-5
    )
    assert answer["note"] is None


def test_an_image_gets_its_classes_and_its_neighbours(client, encoder, folder):
    content = (folder / "red.png").read_bytes()
    answer = client.post("/api/look", content=content).json()
    assert answer["results"][0]["name"] == "red.png"
    assert answer["results"][0]["similarity"] == pytest.approx(1, abs=1e-4)
    image = encoder.embed_image(content)[0]
    prompts = [encoder.embed_text([name, f"my {name}"]).mean(axis=0) for name in NAMES]
    classes = np.stack([p / np.linalg.norm(p) for p in prompts])
    logits = encoder.logit_scale * classes @ image
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    shares = {c["text"]: c["probability"] for c in answer["classes"]}
    np.testing.assert_allclose([shares[name] for name in NAMES], expected, atol=1e-5)
    listed = [c["probability"] for c in answer["classes"]]
    assert listed == sorted(listed, reverse=True)


def test_texts_that_are_typed_and_heat_maps(client):
    two = PIL.Image.open(io.BytesIO(png((60, 60))))
    two.paste("blue", (30, 10, 55, 35))
    file = io.BytesIO()
    two.save(file, "PNG")
    key = client.post("/api/look", content=file.getvalue()).json()["key"]
    answer = client.post("/api/compare", json={"key": key, "texts": ["a red box", "blue"]}).json()
    assert {c["text"] for c in answer["classes"]} == {"a red box", "blue"}
    assert sum(c["probability"] for c in answer["classes"]) == pytest.approx(1)
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert "reads the first 12" in client.post("/api/search", json={"text": long}).json()["note"]
    response = client.post("/api/heat_map", json={"key": key, "text": "a red box"})
    assert response.headers["content-type"] == "image/png"
    with PIL.Image.open(io.BytesIO(response.content)) as image:
        assert (
            max(image.size) == 384 and len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 9
        )
    other = client.post("/api/heat_map", json={"key": key, "text": "a blue circle on the floor"})
    assert other.content != response.content


def test_old_uploads_are_forgotten(client):
    keys = [client.post("/api/look", content=png()).json()["key"] for _ in range(33)]
    answer = client.post("/api/compare", json={"key": keys[0], "texts": ["a"]})
    assert answer.status_code == 400 and "open it again" in answer.json()["error"]
    assert client.post("/api/compare", json={"key": keys[1], "texts": ["a"]}).status_code == 200


def test_images_of_the_index_can_be_seen_and_looked_at(client, folder):
    found = client.post("/api/search", json={"text": "red"}).json()["results"]
    assert len(found) == 5 and "broken.jpg" not in {r["name"] for r in found}
    response = client.get(f"/thumbnail/{found[0]['image']}")
    with PIL.Image.open(io.BytesIO(response.content)) as image:
        assert image.format == "WEBP" and 200 <= max(image.size) <= 256
    again = client.post(f"/api/look/{found[0]['image']}").json()
    assert again["results"][0]["name"] == found[0]["name"]
    assert client.get("/thumbnail/99").status_code == 400
    assert client.get("/thumbnail/../../etc/passwd").status_code == 404
    about = client.get("/api/about").json()
    assert about["images"] == 5 and about["images_of"] == str(folder) and about["classes"] == 3


@pytest.mark.parametrize(
    ("path", "content", "status", "message"),
    [
        ("/api/look", b"<svg onload=alert(1)>", 400, "the file is not an image that can be read"),
        ("/api/look", b"", 400, "the file is empty"),
        ("/api/look", png()[:40], 400, "the file (is damaged|cannot be read|is not an image)"),
        ("/api/look", b"x" * 200_001, 413, "more than 0 MiB"),
        ("/api/search", {"text": "  "}, 400, "the text is empty"),
        ("/api/search", {"text": 7}, 400, "the text is empty"),
        ("/api/search", {"text": "a" * 2001}, 400, "2,001 characters"),
        ("/api/search", {"text": "a", "count": 0}, 400, "from 1 to 100, not 0"),
        ("/api/search", {"text": "a", "count": True}, 400, "from 1 to 100, not True"),
        ("/api/search", ["a"], 400, "send a JSON object"),
        ("/api/compare", {"key": "none", "texts": ["a"]}, 400, "open it again"),
        ("/api/compare", {"key": "none", "texts": ["a", " a"]}, 400, "'a' more than once"),
        ("/api/compare", {"key": "none", "texts": []}, 400, "1 to 200 texts"),
        ("/api/heat_map", {"key": None, "text": "a"}, 400, "open it again"),
        ("/api/heat_map", {"text": ""}, 400, "the text is empty"),
    ],
)
def test_mistakes_are_told(client, path, content, status, message):
    said = {"content": content} if isinstance(content, bytes) else {"json": content}
    answer = client.post(path, **said)
    assert answer.status_code == status
    assert re.search(message, answer.json()["error"])


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(client):
    file = io.BytesIO()
    PIL.Image.new("1", (20_000, 10_000)).save(file, "PNG")
    answer = client.post("/api/look", content=file.getvalue())
    assert answer.status_code == 400 and re.search(
        "(200000000|20,000 x 10,000) pixels", answer.json()["error"]
    )
    wide = client.post("/api/look", content=png((20_000, 20)))
    assert wide.status_code == 200


def test_an_upload_without_a_length_stops_at_the_limit(client):
    def chunks():
        for _ in range(1000):
            yield b"x" * 10_000

    assert client.post("/api/look", content=chunks()).status_code == 413


def test_other_sites_and_other_names_are_refused(client):
    evil = {"origin": "http://evil.example"}
    assert client.post("/api/search", json={"text": "a"}, headers=evil).status_code == 403
    own = {"origin": "http://testserver"}
    assert client.post("/api/search", json={"text": "a"}, headers=own).status_code == 200
    assert client.get("/api/about", headers={"host": "evil.example"}).status_code == 400
    form = client.post("/api/search", content=b'{"text": "a"}')
    assert form.status_code == 400 and "send JSON" in form.json()["error"]
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert client.get("/nothing").status_code == 404
