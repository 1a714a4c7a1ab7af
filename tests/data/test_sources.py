"""Sources: folders, TFDS datasets and arrays; selection; and what each refuses."""

import io
import json
import pathlib
import socket

import numpy as np
import pytest
from PIL import Image

from vlp_jax.data import faults
from vlp_jax.data.lazy_tensorflow import import_tensorflow
from vlp_jax.data.samples import sample_texts
from vlp_jax.data.sources import SOURCES, build_source
from vlp_jax.errors import UserError

CAPTIONS = ["one", 'two, "quoted"', "three\nlines", "vier Äpfel", "五"]


def parse(source, index, names=None):
    """One example, as the graph sees it."""
    tf = import_tensorflow()
    record = {k: tf.constant(v[0]) for k, v in source.fetch(np.array([index])).items()}
    names = list(source.fields()) if names is None else names
    function = tf.function(lambda r: source.parse(r, names), autograph=False)
    return {name: value.numpy() for name, value in function(record).items()}


def refuses(config, message):
    with pytest.raises(UserError, match=message) as caught:
        build_source(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------- folder


def put(path, content=b"not read here"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def csv_of(rows, header="path,caption", delimiter=","):
    def quoted(value):
        return '"' + value.replace('"', '""') + '"'

    lines = [delimiter.join(quoted(value) for value in row) for row in rows]
    return "\n".join([header.replace(",", delimiter), *lines]) + "\n"


@pytest.fixture
def folder(tmp_path):
    names = ["a.jpg", "sub/b.png", "sub/deep/c.jpg", "ünï/日本.jpg", "e e.gif"]
    for name in names:
        put(tmp_path / name, name.encode())
    rows = list(zip(names, CAPTIONS, strict=True))
    (tmp_path / "captions.csv").write_text(csv_of(rows), encoding="utf-8")
    return tmp_path


def folder_config(path, **keys):
    return {"source": "folder", "path": str(path), "split": "all", **keys}


def read_all(source):
    return {
        example["path"].decode(): [caption.decode() for caption in example["captions"]]
        for example in (parse(source, index) for index in range(len(source)))
    }


def test_folder_csv(folder):
    source = build_source(folder_config(folder))
    assert len(source) == 5 and source.class_names("label") is None
    examples = [parse(source, index) for index in range(5)]
    for example, caption in zip(examples, CAPTIONS, strict=True):
        assert example["image"] == example["path"]  # the file holds its own name
        assert [c.decode() for c in example["captions"]] == [caption]
    assert source.describe(2).endswith("sub/deep/c.jpg")


@pytest.mark.parametrize("kind", ["bom", "crlf", "tsv", "jsonl", "backslash", "dots"])
def test_folder_formats(folder, kind):
    expected = read_all(build_source(folder_config(folder)))
    rows = [(path, captions[0]) for path, captions in expected.items()]
    (folder / "captions.csv").unlink()
    name, content = "list.csv", csv_of(rows)
    if kind == "bom":
        content = "\ufeff" + content
    elif kind == "crlf":
        content = csv_of([(p, c.replace("\n", "\0")) for p, c in rows])
        content = content.replace("\n", "\r\n").replace("\0", "\n")
    elif kind == "tsv":  # knows no quoting, and so no line breaks
        expected["sub/deep/c.jpg"] = ["three lines"]
        lines = [f"{path}\t{' '.join(caption.split())}" for path, caption in rows]
        name, content = "list.tsv", "\n".join(["path\tcaption", *lines])
    elif kind == "jsonl":
        name = "list.jsonl"
        content = "\n\n".join(json.dumps({"file": p, "text": [c]}) for p, c in rows)
    elif kind == "backslash":
        content = csv_of([(p.replace("/", "\\"), c) for p, c in rows])
    elif kind == "dots":
        content = csv_of([("./" + p, c) for p, c in rows])
    (folder / name).write_bytes(content.encode())
    assert read_all(build_source(folder_config(folder))) == expected


def test_folder_other_normal_form_of_a_name(tmp_path):
    put(tmp_path / "cafe\u0301.jpg")
    (tmp_path / "c.csv").write_text(csv_of([("caf\u00e9.jpg", "x")]), encoding="utf-8")
    assert parse(build_source(folder_config(tmp_path)), 0)["image"] == b"not read here"


def test_folder_several_captions_and_labels(tmp_path):
    for name in "abc":
        put(tmp_path / f"{name}.jpg")
    rows = [
        {"image": "a.jpg", "caption": ["1", "2"], "kind": 10},
        {"image": "b.jpg", "caption": "3", "kind": 9},
        {"image": "a.jpg", "caption": "4", "kind": 10},
        {"image": "c.jpg", "caption": "5", "kind": 9},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = build_source(folder_config(tmp_path, label_field="kind"))
    assert read_all(source) == {"a.jpg": ["1", "2", "4"], "b.jpg": ["3"], "c.jpg": ["5"]}
    assert source.class_names("label") is None
    assert source.column("label").tolist() == [10, 9, 9]
    batch = source.fetch(np.array([1, 0]))
    assert batch["captions"].shape == (2, 3) and batch["captions/count"].tolist() == [1, 3]
    nine = build_source(folder_config(tmp_path, label_field="kind", where={"label": 9}))
    assert list(read_all(nine)) == ["b.jpg", "c.jpg"]


def test_further_columns_of_a_folder_are_fields(tmp_path):
    rows = [
        {"image": "a.jpg", "caption": "1", "kind": "x", "width": 3, "tags": ["p", "q"]},
        {"image": "b.jpg", "caption": "2", "kind": "y", "width": None, "tags": ["r"]},
        {"image": "b.jpg", "caption": "3", "kind": "y", "width": None, "tags": ["r"]},
    ]
    for row in rows:
        put(tmp_path / row["image"])
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = build_source(folder_config(tmp_path, columns=["kind", "width", "tags"]))
    example = parse(source, 0)
    assert (example["kind"], example["width"]) == (b"x", 3)
    assert example["tags"].tolist() == [b"p", b"q"]
    assert source.fetch(np.array([1]), ["kind"])[faults.FAULT].tolist() == [b""]
    assert b"no 'width'" in source.fetch(np.array([1]), ["width"])[faults.FAULT][0]
    refuses(folder_config(tmp_path, columns=["kinds"]), "data.columns: .*did you mean 'kind'")
    rows[2]["kind"] = "z"
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refuses(folder_config(tmp_path, columns=["kind"]), "b.jpg has .*'z'.* but had .*'y'")


def many(path, count):
    for number in range(count):
        put(path / f"{number}.jpg")
    (path / "c.csv").write_text(csv_of([(f"{n}.jpg", f"no {n}") for n in range(count)]))


def test_folder_holdout_is_a_stable_partition(tmp_path):
    many(tmp_path, 400)
    splits = {
        split: set(build_source(folder_config(tmp_path, split=split)).column("path"))
        for split in ("train", "validation", "all")
    }
    assert splits["train"] | splits["validation"] == splits["all"]
    assert not splits["train"] & splits["validation"]
    assert 20 < len(splits["validation"]) < 60
    many(tmp_path, 500)
    more = set(build_source(folder_config(tmp_path, split="validation")).column("path"))
    assert splits["validation"] == more & splits["all"]
    none = build_source(folder_config(tmp_path, split="train", holdout=0))
    assert len(none) == 500
    refuses(folder_config(tmp_path, split="validation", holdout=0), "is empty")


def test_folder_mistakes(folder, tmp_path_factory):
    refuses(folder_config(folder / "no"), "not a folder")
    refuses(folder_config(folder, captions="x.csv"), "there is no file")
    refuses(folder_config(folder, captions="a.jpg"), "must end in")
    refuses(folder_config(folder, split="test"), "train, validation, all")
    refuses(folder_config(folder, holdout=1.5), "fraction")
    refuses(folder_config(folder, caption_field="captoin"), "did you mean 'caption'")
    refuses(folder_config(folder, label_field="x"), "data.label_field")
    refuses(folder_config(folder, pth="x"), "did you mean 'path'")
    refuses({"source": "folder"}, "data.path is not set")
    (folder / "more.tsv").write_text("x")
    refuses(folder_config(folder), r"captions.csv, more.tsv")
    empty = tmp_path_factory.mktemp("empty")
    refuses(folder_config(empty), "no caption file")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", csv_of([("a.jpg", "x"), ("b.jpg", "y"), ("c.jpg", "z")]), "2 of 3 .*'b.jpg'"),
        ("c.csv", csv_of([("a.jpg", " "), ("a.jpg", "")]), "1 of 1 images .* have no caption"),
        ("c.csv", "path,caption\na.jpg\n", "line 2: the row has 1 cells and the header 2"),
        ("c.csv", "path,caption\n", "no rows"),
        ("c.csv", "", "no rows"),
        ("c.csv", "where,caption\na.jpg,x\n", "no column named path"),
        ("c.csv", "a.jpg,a dog\na.jpg,a cat\n", "the first row must name the columns"),
        ("c.csv", "where^what\na.jpg^a dog\n", "separated by commas, tabs, semicolons"),
        ("c.csv", "path;a, b\na.jpg;x, y\n", "if semicolons separate the columns"),
        ("c.csv", 'path,caption\na.jpg,"x"y\n', "line 2: malformed"),
        ("c.jsonl", '{"path": "a.jpg", "caption": "x"}\n{"path": \n', "line 2: malformed JSON"),
        ("c.jsonl", '["a.jpg", "x"]\n', "line 1: a line must be an object"),
        ("c.jsonl", '{"path": "a.jpg", "caption": []}\n', "have no caption"),
        ("c.jsonl", '{"path": "a.jpg", "caption": [""]}\n', "have no caption"),
        ("c.csv", b"path,caption\na.jpg,\xff\xfe\n", "not UTF-8"),
    ],
)
def test_folder_bad_caption_files(tmp_path, name, content, message):
    put(tmp_path / "a.jpg")
    put(tmp_path / name, content if isinstance(content, bytes) else content.encode())
    refuses(folder_config(tmp_path), message)


def test_folder_labels_that_disagree(tmp_path):
    put(tmp_path / "a.jpg")
    (tmp_path / "c.csv").write_text("path,caption,label\na.jpg,x,dog\na.jpg,y,cat\n")
    refuses(folder_config(tmp_path, label_field="label"), "'cat' but had 'dog'")


@pytest.mark.parametrize("name", ["c.csv", "c.tsv", "c.jsonl"])
def test_images_that_are_not_there_or_have_no_caption_are_bad_examples(tmp_path, name, caplog):
    for letter in "abcdefg":
        put(tmp_path / f"{letter}.jpg")
    cells = [("a.jpg", "1"), ("b.jpg", ""), ("no.jpg", "2"), ("c.jpg", " "), ("d.jpg", "3")]
    cells += [("a.jpg", ""), ("", "4"), ("e.jpg", "5"), ("f.jpg", "6"), ("g.jpg", "7")]
    if name == "c.jsonl":
        lines = [json.dumps({"path": path, "caption": text or None}) for path, text in cells]
    else:
        sign = "," if name == "c.csv" else "\t"
        lines = [sign.join(row) for row in [("path", "caption"), *cells]]
    (tmp_path / name).write_text("\n".join(lines))
    source = build_source(folder_config(tmp_path))
    record = source.fetch(np.arange(len(source)))
    assert record["captions/count"].tolist() == [1, 0, 1, 0, 1, 1, 1, 1, 1]
    reasons = [faults.explain(mark.decode())[0] if mark else "" for mark in record[faults.FAULT]]
    empty, missing = faults.EMPTY_TEXT, faults.MISSING_FIELD
    assert reasons == ["", empty, missing, empty, "", missing, "", "", ""]
    assert caplog.messages[0].startswith("captions left out of 1 images")
    # What is not asked for is not missed.
    images = source.fetch(np.arange(len(source)), ["image"])[faults.FAULT]
    assert np.flatnonzero(images).tolist() == [2, 5]
    texts = source.fetch(np.arange(len(source)), ["captions"])[faults.FAULT]
    assert np.flatnonzero(texts).tolist() == [1, 3]


def test_a_folder_of_which_too_much_is_missing_is_refused_before_anything_is_read(tmp_path):
    def rows(present, absent):
        names = [f"{n}.jpg" for n in range(present)] + [f"no{n}.jpg" for n in range(absent)]
        (tmp_path / "c.csv").write_text(csv_of([(name, "x") for name in names]))

    for number in range(950):
        put(tmp_path / f"{number}.jpg")
    rows(1, 1)
    assert len(build_source(folder_config(tmp_path))) == 2
    rows(1, 2)  # more than half: it may be another folder
    refuses(folder_config(tmp_path), "2 of 3 .* are not in .*the first is 'no0.jpg': mend")
    assert len(build_source(folder_config(tmp_path, max_bad_fraction=0.7))) == 3
    rows(0, 3)
    refuses(folder_config(tmp_path, max_bad_fraction=1.0), "3 of 3 .* mend the list or data.path")
    rows(950, 100)
    assert len(build_source(folder_config(tmp_path))) == 1050
    rows(950, 110)
    refuses(folder_config(tmp_path), "110 of 1060 .*raise data.max_bad_fraction=0.1")
    rows(3, 1)
    refuses(folder_config(tmp_path, max_bad_fraction=0.0), "1 of 4")
    refuses(folder_config(tmp_path, max_bad_fraction=2), "from 0 to 1")


def labelled(path, labels, name="c.csv", **keys):
    """A source of images with these labels, a row of the table each."""
    for number in range(len(labels)):
        put(path / f"{number}.jpg")
    rows = [f"{number}.jpg,x,{label}" for number, label in enumerate(labels)]
    put(path / name, "\n".join(["path,caption,label", *rows]).encode())
    return build_source(folder_config(path, captions=name, label_field="label", **keys))


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        ((0, 1, 3, 4, 5), [0, 1, 3, 4, 5]),
        ((10, 9, 10), [10, 9, 10]),
        (("3.0", "1.0", "", "3"), [3, 1, None, 3]),  # as pandas writes a column with gaps
        (("007", "+2"), [7, 2]),
        (("dog", "cat", "dog"), [1, 0, 1]),
    ],
)
def test_whole_numbers_are_the_classes_that_they_say(tmp_path, labels, numbers):
    source = labelled(tmp_path, labels)
    assert source.column("label").tolist() == numbers
    assert source.class_names("label") == (("cat", "dog") if 0 in numbers[1:2] else None)


def test_a_list_of_names_numbers_the_words_of_every_table(tmp_path):
    names = ("black", "blue", "green", "red")
    put(tmp_path / "names.txt", "\ufeff# mine\nblack\n blue\n\ngreen\nred\n".encode())
    listed = str(tmp_path / "names.txt")
    for labels, numbers in ((("red", "blue"), [3, 1]), (("green", "black"), [2, 0])):
        for given in (names, listed):
            source = labelled(tmp_path, labels, label_names=given)
            assert source.column("label").tolist() == numbers
            assert source.class_names("label") == names
    assert labelled(tmp_path, (3, 0), label_names=names).class_names("label") == names
    digits = ("three", "1", "0")  # names that are numbers are names
    assert labelled(tmp_path, ("0", "1"), label_names=digits).column("label").tolist() == [2, 1]


def test_words_have_the_same_numbers_in_every_split(tmp_path):
    labels = [f"class {n % 7}" for n in range(60)]
    parts = [labelled(tmp_path, labels, split=s) for s in ("train", "validation", "all")]
    of_path = dict(zip(parts[2].column("path"), parts[2].column("label"), strict=True))
    for part in parts:
        assert part.class_names("label") == parts[2].class_names("label")
        for path, label in zip(part.column("path"), part.column("label"), strict=True):
            assert of_path[path] == label


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ((0, -1), None, "line 3: the label -1 is no class: .* from 0 to 1,048,575"),
        ((1, 2199200615), None, "the label 2199200615 is no class"),
        (("1.0", "2.5"), None, "line 3: the label 2.5 is no class"),
        ((0, "dog"), None, "line 3 has the label 'dog' and .*line 2 the label '0'.*label_names"),
        (("", ""), None, "'label' holds no label"),
        (("dog", "cart"), ("cat", "dog"), "line 3: data.label_names lacks .*'cart'; .*'cat'"),
        ((0, 2), ("cat", "dog"), "line 3: the label 2 is no class: .* from 0 to 1, the places"),
        (("dog",), ("dog", "cat", "dog"), "data.label_names must name each class once: 'dog'"),
        (("dog",), "/no.txt", "data.label_names: cannot read the file /no.txt"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, labels, names, message):
    with pytest.raises(UserError, match=message):
        labelled(tmp_path, labels, label_names=names)


# --------------------------------------------------------------------------------------- tfds


def make_toy(data_dir, file_format, count=60):
    import_tensorflow()
    import tensorflow_datasets as tfds

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = pathlib.Path(__file__)  # to infer it, TFDS needs importlib_resources

        def _info(self):
            colors = tfds.features.ClassLabel(names=["red", "green"])
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png"),
                "captions": tfds.features.Sequence(tfds.features.Text()),
                "label": tfds.features.ClassLabel(names=["even", "odd"]),
                "count": np.int32,
                "unseen": np.bool_,
                "objects": tfds.features.Sequence({"color": colors, "box": np.float32}),
                "frames": tfds.features.Video(shape=(None, 4, 4, 3)),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(count), "test": self._generate_examples(7)}

        def _generate_examples(self, number):
            for i in range(number):
                yield (
                    i,
                    {
                        "id": f"id{i}",
                        "image": np.full((8, 8, 3), i, np.uint8),
                        "captions": [f"c{i} {k}" for k in range(i % 3 + 1)],
                        "label": i % 2,
                        "count": i % 4,
                        "unseen": i % 5 == 0,
                        "objects": [{"color": "green", "box": 0.5}] * (i % 3),
                        "frames": np.zeros((2, 4, 4, 3), np.uint8),
                    },
                )

    config = tfds.download.DownloadConfig(num_shards=3) if count >= 60 else None
    Toy(data_dir=str(data_dir), file_format=file_format).download_and_prepare(
        download_config=config
    )


@pytest.fixture(scope="module")
def toy_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    make_toy(path, "array_record")
    return path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def toy(data_dir, **keys):
    return {"source": "tfds", "dataset": "toy", "data_dir": str(data_dir), **keys}


def test_tfds_reads_by_index_and_leaves_images_encoded(toy_dir, no_network):
    source = build_source(toy(toy_dir))
    assert len(source) == 60
    ids = [parse(source, i, ["id"])["id"] for i in range(60)]
    assert sorted(ids) == sorted(f"id{i}".encode() for i in range(60))
    for index in (0, 31, 59):
        example = parse(source, index)
        number = int(example["id"][2:])
        assert np.asarray(Image.open(io.BytesIO(example["image"])))[0, 0, 0] == number
        assert example["captions"].tolist() == [
            f"c{number} {k}".encode() for k in range(number % 3 + 1)
        ]
        assert example["objects/color"].tolist() == [1] * (number % 3)
        assert len(example["frames"]) == 2 and example["frames"][0][:4] == b"\x89PNG"
        assert source.column("id")[index] == example["id"]
    assert source.fields()["image"].is_string and source.fields()["objects/box"].shape == (None,)
    assert source.class_names("label") == ("even", "odd")
    assert source.class_names("objects/color") == ("red", "green")
    assert source.class_names("count") is None and source.class_names("nothing") is None
    assert "toy" in source.describe(31) and "array_record" in source.describe(31)


def test_tfds_fetch_order_and_slices(toy_dir):
    source = build_source(toy(toy_dir))
    records = source.fetch(np.arange(60))["record"]
    order = np.random.default_rng(0).permutation(60)
    assert source.fetch(order)["record"].tolist() == records[order].tolist()
    for split, expected in (
        ("train[10:25]", records[10:25]),
        ("train[:10%]", records[:6]),
        ("train[50:]+train[:5]", np.concatenate([records[50:], records[:5]])),
    ):
        part = build_source(toy(toy_dir, split=split))
        assert part.fetch(np.arange(len(part)))["record"].tolist() == expected.tolist()
    assert len(build_source(toy(toy_dir, split="test", dataset="toy:1.0.0"))) == 7


def test_where_and_limit(toy_dir):
    whole = build_source(toy(toy_dir))
    number = np.array([int(name[2:]) for name in whole.column("id")])
    chosen = build_source(
        toy(toy_dir, where={"count": 1, "unseen": False, "label": "odd"}, limit=5)
    )
    kept = number[(number % 4 == 1) & (number % 5 != 0)][:5]
    assert [int(name[2:]) for name in chosen.column("id")] == kept.tolist()
    assert int(parse(chosen, 3, ["id"])["id"][2:]) == kept[3]
    assert chosen.class_names("label") == ("even", "odd") and len(chosen) == 5
    ml_collections = pytest.importorskip("ml_collections")
    config = ml_collections.ConfigDict(toy(toy_dir, where={"count": 1}))
    assert set(build_source(config).column("count")) == {1}
    by_name = build_source(toy(toy_dir, where={"id": "id7"}))
    assert by_name.column("count").tolist() == [3]
    refuses(toy(toy_dir, where={"cuont": 1}), "did you mean 'count'")
    refuses(toy(toy_dir, where={"captions": "x"}), "scalar fields")
    refuses(toy(toy_dir, where={"label": "od"}), "did you mean 'odd'")
    refuses(toy(toy_dir, where={"count": "x"}), "holds numbers")
    refuses(toy(toy_dir, where={"id": 3}), "cannot be compared")
    refuses(toy(toy_dir, where={"count": 9}), "matches none of 60")
    refuses(toy(toy_dir, limit=0), "limit=0")


def test_tfds_mistakes(toy_dir, tmp_path, no_network):
    refuses(toy(toy_dir, dataset="toyy"), "did you mean 'toy'")
    refuses(toy(toy_dir, dataset="shapse"), "did you mean 'shapes'")
    message = refuses(toy(toy_dir, dataset="mnist"), "not prepared in")
    assert "tfds.builder('mnist'" in message and "download_and_prepare()" in message
    refuses(toy(toy_dir, dataset="toy:9.9.9"), "of 'toy' there is: 1.0.0")
    refuses(toy(toy_dir, dataset="a/b/c/d"), "not a dataset name")
    refuses(toy(toy_dir, split="trian"), r"did you mean 'train'.*train \(60\), test \(7\)")
    refuses(toy(toy_dir, split="train[:"), "slices look like")
    refuses(toy(toy_dir, split="train[5:2]"), "holds no examples")
    refuses(toy(toy_dir, split="train[100%:]"), "holds no examples")
    make_toy(tmp_path, "tfrecord", count=3)
    info = next(tmp_path.glob("toy/*/dataset_info.json"))
    info.write_text(info.read_text().replace('"tfrecord"', '"riegeli"'))
    message = refuses(toy(tmp_path), "riegeli files")
    assert "file_format='array_record'" in message


def test_the_command_in_the_message_is_python(toy_dir):
    message = refuses(toy(toy_dir, dataset="mnist"), "prepare it with")
    code = message.split('python -c "')[1].rstrip('"')
    compile(code, "message", "exec")


# ------------------------------------------------------------------------------------- arrays


def test_arrays():
    arrays = {"image": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), "text": ["a", "b\0"]}
    source = build_source({"source": "arrays", "arrays": arrays, "names": {"label": ["x", "y"]}})
    assert len(source) == 2 and not source.needs_tensorflow
    batch = source.fetch(np.array([1, 0, 1]))
    assert batch["text"].tolist() == [b"b\0", b"a", b"b\0"]
    np.testing.assert_array_equal(batch["image"], arrays["image"][[1, 0, 1]])
    assert source.class_names("label") == ("x", "y")


def test_arrays_mistakes():
    for arrays, message in (
        ({}, "no examples"),
        ({"a": np.zeros(0)}, "no examples"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, "different lengths"),
        ({"a": [[b"x"], [b"y", b"z"]]}, "numbers|shape"),
        ({"a": np.zeros(2, "M8[s]")}, "numbers"),
    ):
        refuses({"source": "arrays", "arrays": arrays}, message)


def test_unknown_source_names_the_nearest():
    for name in SOURCES:
        refuses({"source": name + "x"}, f"did you mean '{name}'")
    refuses({}, "known: array_record, arrays, folder")


def test_a_folder_for_each_class_needs_no_caption_file(tmp_path):
    for name in ("red_fox/b.jpg", "red_fox/deep/a.PNG", "owl/c.jpg", "owl/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    data = {"source": "folder", "path": str(tmp_path), "split": "all"}
    source = build_source(data)
    paths = ["owl/c.jpg", "red_fox/b.jpg", "red_fox/deep/a.PNG"]
    assert [bytes(p).decode() for p in source.column("path")] == paths
    assert [bytes(image).decode() for image in source.column("image")] == paths
    assert source.column("label").tolist() == [0, 1, 1]
    assert source.class_names("label") == ("owl", "red_fox")
    ops = {"choose_text": {}, "prompt_template": {"templates": "a photo of a {}"}}
    texts = sample_texts({**data, "preprocess": {**ops, "keep": {"fields": ("text",)}}})
    assert set(texts) == {"a photo of a owl", "a photo of a red fox"}
    ordered = build_source({**data, "label_names": ["red_fox", "owl", "cat"]})
    assert ordered.column("label").tolist() == [1, 0, 0]
    with pytest.raises(UserError, match="no caption file whose columns"):
        build_source({**data, "label_field": "kind"})
