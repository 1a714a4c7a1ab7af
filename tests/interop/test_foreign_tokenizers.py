"""Our tokenizers against those of open_clip and transformers, on a thousand captions."""

import html
import unicodedata

import corpus
import ftfy
import numpy as np
import open_clip
import pytest
import transformers

from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.data.tokenizers import SentencePieceTokenizer, build_tokenizer
from vlp_jax.data.tokenizers.clip import clean
from vlp_jax.data.tokenizers.sentence_piece import NORMAL, ModelFile
from vlp_jax.encoders.foreign_texts import tokenizer_of_files
from vlp_jax.models.text import TextTransformer
from vlp_jax.models.values import TransformerConfig

TEXTS = list(corpus.captions())


# What people paste into captions, each once.
ODD = [
    *(
        "\U0001f600",
        "a \U0001f469\u200d\U0001f469\u200d\U0001f467 family",
        "\U0001f1e9\U0001f1ea flag",
    ),
    *(
        "\U0001f44d\U0001f3fd",
        "\u2764\ufe0f love",
        "\u2708\ufe0e",
        "1\ufe0f\u20e3 keycap",
        "\u00a9\u00ae\u2122",
    ),
    *(
        "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
        "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643",
        "\u202eabc\u202c",
        "\u200fabc\u200e",
    ),
    *(
        "e\u0301 a\u0308 n\u0303",
        "\u00e9 \u00e4 \u00f1",
        "Z\u0351\u036b\u0343a\u0314l\u0313g\u0312o",
        "\u1e9b\u0323",
        "\u212b \u00c5",
    ),
    *(
        "&lt;b&gt;bold&lt;/b&gt;",
        "&amp;",
        "&amp;amp;lt;",
        "&amp;quot;x&amp;quot;",
        "&nbsp;x",
        "&#39;s",
    ),
    *("&#x1F600;", "&eacute;t&eacute;", "AT&T", "a &notanentity; b", "&#0;", "&;"),
    *("\x00a", "a\x07b", "a\x1bb", "\x7f", "a\x85b", "\ufeffbom", "\ufffd", "a\u00adb", "a\u200bb"),
    *(
        "a\u00a0b",
        "\u3000wide\u3000space",
        "a\u2028b\u2029c",
        "\t tab \n line \r\n",
        "  two  spaces  ",
    ),
    *(
        "word " * 200,
        "x" * 3000,
        "!" * 100,
        "...",
        "?!?!",
        "-- \u2014 \u2013",
        "(((",
        "_under_score_",
    ),
    *("<|endoftext|>", "<|startoftext|> a <|endoftext|>", "</s><s>", "[CLS] [SEP]", "<unk><pad>"),
    *(
        "don't can't I'm they've we'll he'd it's",
        "DON'T IT'S",
        "don\u2019t it\u2018s",
        "'tis 'twas",
        "o''o",
    ),
    *("0123456789", "3.14 1,000,000 50%", "\u0661\u0662\u0663", "\u00bd \u00b2 \u2163", "1st 2ND"),
    *(
        "\uff26\uff35\uff2c\uff2c\uff01",
        "\uff71\uff72\uff73",
        "\ufb01ne \ufb02ow",
        "\u0130stanbul I\u0131",
        "\u1e9e\u00df",
    ),
    *(
        "\u039f\u0394\u039f\u03a3 \u03a3",
        "\u01c5 \u01c6",
        "caf\u00c3\u00a9",
        "\u00e2\u20ac\u2122s",
        "\u65e5\u672c\u8a9e\u306e\u6587",
    ),
    *(
        "\ud55c\uad6d\uc5b4",
        "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
        "\u0928\u092e\u0938\u094d\u0924\u0947",
        "a\ud800b",
        "\udc00",
        "",
        " ",
    ),
    *(
        "http://a.b/c?d=e&f=g#h",
        "user@example.com #tag @name",
        "C:\\path\\file.txt",
        '{"a": [1, 2]}',
        "a/b\\c|d",
    ),
]


@pytest.fixture(scope="module")
def odd_rows(clip):
    """(open_clip's rows, ours, those of a run's input, those of a folder that is loaded)."""
    readable = [text.encode("utf-8", "replace").decode() for text in ODD]  # no lone surrogates
    data = {"source": "arrays", "arrays": {"text": [text.encode() for text in readable]}}
    batches = EvalPipeline({**data, "preprocess": {}}, clip, batch_size=len(ODD)).batches()
    tower = TextTransformer(49408, 77, TransformerConfig(8, 1, 8, 1))
    files = tokenizer_of_files(None, tower, None, "x", [])
    theirs = open_clip.SimpleTokenizer()(readable).numpy()
    return theirs, clip(ODD), next(iter(batches))["text"], files(ODD)


@pytest.mark.parametrize("number", range(len(ODD)), ids=lambda i: ascii(ODD[i][:20]))
def test_odd_texts_are_open_clips(number, odd_rows):
    assert len(ODD) == len(set(ODD)) > 65
    theirs, *rows = odd_rows
    for ours in rows:
        np.testing.assert_array_equal(ours[number], theirs[number])


@pytest.fixture(scope="module")
def clip():
    return build_tokenizer({"name": "clip", "context_length": 77}, list, None)


def test_clip_is_open_clips(clip):
    theirs = open_clip.get_tokenizer("ViT-B-32")
    assert theirs.vocab_size == clip.vocab_size == 49408
    assert len(TEXTS) >= 1000
    np.testing.assert_array_equal(clip(TEXTS), theirs(TEXTS).numpy())
    long = [text for text in TEXTS if len(clip.encode([text])[0]) > 75]
    assert len(long) > 10 and (clip(long)[:, -1] == clip.eos_id).all()


def test_every_character_is_open_clips(clip):
    """Each in a word, alone and before a number; every 31st, to keep this short.

    Letters that are newer than one side's tables of Unicode would differ.
    """
    named = [n for n in range(1, 0x30000, 31) if unicodedata.category(chr(n)) not in ("Cn", "Cs")]
    texts = [f"a{chr(n)}b {chr(n)} {chr(n)}1'\u017f" for n in [*named, 0x130, 0x345, 0x3A3]]
    theirs = open_clip.get_tokenizer("ViT-B-32")
    for text, ours in zip(texts, clip.encode(texts), strict=True):
        assert ours == theirs.encode(text), ascii(text)


def test_clip_is_transformers(clip, tmp_path):
    """On text that was cleaned before: transformers cleans less.

    Its class of version 5, and its fast one before that, never call ftfy nor resolve entities, and
    lower-case without a final sigma; it has no long s in "'s", and does not drop U+0345.
    """
    merges = [tuple(merge.split()) for merge in clip._merges]
    theirs = transformers.CLIPTokenizer(vocab=dict(clip._vocab), merges=merges)
    texts = [clean(text) for text in TEXTS]
    texts = [text for text in texts if clean(text) == text and "\u0345" not in text]
    texts = [text for text in texts if "<|endoftext|>" not in text]  # the token, there
    assert len(texts) > 900
    assert theirs(texts, add_special_tokens=False)["input_ids"] == clip.encode(texts)
    rows = theirs(texts, padding="max_length", truncation=True, max_length=77)
    ids, mask = np.array(rows["input_ids"]), np.array(rows["attention_mask"])
    np.testing.assert_array_equal(np.where(mask, ids, 0), clip(texts))  # it pads with eos


def test_a_clip_run_in_open_clip_and_transformers(clip, tmp_path):
    """What is exported: open_clip cleans before it, so nothing is left out there."""
    from vlp_jax.interop import hf_tokenizer

    ids = {"bos_id": clip.bos_id, "eos_id": clip.eos_id, "pad_id": clip.pad_id}
    made = hf_tokenizer.TokenizerFiles.from_json(
        clip.to_json(lowercase=False), context_length=77, **ids
    )
    hf_tokenizer.write(made, tmp_path, ["input_ids", "attention_mask"])
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=77)
    np.testing.assert_array_equal(theirs(TEXTS).numpy(), clip(TEXTS))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [html.unescape(html.unescape(ftfy.fix_text(text))) for text in TEXTS]
    rows = auto(texts, padding="max_length", truncation=True)
    np.testing.assert_array_equal(np.array(rows["input_ids"]), clip(TEXTS))


def pieces_of(model):
    return [(piece.text, piece.score) for piece in ModelFile.parse(model).pieces]


def test_sentencepiece_is_transformers_t5():
    """On composed text, without names of special tokens.

    transformers normalizes grapheme by grapheme, without NFC before, so that it does not compose
    Hangul and kana as SentencePiece does; it takes "</s>" in a text for the token, and U+0085,
    which SentencePiece leaves alone, for white space.
    """
    model = corpus.sentencepiece_model()
    theirs = transformers.T5Tokenizer(
        vocab=pieces_of(model),
        _spm_precompiled_charsmap=ModelFile.parse(model).charsmap,
        extra_ids=0,
    )
    ours = SentencePieceTokenizer(model, 64, "t5")
    texts = [text for text in corpus.captions(("special", "marks")) if "\u0085" not in text]
    assert len(texts) > 900
    rows = theirs(texts, padding="max_length", truncation=True, max_length=64)["input_ids"]
    np.testing.assert_array_equal(np.array(rows), ours(texts))


def test_sentencepiece_is_transformers_llama():
    model = corpus.sentencepiece_model(**corpus.LLAMA)
    ours = SentencePieceTokenizer(model, 64, "llama")
    vocab = {text: number for number, (text, _) in enumerate(pieces_of(model))}
    normal = [piece for piece in ModelFile.parse(model).pieces if piece.type == NORMAL]
    merges = [
        (piece.text[:place], piece.text[place:])
        for piece in sorted(normal, key=lambda piece: -piece.score)
        for place in range(1, len(piece.text))
        if piece.text[:place] in vocab and piece.text[place:] in vocab
    ]
    theirs = transformers.LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=False)
    # It splits at the names of special tokens, and adds no space to a text that is one.
    texts = [text for text in corpus.captions(("special",)) if text != " "]
    assert len(texts) > 900
    assert theirs(texts, add_special_tokens=False)["input_ids"] == ours.encode(texts)


def test_sentencepiece_with_eos_for_padding_is_transformers_siglip(tmp_path):
    """With texts canonicalized by the operation of that name, as SigLIP's own are.

    transformers keeps an older form of it: an underscore is removed, not made a space, and capital
    sigmas become small ones before punctuation goes, not after. Its NUL stays.
    """
    import tensorflow as tf

    from vlp_jax.data.text_ops import canonicalize_text

    file = tmp_path / "spiece.model"
    file.write_bytes(corpus.sentencepiece_model())
    theirs = transformers.SiglipTokenizer(str(file))
    config = {"name": "sentencepiece", "file": str(file), "context_length": 64, "pad": "eos"}
    ours = build_tokenizer(config, list, None)
    op = canonicalize_text()
    texts = corpus.captions(("special",))
    texts = [text for text in texts if not any(sign in text for sign in "_\u03a3\x00")]
    assert len(texts) > 800
    canonical = [op({"text": tf.constant(text)}, None)["text"].numpy() for text in texts]
    rows = theirs(texts, padding="max_length", truncation=True, max_length=64)["input_ids"]
    np.testing.assert_array_equal(np.array(rows), ours(canonical))
