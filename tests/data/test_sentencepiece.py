"""SentencePiece models: their ids, their files, and what others get of them."""

import json

import corpus
import numpy as np
import pytest
import sentencepiece
import tokenizers

from vlp_jax.data.tokenizers import (
    SentencePieceTokenizer,
    build_tokenizer,
    train_sentencepiece,
    train_subword,
)
from vlp_jax.data.tokenizers.sentence_piece import ModelFile
from vlp_jax.data.wording import Wording
from vlp_jax.errors import UserError

CANONICAL = Wording((("canonicalize_text", {}),))
TEXTS = list(corpus.captions())


def tokenizer_of(name, context_length=64):
    model = corpus.sentencepiece_model(**corpus.MODELS[name])
    return SentencePieceTokenizer(model, context_length, name)


@pytest.fixture(params=["t5", "llama", "gemma"])
def tokenizer(request):
    return tokenizer_of(request.param)


def test_rows_are_the_librarys_ids_framed_and_cut(tokenizer):
    library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_file)
    first = [] if tokenizer.bos_id is None else [library.bos_id()]
    rows = tokenizer(TEXTS)
    assert rows.dtype == np.int32 and rows.max() < tokenizer.vocab_size == len(library)
    for row, ids in zip(rows, library.encode(TEXTS), strict=True):
        expected = [*first, *ids[: 63 - len(first)], library.eos_id()]
        assert row.tolist() == expected + [tokenizer.pad_id] * (64 - len(expected))
    assert (rows[5:7, -1] == tokenizer.eos_id).all()  # the long ones


def test_special_ids_are_those_of_the_model():
    t5, llama, gemma = (tokenizer_of(name) for name in ("t5", "llama", "gemma"))
    assert (t5.pad_id, t5.eos_id, t5.bos_id) == (0, 1, None)
    assert (llama.pad_id, llama.eos_id, llama.bos_id) == (2, 2, 1)  # it has no pad: eos pads
    assert (gemma.pad_id, gemma.eos_id, gemma.bos_id) == (0, 1, 2)


def test_text_that_spells_a_special_token_is_text(tokenizer):
    rows = tokenizer.encode(["a </s> b <pad> <s> <unk>"])
    assert not np.isin(rows, [tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id]).any()


def test_decode_gives_the_text_back():
    texts = ["a red circle", "красный круг", "青い四角の 左に"]
    assert tokenizer_of("t5").decode(tokenizer_of("t5")(texts)) == texts
    texts += ["  two  spaces ", "\u4e02 and \x07 become bytes", "a </s> b"]
    assert tokenizer_of("llama").decode(tokenizer_of("llama")(texts)) == texts


def test_a_run_keeps_it_in_one_file(tokenizer, tmp_path):
    model = tmp_path / "spiece.model"
    model.write_bytes(tokenizer.model_file)
    config = {"name": "sentencepiece", "context_length": 64, "vocab_size": 900, "file": str(model)}
    given = build_tokenizer(config, list, tmp_path / "unused.json")
    assert not (tmp_path / "unused.json").exists()
    given.save(tmp_path / "run" / "tokenizer.json")
    model.unlink()
    kept = build_tokenizer({**config, "file": None}, list, tmp_path / "run" / "tokenizer.json")
    assert kept.model_file == tokenizer.model_file
    np.testing.assert_array_equal(kept(TEXTS), tokenizer(TEXTS))
    also = {**config, "file": str(tmp_path / "run" / "tokenizer.json")}
    np.testing.assert_array_equal(build_tokenizer(also, list, None)(TEXTS), tokenizer(TEXTS))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer.json"]


def library_rows(content, tokenizer, texts, length=64):
    """What the other library makes of a tokenizer.json with what `to_json` leaves open."""
    model = tokenizers.Tokenizer.from_str(content)
    model.encode_special_tokens = True
    model.enable_truncation(length)
    model.enable_padding(pad_id=tokenizer.pad_id, length=length)
    return np.array([encoding.ids for encoding in model.encode_batch(list(texts))])


@pytest.mark.parametrize("name", corpus.MODELS)
def test_the_file_for_others_gives_the_same_rows(name):
    tokenizer = tokenizer_of(name)
    texts = TEXTS
    if name == "byte fallback":  # a unigram model takes the name of a byte for the byte
        texts = [text for text in TEXTS if "<0x41>" not in text]
    rows = library_rows(tokenizer.to_json(lowercase=False), tokenizer, texts)
    np.testing.assert_array_equal(rows, tokenizer(texts))
    lowered = library_rows(tokenizer.to_json(lowercase=True), tokenizer, texts)
    np.testing.assert_array_equal(lowered, tokenizer([text.lower() for text in texts]))
    assert len(np.unique(rows)) > 300 and not np.array_equal(rows, lowered)
    content = tokenizer.to_json(lowercase=True, canonicalize=True)
    canonical = CANONICAL(texts[:300])
    np.testing.assert_array_equal(
        library_rows(content, tokenizer, texts[:300]), tokenizer(canonical)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "word"}, "neither a unigram nor a BPE"),
        ({"treat_whitespace_as_suffix": True}, "spaces behind words"),
        ({"user_defined_symbols": "<mask>"}, "user-defined symbols"),
    ],
)
def test_what_the_file_for_others_cannot_say(settings, message):
    model = corpus.sentencepiece_model(**settings)
    tokenizer = SentencePieceTokenizer(model, 64, "it")
    with pytest.raises(UserError, match=message) as caught:
        tokenizer.to_json(lowercase=False)
    assert ".model" in str(caught.value) and "\n" not in str(caught.value)


def test_a_conversion_that_differs_is_not_handed_out(monkeypatch):
    from vlp_jax.data.tokenizers import sentence_piece

    monkeypatch.setattr(sentence_piece, "_normalization", lambda file, library: [])
    with pytest.raises(UserError, match="would get other ids"):
        tokenizer_of("t5").to_json(lowercase=False)


@pytest.mark.parametrize("name", corpus.MODELS)
def test_the_file_is_read_as_the_library_reads_it(name):
    content = corpus.sentencepiece_model(**corpus.MODELS[name])
    library = sentencepiece.SentencePieceProcessor(model_proto=content)
    file = ModelFile.parse(content)
    assert len(file.pieces) == len(library)
    for number, piece in enumerate(file.pieces):
        assert piece.text == library.id_to_piece(number)
        assert piece.score == library.get_score(number)
        assert (piece.type == 3) == library.is_control(number)
        assert (piece.type == 6) == library.is_byte(number)
    settings = corpus.MODELS[name]
    assert file.byte_fallback == settings.get("byte_fallback", False)
    assert file.add_dummy_prefix == settings.get("add_dummy_prefix", True)
    assert file.normalizer == settings.get("normalization_rule_name", "nmt_nfkc")
    with pytest.raises(ValueError, match="protocol buffer"):
        ModelFile.parse(content[:-3])


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_does_not_depend_on_the_order(model_type):
    texts = list(corpus.captions(("special",))[8:300])
    first = train_sentencepiece(texts, 700, 32, model_type)
    second = train_sentencepiece(iter(texts[::-1]), 700, 32, model_type)
    assert first.model_file == second.model_file
    assert (first.pad_id, first.eos_id, first.bos_id, first.unk_id) == (0, 1, None, 2)
    assert 400 < first.vocab_size <= 700
    first.to_json(lowercase=False)  # raises if it could not be exported


def test_training_mistakes():
    for arguments, message in (
        ((["abc def"], 4, 16), "cannot make 4 tokens of 1 texts: Vocabulary size is smaller"),
        (([], 100, 16), "no text"),
        (([" ", ""], 100, 16), "no text"),
        ((["a"], 100, 16, "word"), "not 'word'"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            train_sentencepiece(*arguments)
        assert "\n" not in str(caught.value)


def test_mistakes_in_the_config(tmp_path):
    model = tmp_path / "spiece.model"
    model.write_bytes(corpus.sentencepiece_model())
    (tmp_path / "broken.model").write_bytes(model.read_bytes()[:4999])
    (tmp_path / "mute.model").write_bytes(corpus.sentencepiece_model(eos_id=-1))
    train_subword(["a b c"], 300, 16).save(tmp_path / "tokenizer.json")
    config = {"name": "sentencepiece", "context_length": 16}
    for changes, message in (
        ({}, "tokenizer.file is not set"),
        ({"file": "nowhere.model"}, "nowhere.model does not exist"),
        ({"file": tmp_path / "broken.model"}, "not a SentencePiece model"),
        ({"file": tmp_path / "mute.model"}, "has no eos"),
        ({"file": model, "vocab_size": 100}, "vocab_size=100 is less than the"),
        ({"file": model, "pad": "bos"}, "pad='bos' must be None or 'eos'"),
        ({"file": tmp_path / "tokenizer.json"}, "set config.tokenizer.name to 'subword'"),
        ({"file": model, "name": "subword"}, "set config.tokenizer.name to 'sentencepiece'"),
        ({"file": model, "name": "clip"}, "set config.tokenizer.name to 'sentencepiece'"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            build_tokenizer({**config, **changes}, list, None)
        assert "\n" not in str(caught.value)


def test_padding_with_eos(tmp_path):
    model = tmp_path / "spiece.model"
    model.write_bytes(corpus.sentencepiece_model())
    config = {"name": "sentencepiece", "context_length": 8, "file": model}
    plain, eos = (build_tokenizer({**config, "pad": pad}, list, None) for pad in (None, "eos"))
    assert plain.pad_id == 0 and eos.pad_id == eos.eos_id == 1
    row, other = plain(["red"])[0], eos(["red"])[0]
    np.testing.assert_array_equal(np.where(row == 0, 1, row), other)
    assert eos.decode(other[None]) == ["red"]


def test_the_kept_file_says_what_it_is(tmp_path):
    tokenizer_of("t5").save(tmp_path / "kept.json")
    assert json.loads((tmp_path / "kept.json").read_text())["type"] == "sentencepiece"
    with pytest.raises(UserError, match="is a SentencePiece model, not a file of CLIP's merges"):
        build_tokenizer({"name": "clip", "context_length": 9}, list, tmp_path / "kept.json")
    with pytest.raises(UserError, match="not the note of a bytes tokenizer"):
        build_tokenizer({"name": "bytes", "context_length": 9}, list, tmp_path / "kept.json")
