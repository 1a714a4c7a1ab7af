"""The ids that the libraries of others make with the tokenizer in a model's folder."""

import functools
import json
import shutil

import corpus
import numpy as np
import open_clip
import pytest
import runs
import transformers
from foreign import clip, random_params

import vlp_jax
from vlp_jax import interop
from vlp_jax.data.tokenizers import ClipTokenizer, train_subword
from vlp_jax.data.tokenizers.sentence_piece import ModelFile
from vlp_jax.encoders.foreign_texts import tokenizer_of_files
from vlp_jax.errors import UserError
from vlp_jax.interop.hf_tokenizer import CONFIG, TOKENIZER, TokenizerFiles
from vlp_jax.models.text import TextTransformer
from vlp_jax.models.values import TransformerConfig

CONTEXT = 12
TEXTS = (
    *("a red card number 3", "x", "A Red  CARD, number_3!", " lead", "trail ", "don't stop."),
    *(
        "\u00e9 \u00c9COLE \u00df \u039f\u0394\u039f\u03a3",
        "cafe\u0301",
        "\u65e5\u672c\u8a9e \u30c6",
    ),
    *("a </s> b", "<eos> x <pad>", "<|endoftext|> hi", "[SEP] a [CLS]", "<unk>", "\u2581 x"),
    *("a " * 40, "\uff26\uff35\uff2c\uff2c", "tab\tnew\nline", "...", "caf&eacute; &amp;amp; co"),
)
KINDS = {"clip": "CLIPTokenizer", "siglip": "SiglipTokenizer"}


def folder_of(files, folder, model_type="clip"):
    """A folder of a tokenizer's files, beside the config of a model."""
    folder.mkdir()
    for name, content in {**files, "config.json": {"model_type": model_type}}.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def ours_of(folder, model_type="clip", vocab=10**6):
    """(ids, notes) of the folder, as `vlp_jax.load` makes them."""
    notes, files = [], TokenizerFiles.from_folder(folder, kind=KINDS[model_type])
    tower = TextTransformer(vocab, CONTEXT, TransformerConfig(8, 1, 8, 1))
    tokenizer = tokenizer_of_files(files, tower, 0, str(folder), notes)
    assert tokenizer.lengths(["x"])[0] >= 1
    return tokenizer(TEXTS), notes


def theirs_of(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=CONTEXT)
    return np.array(rows["input_ids"])


@functools.cache
def subword():
    tokenizer = train_subword(runs.CAPTIONS, 280, CONTEXT)
    ids = dict(bos_id=2, eos_id=1, pad_id=0)
    made = TokenizerFiles.from_json(tokenizer.to_json(False), context_length=CONTEXT, **ids)
    return json.loads(made.contents[TOKENIZER]), json.loads(made.contents[CONFIG])


SIDES = ("padding_side", "truncation_side", "pad_token")
CUT = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Left"}
PAD = {
    **{"strategy": {"Fixed": 5}, "direction": "Left", "pad_to_multiple_of": None},
    **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
}
PLAIN = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False}


@pytest.mark.parametrize(
    ("config", "content", "note"),
    [
        ({}, {}, None),
        ({"padding_side": "left"}, {}, None),
        ({"truncation_side": "left"}, {}, None),
        ({"padding_side": "left", "truncation_side": "left"}, {}, None),
        ({"pad_token": "<bos>"}, {}, None),
        ({"pad_token": {"content": "<eos>", **PLAIN, "__type": "AddedToken"}}, {}, None),
        ({"split_special_tokens": False}, {}, None),
        (dict.fromkeys(SIDES), {"truncation": CUT, "padding": PAD}, None),
        ({"truncation_side": "right"}, {"truncation": CUT}, None),
        (
            {"added_tokens_decoder": {"280": {"content": "circle", "special": False, **PLAIN}}},
            {},
            None,
        ),
        ({"model_max_length": 8}, {}, "model_max_length 8"),
        ({"do_lower_case": True}, {}, "do_lower_case is set, which PreTrainedTokenizer of"),
        ({"add_bos_token": False}, {}, "add_bos_token is False"),
        ({"tokenizer_class": "GPT2Tokenizer"}, {}, "class GPT2Tokenizer, which is not known here"),
    ],
    ids=str,
)
def test_settings_beside_a_tokenizer_json(config, content, note, tmp_path):
    tokenizer, settings = subword()
    settings = {name: x for name, x in {**settings, **config}.items() if x is not None}
    folder = folder_of({TOKENIZER: {**tokenizer, **content}, CONFIG: settings}, tmp_path / "a")
    ids, notes = ours_of(folder)
    np.testing.assert_array_equal(ids, theirs_of(folder))
    assert (notes == []) if note is None else (len(notes) == 1 and note in notes[0])


def test_special_tokens_of_old_folders(tmp_path):
    tokenizer, settings = subword()
    files = {TOKENIZER: tokenizer, CONFIG: settings, "added_tokens.json": {"circle": 280}}
    files["special_tokens_map.json"] = {"pad_token": "<bos>"}
    folder = folder_of(files, tmp_path / "a")
    ids, notes = ours_of(folder)
    np.testing.assert_array_equal(ids, theirs_of(folder))
    assert notes == [] and ids[1, -1] == 2


@functools.cache
def small_clip():
    """CLIP's tokenizer with the first of its merges alone."""
    return ClipTokenizer(ClipTokenizer.published(CONTEXT)._merges[:500], CONTEXT, "the merges")


@functools.cache
def saved(name):
    """Files of a tokenizer of theirs, without its config, and that."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "card", "##s", "x", "3"]
    words += ["caf", "##e", ",", "!", "don", "'", "t", "."]
    if name == "BertTokenizer":
        made = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    elif name == "CLIPTokenizer":
        own = small_clip()
        merges = [tuple(merge.split()) for merge in own._merges]
        made = transformers.CLIPTokenizer(vocab=dict(own._vocab), merges=merges)
    elif name == "T5Tokenizer":
        model = ModelFile.parse(corpus.sentencepiece_model())
        pieces = [(piece.text, piece.score) for piece in model.pieces]
        made = transformers.T5Tokenizer(
            vocab=pieces, _spm_precompiled_charsmap=model.charsmap, extra_ids=0
        )
    else:
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
        tokens = (
            special + [f"<0x{i:02X}>" for i in range(256)] + list("acdeR\u2581") + ["re", "red"]
        )
        merges = [("r", "e"), ("re", "d")]
        vocab = {token: i for i, token in enumerate([*tokens, "r"])}
        made = getattr(transformers, name)(vocab=vocab, merges=merges)
    return made


def files_of(name, tmp_path):
    saved(name).save_pretrained(tmp_path / "saved")
    files = {x.name: x.read_bytes() for x in (tmp_path / "saved").iterdir()}
    return files, json.loads(files.pop(CONFIG))


@pytest.mark.parametrize(
    ("name", "config", "note"),
    [
        ("CLIPTokenizer", {}, None),
        ("CLIPTokenizer", {"padding_side": "left"}, None),
        ("CLIPTokenizer", {"tokenizer_class": None}, None),  # the model type says it
        ("BertTokenizer", {}, None),
        ("BertTokenizer", {"do_lower_case": False}, "normalizes texts in another way"),
        ("T5Tokenizer", {}, None),
        ("GemmaTokenizer", {}, None),
        ("GemmaTokenizer", {"padding_side": None}, None),  # left, by its class
        ("GemmaTokenizer", {"padding_side": "right", "do_lower_case": True}, "does not heed"),
        ("GemmaTokenizer", {"tokenizer_class": "Siglip2Tokenizer"}, "class Siglip2Tokenizer of"),
        ("Siglip2Tokenizer", {}, None),
        ("Siglip2Tokenizer", {"tokenizer_class": "PreTrainedTokenizerFast"}, None),
    ],
    ids=str,
)
def test_classes_that_do_not_take_a_tokenizer_json_as_it_is(name, config, note, tmp_path):
    files, settings = files_of(name, tmp_path)
    settings = {key: x for key, x in {**settings, **config}.items() if x is not None}
    folder = folder_of({**files, CONFIG: settings}, tmp_path / "a")
    ids, notes = ours_of(folder)
    np.testing.assert_array_equal(ids, theirs_of(folder))
    assert (notes == []) if note is None else (len(notes) == 1 and note in notes[0])


def test_a_class_that_lowercases_where_its_file_does_not(tmp_path):
    files, settings = files_of("CLIPTokenizer", tmp_path)
    content = json.loads(files[TOKENIZER])
    content["normalizer"] = {"type": "NFC"}
    folder = folder_of({TOKENIZER: content, CONFIG: settings}, tmp_path / "a")
    ids, notes = ours_of(folder)
    np.testing.assert_array_equal(ids, theirs_of(folder))
    assert len(notes) == 1 and "CLIPTokenizer of transformers 5, which is followed" in notes[0]


def test_vocabularies_without_a_tokenizer_json(tmp_path):
    own = small_clip()
    merges = "\n".join(["#version: 0.2", *own._merges, ""])
    old = {"vocab.json": own._vocab, "merges.txt": merges}
    words = {"vocab.txt": "\n".join([*saved("BertTokenizer").get_vocab(), ""])}
    words |= {CONFIG: {"tokenizer_class": "BertTokenizer", "do_lower_case": False}}
    for number, files in enumerate((old, words)):
        folder = folder_of(files, tmp_path / str(number))
        ids, notes = ours_of(folder)
        np.testing.assert_array_equal(ids, theirs_of(folder))
        assert notes == []


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_lower_case": False},
        {"padding_side": "left", "truncation_side": "left"},
        {"pad_token": "<unk>"},
        {"split_special_tokens": True},
        None,
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["t5", "llama"])
def test_siglips_own_tokenizer_reads_spiece_model(model, config, tmp_path):
    """Also where a tokenizer.json lies beside it, which that class does not read."""
    files = {"spiece.model": corpus.sentencepiece_model(**corpus.MODELS[model])}
    if config is not None:
        files[CONFIG] = {"tokenizer_class": "SiglipTokenizer", "model_max_length": 64, **config}
    folder = folder_of(files, tmp_path / "a", "siglip")
    ids, notes = ours_of(folder, "siglip")
    np.testing.assert_array_equal(ids, theirs_of(folder))
    assert notes == []
    if model == "t5" and config == {}:
        other, _ = files_of("T5Tokenizer", tmp_path)
        (folder / TOKENIZER).write_bytes(other[TOKENIZER])
        np.testing.assert_array_equal(ours_of(folder, "siglip")[0], theirs_of(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {TOKENIZER: None, "tokenizer.model": "x"},
            "no tokenizer.json: make one with transformers",
        ),
        ({TOKENIZER: "{"}, "tokenizer.json is not JSON"),
        ({TOKENIZER: {"a": 1}}, "tokenizer.json has no model"),
        ({CONFIG: "[]"}, "tokenizer_config.json is not a mapping"),
        ({"special_tokens_map.json": {"pad_token": "[NEW]"}}, r"padding '\[NEW\]' is none of the"),
    ],
    ids=str,
)
def test_tokenizers_that_cannot_be_read(change, message, tmp_path):
    tokenizer, settings = subword()
    files = {TOKENIZER: tokenizer, CONFIG: settings, **change}
    files = {name: content for name, content in files.items() if content is not None}
    folder = folder_of(files, tmp_path / "a")
    with pytest.raises(UserError, match=message) as error:
        ours_of(folder, vocab=280)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_padding_takes_the_models(tmp_path):
    tokenizer, settings = subword()
    settings = {name: x for name, x in settings.items() if name != "pad_token"}
    folder = folder_of({TOKENIZER: tokenizer, CONFIG: settings}, tmp_path / "a")
    ids, notes = ours_of(folder)
    assert ids[1, -1] == 0 and any("names no token for padding: id 0" in note for note in notes)


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    module = clip(dict(activation="gelu"), dict(vocab=49408, length=CONTEXT, eos_id=49407))
    interop.write("open_clip", module, random_params(module), folder)
    return folder


@pytest.mark.parametrize("bert", [False, True])
@pytest.mark.parametrize(
    "said",
    [
        {},
        *({"tokenizer_kwargs": {"clean": x}} for x in ("lower", "whitespace", "canonicalize")),
        {"tokenizer_kwargs": {"strip_sep_token": True}},
        {"hf_tokenizer_name": ""},
    ],
    ids=str,
)
def test_what_open_clip_does_before_and_after_a_tokenizer(bert, said, open_clip_folder, tmp_path):
    folder = shutil.copytree(open_clip_folder, tmp_path / "a")
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    if bert:
        saved("BertTokenizer").save_pretrained(folder)
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "bert"
    elif "strip_sep_token" in str(said):
        return  # its own tokenizer does not take that
    config["model_cfg"]["text_cfg"] |= said
    file.write_text(json.dumps(config))
    model = vlp_jax.load(f"open_clip:{folder}")
    theirs = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS).numpy()
    np.testing.assert_array_equal(model.texts.ids(TEXTS), theirs)
    assert model.notes == ()
    # And it is written again.
    imported = interop.read(f"open_clip:{folder}")
    files = imported.extras["tokenizer"]
    interop.write("open_clip", imported.module, imported.params, tmp_path / "b", tokenizer=files)
    again = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'b'}")(TEXTS).numpy()
    np.testing.assert_array_equal(again, theirs)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"tokenizer_kwargs": {"clean": "lowr"}}, "did you mean 'lower'"),
        ({"tokenizer_mode": "clips", "hf_tokenizer_name": "b"}, "tokenizer_mode 'clips' frames"),
    ],
)
def test_open_clips_settings_that_cannot_be_done(said, message, open_clip_folder, tmp_path):
    folder = shutil.copytree(open_clip_folder, tmp_path / "a")
    saved("BertTokenizer").save_pretrained(folder)
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"] |= said
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        vlp_jax.load(f"open_clip:{folder}")
