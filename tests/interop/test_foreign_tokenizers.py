"""Our tokenizers against those of open_clip and transformers, on a thousand captions."""

import html
import unicodedata

import corpus
import ftfy
import numpy as np
import open_clip
import pytest
import transformers

from vlp_jax.data.tokenizers import SentencePieceTokenizer, build_tokenizer
from vlp_jax.data.tokenizers.clip import clean
from vlp_jax.data.tokenizers.sentencepiece_file import NORMAL, ModelFile

TEXTS = list(corpus.captions())


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
    from vlp_jax.interop.hf_tokenizer import TokenizerFiles

    ids = {"bos_id": clip.bos_id, "eos_id": clip.eos_id, "pad_id": clip.pad_id}
    files = TokenizerFiles.made(clip.to_json(lowercase=False), context_length=77, **ids)
    files.write(tmp_path, ["input_ids", "attention_mask"])
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
