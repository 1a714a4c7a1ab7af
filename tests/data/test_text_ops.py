"""Text operations against plain Python, on text in many scripts."""

import collections
import html
import string

import ftfy
import numpy as np
import pytest
import tensorflow as tf

from vlp_jax.data.ops import OPS, apply_ops, build_ops
from vlp_jax.errors import UserError

TEXTS = [
    "",
    "   ",
    "A  red\tcircle, left of\n2 blue_squares! ",
    "Größe\u00a0ŒUVRE — “quoted” ‘text’ ﬁne",
    "КРАСНЫЙ Круг",
    "ΚΌΚΚΙΝΟΣ ΚΎΚΛΟΣ ΣΑΣ.",
    "دائرة حمراء، بجانب مربع",
    "עיגול אדום",
    "नीले वर्ग के पास",
    "วงกลมสีแดง",
    "红色圆圈，在蓝色\u3000方块的左边。",
    "青い四角の左に ｱｶｲ 丸",
    "파란 사각형",
    "წითელი წრე 🟥👩‍👩‍👧",
    "ቀይ ክብ",
    "caf\u0065\u0301 \u200b z\u0085y",
    "Fish &amp;amp; chips &lt;b&gt; &quot;x&quot; AT&T",
    "schÃ¶n â€œMÃ¼nchenâ€\x9d",
    "bell\x07 \ufeffmark\x1b[0m",
    "see https://a.example/x?y=1&z and www.b.example. end",
    "x" * 3000 + " 終わり",
]


PROGRAMS = {}  # operations and types -> the traced function, for all seeds


def run(preprocess, example, seed=(0, 0)):
    # In a graph, as the pipeline runs them; eagerly some mistakes would not show.
    tensors = {k: tf.constant(v) for k, v in example.items()}
    specs = {k: tf.TensorSpec([None] * v.shape.rank, v.dtype) for k, v in tensors.items()}
    key = repr((preprocess, specs))
    if key not in PROGRAMS:
        ops = build_ops(preprocess)

        def process(example, seed):
            return apply_ops(ops, example, tf.tile(seed[None], [len(ops), 1]))

        signature = [specs, tf.TensorSpec([2], tf.int32)]
        PROGRAMS[key] = tf.function(process, signature, autograph=False)
    return {k: v.numpy() for k, v in PROGRAMS[key](tensors, tf.constant(seed, tf.int32)).items()}


def mapped(preprocess, texts, field="text"):
    """The operations on every one of `texts`, in one tf.data graph."""
    ops = build_ops(preprocess)
    encoded = [t if isinstance(t, bytes) else t.encode() for t in texts]
    number = tf.data.Dataset.range(len(texts))
    dataset = tf.data.Dataset.zip((tf.data.Dataset.from_tensor_slices(encoded), number))

    def process(text, number):
        seed = tf.random.split([7, tf.cast(number, tf.int32)], max(len(ops), 1))
        return apply_ops(ops, {field: text}, tf.cast(seed, tf.int32))["text"]

    process = tf.autograph.experimental.do_not_convert(process)
    return [t.decode("utf-8", "replace") for t in dataset.map(process).as_numpy_iterator()]


def choose(captions, seed, **arguments):
    return run({"choose_text": arguments}, {"captions": captions}, seed)["text"].decode()


def counts(example, times=600, **arguments):
    """How often each text is chosen over many seeds, as shares of 1."""
    ops = build_ops({"choose_text": arguments})
    tensors = {name: tf.constant(value) for name, value in example.items()}
    seeds = np.random.default_rng(0).integers(-(2**31), 2**31, (times, 1, 2)).astype(np.int32)
    chosen = tf.data.Dataset.from_tensor_slices(seeds).map(
        tf.autograph.experimental.do_not_convert(lambda s: apply_ops(ops, tensors, s)["text"])
    )
    found = collections.Counter(text.decode() for text in chosen.as_numpy_iterator())
    return {text: count / times for text, count in found.items()}


def test_one_of_several_captions():
    assert counts({"captions": ["a", "b", "c"]}) == pytest.approx(
        {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, abs=0.06
    )
    # As before weights and empty captions were looked at: runs go on with the same captions.
    assert [choose(["a", "b", "c"], (n, 5)) for n in (0, 1, 2, 3, -1)] == list("abcac")
    assert choose(["a", "b", "c"], (0, 0), index=2) == "c"
    assert run({"choose_text": {"field": "title"}}, {"title": "t"})["text"] == b"t"


def test_empty_captions_are_chosen_only_if_all_are():
    assert counts({"captions": ["", "a", " \u3000", "b"]}) == pytest.approx(
        {"a": 0.5, "b": 0.5}, abs=0.07
    )
    assert choose(["a", "", "\n"], (0, 0), index=1) == "a"
    assert choose(["", "", "c", "d"], (0, 0), index=1) == "c"
    assert choose(["", ""], (1, 1)) == choose(["", ""], (1, 1), index=1) == ""
    assert choose(["", ""], (1, 1), weights=[1, 3]) == ""
    assert counts({"captions": ["", "b"]}, weights=[1, 0]) == {"b": 1.0}
    found = run({"choose_text": {}}, {"captions": [b"", b"\xff"]}, (0, 0))["text"]
    assert found == b"\xff"


def test_weights_by_place():
    example = {"captions": ["a", "b", "c", "d"]}
    assert counts(example, weights=[1, 0, 3]) == pytest.approx({"a": 0.25, "c": 0.75}, abs=0.07)
    assert counts({"captions": ["a"]}, weights=[1, 2, 3]) == {"a": 1.0}
    assert counts({"captions": ["a", "", "c"]}, weights=[1, 5, 3]) == pytest.approx(
        {"a": 0.25, "c": 0.75}, abs=0.07
    )


def test_weights_by_field():
    example = {"alt": "a", "synthetic": ["s", "t", ""], "other": "o"}
    assert counts(example, fields={"alt": 1, "synthetic": 3}) == pytest.approx(
        {"a": 0.25, "s": 0.375, "t": 0.375}, abs=0.07
    )
    empty = {"alt": " ", "synthetic": ["s"]}
    assert counts(empty, fields={"alt": 9, "synthetic": 1}, times=50) == {"s": 1.0}


@pytest.mark.parametrize("arguments", [{}, {"index": 2}, {"weights": [1]}])
def test_no_caption_is_a_reason_to_leave_the_example_out(arguments):
    captions = tf.constant(["a"] if "index" in arguments else [], tf.string)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"bad example \(empty caption\)"):
        run({"choose_text": arguments}, {"captions": captions})


def python_clean(text):
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    # Only control characters that an entity spelled are left now.
    text = "".join(c for c in text if c.isspace() or c == "\u0085" or ord(c) >= 0xA0 or c >= " ")
    return " ".join(text.replace("\x7f", "").replace("\ufeff", "").split())


def test_clean_text_is_what_python_makes_of_it():
    assert mapped({"clean_text": {}}, TEXTS) == [python_clean(text) for text in TEXTS]
    cleaned = mapped({"clean_text": {}}, ["schÃ¶n &amp;amp; \x07 gut", "a&#7;b"])
    assert cleaned == ["schön & gut", "ab"]


def test_parts_of_clean_text():
    off = dict.fromkeys(
        ("fix_unicode", "unescape_html", "strip_control", "collapse_whitespace"), False
    )
    text = " “Ã¶” &lt;\x07  \ufeffhttps://a.example/b?c d"

    def only(**on):
        return mapped({"clean_text": {**off, **on}}, [text])[0]

    assert only() == text
    assert only(fix_unicode=True) == ftfy.fix_text(text, unescape_html=False)
    assert only(unescape_html=True) == html.unescape(text)
    assert only(strip_control=True) == text.replace("\x07", "").replace("\ufeff", "")
    assert only(collapse_whitespace=True) == " ".join(text.split())
    assert only(strip_urls=True) == text.replace("https://a.example/b?c", "")
    urls = ["HTTP://X.example", "见https://x.example/图", "awww.x", "go to www.x.example now"]
    assert mapped({"clean_text": {"strip_urls": True}}, urls) == ["", "见图", "awww.x", "go to now"]


def test_plain_text_does_not_go_through_python(monkeypatch):
    def never(*_, **__):
        raise AssertionError("ftfy was called")

    monkeypatch.setattr(ftfy, "fix_text", never)
    assert mapped({"clean_text": {}}, ["A  plain, text\n (1) "]) == ["A plain, text (1)"]
    with pytest.raises(tf.errors.OpError, match="ftfy was called"):
        mapped({"clean_text": {}}, ["Größe"])


def test_bytes_that_are_no_text_do_not_stop_the_run():
    (text,) = mapped({"clean_text": {}, "canonicalize_text": {}}, [b"ok \xff\xfe  Z"])
    assert text.startswith("ok ") and text.endswith(" z")


def python_canonicalize(text):
    """As big_vision, evaluators/proj/image_text/prompt_engineering.py, has it."""
    text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation)).lower()
    return " ".join(text.split()).strip()


def test_canonicalize_text():
    texts = [
        *TEXTS,
        "A\u0085B\x01C",
        string.punctuation + "a" + string.punctuation,
        string.printable,
    ]
    assert mapped({"canonicalize_text": {}}, texts) == [python_canonicalize(t) for t in texts]


def test_lowercase():
    assert mapped({"lowercase": {}}, TEXTS) == [text.lower() for text in TEXTS]
    assert mapped({"lowercase": {}}, ["A\x00B", "\x00"]) == ["ab", ""]
    assert mapped({"canonicalize_text": {}}, ["A\x00B, c"]) == ["ab c"]


def test_templates():
    def filled(templates, example, seed=(0, 0), **arguments):
        arguments = {"templates": templates, **arguments}
        return run({"prompt_template": arguments}, example, seed)["text"].decode()

    both = ["a photo of a {}.", "{style}: {} and {}, {{n}}", "{}"]
    example = {"text": "katze {} {style}", "style": "ölbild", "n": np.int32(7)}
    expected = [
        "a photo of a katze {} {style}.",
        "ölbild: katze {} {style} and katze {} {style}, {n}",
        "katze {} {style}",
    ]
    assert [filled(both, example, index=n) for n in range(3)] == expected
    assert [filled(both, example, (n, 3)) for n in (0, 1, 2, -1)] == [*expected, expected[2]]
    assert filled("{} {n} {n}", example) == "katze {} {style} 7 7"
    label = {"label": np.uint8(1)}
    assert filled("a {}.", label, field="label", names=["cat", "挿絵"]) == "a 挿絵."
    assert filled("class {}", label, field="label") == "class 1"


@pytest.mark.parametrize("label", [2, -1])
def test_a_class_without_a_name_is_a_reason_to_leave_the_example_out(label):
    op = {"templates": "a {}", "field": "label", "names": ["cat", "dog"]}
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"\(missing field\): label {label} "):
        run({"prompt_template": op}, {"label": np.int64(label)})


def test_truncation_at_the_end():
    for size in (1, 3, 8):
        cut = mapped({"truncate_text": {"max_chars": size}}, TEXTS)
        assert cut == [text[:size] for text in TEXTS]
        cut = mapped({"truncate_text": {"max_words": size}}, TEXTS)
        words = [text.split() for text in TEXTS]
        assert cut == [
            " ".join(w[:size]) if len(w) > size else t for t, w in zip(TEXTS, words, strict=True)
        ]
    assert mapped({"truncate_text": {"max_words": 2, "max_chars": 4}}, ["ab cd ef"]) == ["ab c"]


def test_truncation_to_a_random_window():
    text = " ".join(f"wört{n}" for n in range(10))
    seen = set()
    for number in range(60):
        preprocess = {"truncate_text": {"max_words": 4, "where": "random"}}
        window = run(preprocess, {"text": text}, (number, 1))["text"].decode()
        assert window in text and len(window.split()) == 4
        assert window == run(preprocess, {"text": text}, (number, 1))["text"].decode()
        seen.add(window.split()[0])
    assert seen == {f"wört{n}" for n in range(7)}
    letters = "αβγδεζηθ"
    preprocess = {"truncate_text": {"max_chars": 3, "where": "random"}}
    windows = {
        run(preprocess, {"text": letters}, (number, 1))["text"].decode() for number in range(60)
    }
    assert windows == {letters[n : n + 3] for n in range(6)}
    assert run(preprocess, {"text": "αβγ"}, (5, 5))["text"].decode() == "αβγ"


def test_a_mapping_runs_in_the_order_of_the_table():
    preprocess = {
        "truncate_text": {"max_words": 4},
        "lowercase": {},
        "prompt_template": {"templates": "A photo of {}"},
        "choose_text": {"index": 0},
        "clean_text": {},
    }
    text = run(preprocess, {"captions": ["  Fish &amp; CHIPS too"]})["text"].decode()
    assert text == "a photo of fish"
    assert list(OPS)[:7] == [
        "choose_text",
        "choose_question",
        "clean_text",
        "prompt_template",
        "canonicalize_text",
        "lowercase",
        "truncate_text",
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("choose_text", {"index": -1}, "index must be None or a number from 0"),
        ("choose_text", {"index": 0, "weights": [1]}, "index excludes weights"),
        ("choose_text", {"fields": {"a": 1}, "field": "b"}, "fields excludes"),
        ("choose_text", {"weights": [0, 0]}, "not all 0"),
        ("choose_text", {"weights": [1, -1]}, "numbers from 0"),
        ("choose_text", {"weights": ["x"]}, "numbers from 0"),
        ("choose_text", {"fields": {}}, "numbers from 0"),
        ("clean_text", {"strip_urls": "yes"}, "True or False"),
        ("clean_text", {"strip_url": True}, "did you mean 'strip_urls'"),
        ("prompt_template", {}, "needs templates"),
        ("prompt_template", {"templates": []}, "is empty"),
        ("prompt_template", {"templates": "a photo"}, "no place to fill in"),
        ("prompt_template", {"templates": "a {"}, "Single '{'"),
        ("prompt_template", {"templates": "a {:d}"}, "without a format"),
        ("prompt_template", {"templates": "a {}", "index": 1}, "0 to 0"),
        ("prompt_template", {"templates": "a {}", "names": []}, "a list of the names"),
        ("prompt_template", {"templates": "a {n}", "names": ["b"]}, "no template has {}"),
        ("truncate_text", {}, "set max_words or max_chars"),
        ("truncate_text", {"max_words": 0}, "number from 1"),
        ("truncate_text", {"max_chars": 4, "where": "begin"}, "'end' or 'random'"),
    ],
)
def test_wrong_settings(name, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        build_ops({name: arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("preprocess", "example", "message"),
    [
        ({"choose_text": {"fields": {"alt": 1, "b": 1}}}, {"alt": "x"}, "unknown key 'b'"),
        ({"choose_text": {}}, {"captions": [1, 2]}, "holds no strings"),
        ({"clean_text": {}}, {"text": ["a", "b"]}, "choose_text makes one"),
        ({"prompt_template": {"templates": "{n}"}}, {"n": [1, 2]}, "neither a string nor a number"),
        ({"prompt_template": {"templates": "{m}"}}, {"n": 1}, "unknown key 'm'"),
        (
            {"prompt_template": {"templates": "{}", "names": ["a"]}},
            {"text": "x"},
            "is no whole number",
        ),
    ],
)
def test_wrong_fields(preprocess, example, message):
    with pytest.raises(UserError, match=message):
        run(preprocess, example)
