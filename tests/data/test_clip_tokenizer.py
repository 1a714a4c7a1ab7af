"""CLIP's tokenizer: its files, its framing, and what others get of it."""

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import corpus
import numpy as np
import pytest
import tokenizers

from vlp_jax.data.tokenizers import ClipTokenizer, build_tokenizer
from vlp_jax.data.tokenizers.clip import MAX_MERGES, clean
from vlp_jax.errors import UserError

CONFIG = {"name": "clip", "context_length": 77}
TEXTS = list(corpus.captions())


@pytest.fixture(scope="module")
def clip():
    return build_tokenizer(CONFIG, list, None)


@pytest.fixture(scope="module")
def merges_file():
    folder = Path(importlib.util.find_spec("open_clip").origin).parent
    return folder / "bpe_simple_vocab_16e6.txt.gz"


def test_numbers(clip):
    assert (clip.vocab_size, clip.bos_id, clip.eos_id, clip.pad_id) == (49408, 49406, 49407, 0)
    # As openai/CLIP's notebook prints "a diagram" and others know "a photo of a cat".
    assert clip(["a photo of a cat"])[0, :8].tolist() == [
        *(49406, 320, 1125, 539, 320, 2368, 49407, 0),
    ]
    row = clip(["wow " * 100])[0]
    assert row[0] == clip.bos_id and row[-1] == clip.eos_id and (row[1:-1] == row[1]).all()


def test_text_that_spells_a_special_token_is_text(clip):
    texts = ["<|endoftext|> <end_of_text> <start_of_text>"]
    assert max(clip.encode(texts)[0]) < clip.bos_id
    assert clip.decode(clip(texts))[0].replace(" ", "") == texts[0].replace(" ", "")


def test_decode_gives_the_cleaned_words(clip):
    texts = ["A  café,\nit's 42 &amp; ΟΔΟΣ 日本語", "don't", "👩‍👩‍👧 ок"]
    assert clip.decode(clip(texts)) == ["a café , it 's 4 2 & οδος 日本語", "don 't", "👩‍👩‍👧 ок"]


def test_the_short_way_through_cleaning_changes_nothing():
    import html

    import ftfy

    printable = "".join(map(chr, range(0x20, 0x7F)))
    for text in [printable, *(a + b for a in printable for b in printable), *TEXTS]:
        whole = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert clean(text) == " ".join(whole.split()).lower()


def test_every_file_gives_the_same_ids(clip, merges_file, tmp_path):
    lines = gzip.decompress(merges_file.read_bytes()).decode().split("\n")
    (tmp_path / "bpe.txt").write_text("\n".join(lines))
    (tmp_path / "bpe.txt.gz").write_bytes(merges_file.read_bytes())
    merges = lines[1 : MAX_MERGES + 1]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (tmp_path / "marked.txt").write_text("\n".join(lines), "utf-8-sig")
    clip.save(tmp_path / "kept.json")
    assert json.loads((tmp_path / "kept.json").read_text())["type"] == "clip"
    expected = clip(TEXTS[:50])
    for name in ("bpe.txt", "bpe.txt.gz", "merges.txt", "marked.txt", "kept.json"):
        other = build_tokenizer({**CONFIG, "file": str(tmp_path / name)}, list, None)
        assert other.vocab_size == 49408
        np.testing.assert_array_equal(other(TEXTS[:50]), expected)


def test_a_shorter_list_of_merges_has_its_own_special_ids(tmp_path):
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    small = ClipTokenizer.load(tmp_path / "merges.txt", 8)
    assert (small.vocab_size, small.bos_id, small.eos_id) == (516, 514, 515)
    assert small(["Red re"])[0].tolist() == [514, 513, 81, 324, 515, 0, 0, 0]
    # "r" and "e</w>" by their place among the characters that print, from "!" on.
    assert small.decode(small(["Red re"])) == ["red re"]


def test_a_run_resumes_without_open_clip_and_nothing_imports_torch(tmp_path):
    code = (
        "import sys\n"
        "from vlp_jax.data.tokenizers import build_tokenizer\n"
        "if sys.argv[2] == 'without':\n"
        "    sys.modules['open_clip'] = None\n"
        f"tokenizer = build_tokenizer({CONFIG!r}, list, sys.argv[1])\n"
        "assert 'torch' not in sys.modules\n"
        "print(tokenizer(['a café'])[0, :6].tolist())\n"
    )
    out = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run" / "tokenizer.json"), how],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        ).stdout
        for how in ("with", "without")
    ]
    assert out[0] == out[1] == "[49406, 320, 15304, 49407, 0, 0]\n"


def test_without_open_clip_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install open_clip_torch, or set it to") as caught:
        build_tokenizer(CONFIG, list, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no merges"),
        ("#version: 0.2\nr e\nr e\n", "merge 2 is 'r e'"),
        ("#version: 0.2\nr e\nxy z\n", "merge 2 is 'xy z'"),
        ("#version: 0.2\nr e d\nr e\n", "merge 1 is 'r e d'"),
        ('{"a": 1, "b": 2}', "give the merges.txt beside it"),
        ('{"model": {}, "added_tokens": []}', "set config.tokenizer.name to 'subword'"),
        ('{"type": "bytes"}', "set config.tokenizer.name to 'bytes'"),
    ],
)
def test_files_of_other_kinds(content, message, tmp_path):
    (tmp_path / "file").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        build_tokenizer({**CONFIG, "file": str(tmp_path / "file")}, list, None)
    assert str(tmp_path / "file") in str(caught.value) and "\n" not in str(caught.value)


def test_a_gzip_file_that_is_cut_off(merges_file, tmp_path):
    (tmp_path / "cut.gz").write_bytes(merges_file.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be unpacked"):
        build_tokenizer({**CONFIG, "file": str(tmp_path / "cut.gz")}, list, None)


def test_merges_are_no_tokenizer_of_another_name(merges_file):
    for name in ("subword", "sentencepiece"):
        with pytest.raises(UserError, match="set config.tokenizer.name to 'clip'"):
            build_tokenizer({**CONFIG, "name": name, "file": merges_file}, list, None)


def test_a_bound_below_the_vocabulary(tmp_path):
    with pytest.raises(UserError, match="vocab_size=49407 is less than the 49408 tokens"):
        build_tokenizer({**CONFIG, "vocab_size": 49407}, list, tmp_path / "kept.json")
    assert not (tmp_path / "kept.json").exists()


@pytest.mark.parametrize("context_length", [5, 77])
def test_the_file_for_others_gives_the_same_rows(context_length):
    clip = build_tokenizer({**CONFIG, "context_length": context_length}, list, None)
    model = tokenizers.Tokenizer.from_str(clip.to_json(lowercase=False))
    model.encode_special_tokens = True
    model.enable_truncation(context_length)
    model.enable_padding(pad_id=0, length=context_length)
    # What only ftfy can do: text decoded wrongly, escape sequences, control characters of Latin-1.
    texts = [*corpus.captions(("mojibake", "control")), "wow!!! !", "&amp;lt;b&gt;", "ΜΕΓΑΣ ΣΟΦΟΣ!"]
    rows = np.array([encoding.ids for encoding in model.encode_batch(texts)])
    np.testing.assert_array_equal(rows, clip(texts))
    assert context_length == 5 or model.decode(rows[-1].tolist()).strip() == "μεγας σοφος !"
