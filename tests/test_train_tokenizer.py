"""tools.train_tokenizer: texts in, a file that a config uses out."""

import json
import random

import pytest

from vlp_jax.commands import train_tokenizer
from vlp_jax.data.tokenizers import build_tokenizer

COLORS, SHAPES = (
    ("red", "Blue", "grün", "жёлтый", "赤い"),
    ("circle", "box", "Würfel", "круг", "丸"),
)
CAPTIONS = [f"a {c} {s} on a {b} floor" for c in COLORS for s in SHAPES for b in COLORS] * 2
NAMES = {"bpe": "subword"} | dict.fromkeys(
    ("sentencepiece-unigram", "sentencepiece-bpe"), "sentencepiece"
)


def command(*arguments):
    return train_tokenizer.main([str(argument) for argument in arguments])


def write_texts(path, texts):
    if path.suffix == ".txt":
        path.write_text("\n".join(texts) + "\n\n")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"n": 1, "caption": text}) for text in texts) + "\n")
    else:
        sign = {".csv": ",", ".tsv": "\t"}[path.suffix]
        quote = '"' if sign == "," else ""
        rows = [f"{n}{sign}{quote}{text}{quote}" for n, text in enumerate(texts)]
        path.write_text("\n".join([f"n{sign}caption", *rows]))
    return path


@pytest.mark.parametrize("kind", train_tokenizer.KINDS)
def test_the_lines_of_the_report_use_what_was_written(kind, tmp_path, capsys):
    texts = write_texts(tmp_path / "captions.txt", CAPTIONS)
    output = tmp_path / "new" / "tokenizer"
    arguments = ("--kind", kind, "--vocab-size", 300, "--output", output, "--context-length", 12)
    assert command("--texts", texts, *arguments) == 0
    out = capsys.readouterr().out
    section = json.loads(out[out.index("ConfigDict(") + 11 : out.rindex(",\n")] + "}")
    assert section["name"] == NAMES[kind] and section["context_length"] == 12
    tokenizer = build_tokenizer(section, list, None)
    assert tokenizer.vocab_size == section["vocab_size"] <= 300
    lengths = [len(ids) + 1 + (tokenizer.bos_id is not None) for ids in tokenizer.encode(CAPTIONS)]
    mean, cut = sum(lengths) / len(lengths), sum(n > 12 for n in lengths) / len(lengths)
    size = sum(len(text.encode()) for text in CAPTIONS)
    frame = len(CAPTIONS) * (1 if tokenizer.bos_id is None else 2)
    assert f"tokens per caption    {mean:.1f} (95 %" in out
    assert f"at most {sorted(lengths)[-(-len(lengths) * 95 // 100) - 1]})" in out
    assert f"cut at 12             {100 * cut:.2f} %" in out
    assert f"bytes per token       {size / (sum(lengths) - frame):.2f}" in out
    # The order of the captions does not count.
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    again = write_texts(tmp_path / "shuffled.txt", shuffled)
    other = tmp_path / "other"
    assert command("--texts", again, *arguments[:-4], "--output", other) == 0
    assert other.read_bytes() == output.read_bytes()


def test_unknown_tokens_are_counted(tmp_path):
    tokenizer = train_tokenizer.make("sentencepiece-bpe", CAPTIONS, 300, 16)
    found = train_tokenizer.measure(tokenizer, ["a red box", "☃ a"])
    assert found.texts == 2 and found.unknown == pytest.approx(1 / 6)  # a red box _ ☃ a
    assert train_tokenizer.measure(tokenizer, CAPTIONS).unknown == 0


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv"])
def test_files_of_texts(suffix, tmp_path, encoding):
    file = write_texts(tmp_path / f"captions{suffix}", [*CAPTIONS[:5], " "])
    file.write_text(file.read_text(), encoding)
    assert list(train_tokenizer.texts_of_files([file, file], "caption")) == CAPTIONS[:5] * 2


def test_lists_of_captions_in_jsonl(tmp_path):
    file = tmp_path / "captions.jsonl"
    file.write_text('{"texts": ["a b", "c"]}\n\n{"texts": "d"}\n')
    assert list(train_tokenizer.texts_of_files([file], "texts")) == ["a b", "c", "d"]


CONFIG = """
from configs import clip_folder

def get_config(arg=None):
    config = clip_folder.get_config()
    config.data = {"source": "arrays", "arrays": {"text": [t.encode() for t in %r]}}
    config.tokenizer.context_length = 9
    return config
"""


def test_the_captions_of_a_config(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(CONFIG % (CAPTIONS,))
    arguments = ("--config", tmp_path / "mine.py", "--kind", "bpe", "--vocab-size", 320)
    assert command(*arguments, "--output", tmp_path / "a.json") == 0
    out, err = capsys.readouterr()
    assert '"context_length": 9' in out
    assert f"read {5 * len(CAPTIONS):,} texts" in err  # each five times, see `sample_texts`
    assert command(*arguments, "--output", tmp_path / "b.json", "--limit", 40) == 0
    assert "read 40 texts" in capsys.readouterr().err


def test_a_config_runs_its_operations(tmp_path, capsys):
    config = CONFIG % (CAPTIONS,)
    config = config.replace(
        "    return", "    config.data.preprocess = {'lowercase': {}}\n    return"
    )
    (tmp_path / "mine.py").write_text(config)
    arguments = ("--config", tmp_path / "mine.py", "--kind", "bpe", "--vocab-size", 320)
    assert command(*arguments, "--output", tmp_path / "a.json") == 0
    vocabulary = json.loads((tmp_path / "a.json").read_text())["model"]["vocab"]
    assert "blue" in "".join(vocabulary) and "Blue" not in "".join(vocabulary)


def test_mistakes_end_in_one_line(tmp_path, capsys):
    texts = write_texts(tmp_path / "captions.txt", CAPTIONS)
    table = write_texts(tmp_path / "captions.csv", CAPTIONS)
    (tmp_path / "broken.jsonl").write_text('{"caption": "a"}\n{"capt')
    (tmp_path / "numbers.jsonl").write_text('{"caption": 3}\n')
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes(b"gr\xfcn")
    (tmp_path / "captions.parquet").write_bytes(b"")
    (tmp_path / "comma.csv").write_text("n,caption\n1,red, on a mat\n")
    good = {"--texts": texts, "--kind": "bpe", "--vocab-size": 300, "--output": tmp_path / "out"}
    for changes, message in (
        ({"--texts": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"--texts": tmp_path / "captions.parquet"}, "is none of .txt, .jsonl, .csv, .tsv"),
        ({"--texts": tmp_path / "broken.jsonl"}, "broken.jsonl, line 2: malformed JSON"),
        ({"--texts": tmp_path / "numbers.jsonl"}, "line 1: 'caption' is 3, not a text"),
        ({"--texts": tmp_path / "empty.txt"}, "there is no text"),
        ({"--texts": tmp_path / "latin.txt"}, "is not UTF-8"),
        ({"--texts": tmp_path / "comma.csv"}, "line 2: the row has 3 cells and the header 2"),
        ({"--texts": table, "--field": "captoin"}, "did you mean 'caption'"),
        ({"--vocab-size": 100}, "must be at least 259"),
        ({"--kind": "sentencepiece-bpe", "--vocab-size": 5}, "cannot make 5 tokens"),
        ({"--output": texts}, "exists; choose another file, or give --overwrite"),
        ({"--output": texts / "x"}, "--output"),
        ({"--limit": 0}, "--limit must be at least 1, not 0"),
        ({"--context-length": 2}, "context_length=2"),
        ({"--config": "configs/clip_folder.py"}, "either --config"),
        ({"--config.data.path": "x"}, "without --config"),
    ):
        arguments = [part for pair in {**good, **changes}.items() for part in pair]
        if "--config.data.path" in changes:
            arguments = [*arguments[:-2], "--config.data.path=x"]
        assert command(*arguments) == 2, changes
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and message in last, last
        assert not (tmp_path / "out").exists()
