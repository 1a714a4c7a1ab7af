"""Tokenizers: round trips in many scripts, framing, truncation, files, and bad input."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from vlp_jax.data.tokenizers import (
    ByteTokenizer,
    SubwordTokenizer,
    build_tokenizer,
    train_subword,
)
from vlp_jax.data.wording import Wording
from vlp_jax.errors import UserError

CANONICAL = Wording((("canonicalize_text", {}),))
SCRIPTS = [
    "a red circle, left of 2 blue squares",
    "ein großer grüner Würfel",
    "красный круг слева от синего квадрата",
    "ένας κόκκινος κύκλος",
    "دائرة حمراء بجانب مربع أزرق",
    "עיגול אדום ליד ריבוע כחול",
    "नीले वर्ग के पास लाल वृत्त",
    "วงกลมสีแดงอยู่ข้างสี่เหลี่ยม",
    "红色圆圈在蓝色方块的左边",
    "青い四角の左に赤い丸があります",
    "파란 사각형 왼쪽의 빨간 원",
    "კარგი წითელი წრე 🟥👩‍👩‍👧 \t two  spaces\n",
]
ENGLISH = [f"a {c} {s} on a {b} floor" for c in ("red", "blue") for s in ("circle", "box") for b in
           ("white", "black", "grey")] * 3  # fmt: skip


@pytest.fixture(scope="module")
def subword():
    return train_subword(ENGLISH, vocab_size=300, context_length=200)


@pytest.fixture(params=["bytes", "subword"])
def tokenizer(request, subword):
    return ByteTokenizer(200) if request.param == "bytes" else subword


def test_any_script_round_trips(tokenizer):
    ids = tokenizer(SCRIPTS)
    assert ids.shape == (len(SCRIPTS), 200) and ids.dtype == np.int32
    assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == SCRIPTS
    np.testing.assert_array_equal(ids, tokenizer([text.encode() for text in SCRIPTS]))


def test_rows_are_framed_and_padded(tokenizer):
    for row in tokenizer(["", "red", "a blue box"]):
        end = int(np.flatnonzero(row == tokenizer.eos_id)[0])
        assert row[0] == tokenizer.bos_id
        assert np.all(row[end + 1 :] == tokenizer.pad_id)
        specials = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]
        assert not np.isin(row[1:end], specials).any()


def test_truncation_keeps_eos(subword, tmp_path):
    subword.save(tmp_path / "t.json")
    for short in (ByteTokenizer(5), SubwordTokenizer.load(tmp_path / "t.json", 5)):
        row = short(["a red circle on a white floor, " * 9])[0]
        assert row[0] == short.bos_id and row[-1] == short.eos_id
        whole = type(short)(200) if isinstance(short, ByteTokenizer) else subword
        np.testing.assert_array_equal(row[:4], whole(["a red circle on a white floor"])[0, :4])


def test_text_that_spells_a_special_token_is_text(tokenizer):
    text = "a <eos> b <pad> <bos>"
    ids = tokenizer([text])
    assert np.sum(ids == tokenizer.eos_id) == 1
    assert tokenizer.decode(ids) == [text]


def rows_by_library(content, context_length, pad_id, texts):
    """What the library makes of a tokenizer.json with the settings that `to_json` leaves open."""
    model = tokenizers.Tokenizer.from_str(content)
    model.encode_special_tokens = True
    model.enable_truncation(context_length)
    model.enable_padding(pad_id=pad_id, length=context_length)
    return np.array([encoding.ids for encoding in model.encode_batch(texts)])


@pytest.mark.parametrize("context_length", [3, 9, 200])
@pytest.mark.parametrize("name", ["bytes", "subword"])
def test_the_file_for_others_gives_the_same_rows(name, context_length, subword, tmp_path):
    subword.save(tmp_path / "t.json")
    if name == "bytes":
        ours = ByteTokenizer(context_length)
    else:
        ours = SubwordTokenizer.load(tmp_path / "t.json", context_length)
    texts = [*SCRIPTS, *ENGLISH[:3], "", "a <eos> b <pad> <bos>", "a long text " * 40]
    theirs = rows_by_library(ours.to_json(lowercase=False), context_length, ours.pad_id, texts)
    np.testing.assert_array_equal(ours(texts), theirs)


def test_the_file_for_others_lowercases_when_asked(subword):
    texts = ["A RED Circle", "КРАСНЫЙ Круг"]
    theirs = rows_by_library(subword.to_json(lowercase=True), 200, subword.pad_id, texts)
    np.testing.assert_array_equal(subword([text.lower() for text in texts]), theirs)
    assert not np.array_equal(subword(texts), theirs)


def test_the_file_for_others_canonicalizes_when_asked(subword):
    """As the operation on a run's texts does, white space and punctuation of all kinds included."""
    texts = [
        *SCRIPTS,
        "A RED_Circle, (2)!",
        " two\u00a0\u3000 spaces\t",
        "ΟΔΟΣ. x",
        "...",
        "<eos> [a]",
    ]
    op = CANONICAL(texts)
    content = subword.to_json(lowercase=False, canonicalize=True)
    theirs = rows_by_library(content, 200, subword.pad_id, texts)
    np.testing.assert_array_equal(subword(op), theirs)
    assert not np.array_equal(subword([text.lower() for text in texts]), theirs)


def test_rows_without_bos_and_padding_by_eos(subword, tmp_path):
    content = subword._file.replace("<bos>", "<first>").replace("<pad>", "<empty>")
    (tmp_path / "other.json").write_text(content, "utf-8-sig")
    other = SubwordTokenizer.load(tmp_path / "other.json", 8)
    assert other.bos_id is None and other.pad_id == other.eos_id == 1
    expected = subword(["red box"])[0]
    length = int(np.sum(expected != subword.pad_id))
    row = other(["red box"])[0]
    np.testing.assert_array_equal(row[: length - 1], expected[1:length])
    assert np.all(row[length - 1 :] == other.eos_id)
    assert other.decode(row[None]) == ["red box"]
    long = ["a red circle on a white floor " * 9]
    assert other(long)[0, -1] == other.eos_id
    theirs = rows_by_library(other.to_json(lowercase=False), 8, other.pad_id, ["red box", *long])
    np.testing.assert_array_equal(other(["red box", *long]), theirs)


def test_no_special_token_has_the_id_that_clip_takes_for_the_highest(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)


def test_broken_text_does_not_stop_the_run(tokenizer):
    assert tokenizer([b"ok \xff\xfe", "half \ud83d"]).shape == (2, 200)


def test_subwords_are_shorter_than_bytes(subword):
    text = ["a red circle on a white floor"]
    bytes_used = np.sum(ByteTokenizer(200)(text) != 0)
    assert np.sum(subword(text) != subword.pad_id) < 0.6 * bytes_used
    assert subword.vocab_size <= 300


def test_training_is_deterministic_across_processes_and_orders(tmp_path):
    code = (
        "import sys\n"
        "from vlp_jax.data.tokenizers import train_subword\n"
        f"texts = {ENGLISH + SCRIPTS!r}\n"
        "texts = texts[::-1] if sys.argv[2] == '1' else texts\n"
        "train_subword(texts, 320, 32).save(sys.argv[1])\n"
    )
    files = [tmp_path / f"{n}.json" for n in range(2)]
    for number, file in enumerate(files):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": str(number)}
        subprocess.run([sys.executable, "-c", code, str(file), str(number)], check=True, env=env)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_build_trains_once_and_then_loads(tmp_path):
    calls = []

    def texts():
        calls.append(1)
        return ENGLISH

    config = {"name": "subword", "context_length": 16, "vocab_size": 300}
    path = tmp_path / "new" / "tokenizer.json"
    first = build_tokenizer(config, texts, path)
    second = build_tokenizer(config, texts, path)
    assert calls == [1]
    np.testing.assert_array_equal(first(SCRIPTS), second(SCRIPTS))
    given = build_tokenizer({**config, "file": str(path)}, texts, tmp_path / "unused.json")
    np.testing.assert_array_equal(first(SCRIPTS), given(SCRIPTS))
    assert not (tmp_path / "unused.json").exists()
    assert sorted(p.name for p in path.parent.iterdir()) == ["tokenizer.json"]


def test_a_file_of_others_is_used_with_its_own_special_tokens(tmp_path, subword):
    content = json.loads(subword._file)
    text = json.dumps(content).replace("<bos>", "<|startoftext|>").replace("<eos>", "</s>")
    (tmp_path / "other.json").write_text(text)
    other = SubwordTokenizer.load(tmp_path / "other.json", 200)
    np.testing.assert_array_equal(other(SCRIPTS), subword(SCRIPTS))


def test_bytes_need_no_training():
    def fail():
        raise AssertionError("texts were asked for")

    tokenizer = build_tokenizer({"name": "bytes", "context_length": 12}, fail, None)
    assert tokenizer.vocab_size == 259 and tokenizer.context_length == 12


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "subwords", "context_length": 8}, "did you mean 'subword'"),
        ({"name": "bytes", "context_lenght": 8}, "did you mean 'context_length'"),
        ({"name": "bytes", "context_length": 2}, "context_length=2"),
        ({"name": "bytes", "context_length": 8, "vocab_size": 100}, "less than the 259"),
        ({"name": "bytes", "context_length": 8, "file": "x.json"}, "no file"),
        ({"name": "subword", "context_length": 8}, "vocab_size is not set"),
        ({"name": "subword", "context_length": 8, "vocab_size": 258}, "at least 259"),
        ({"name": "subword", "context_length": 8, "file": "/nowhere.json"}, "does not exist"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(UserError, match=message) as caught:
        build_tokenizer(config, lambda: ENGLISH, None)
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path, subword):
    broken = tmp_path / "broken.json"
    broken.write_text(subword._file[:500])
    nameless = tmp_path / "nameless.json"
    nameless.write_text(subword._file.replace("<eos>", "<finis>"))
    kept = tmp_path / "kept.json"
    subword.save(kept)
    config = {"name": "subword", "context_length": 8, "vocab_size": 300}
    for file, message in ((broken, "not a tokenizer.json"), (nameless, "no eos token")):
        with pytest.raises(UserError, match=message) as caught:
            build_tokenizer({**config, "file": str(file)}, lambda: [], None)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="vocab_size=260 is less than"):
        build_tokenizer({**config, "vocab_size": 260}, lambda: [], kept)
    with pytest.raises(UserError, match="no text"):
        build_tokenizer(config, lambda: [], None)
