"""How a run words texts that are not its data's: prompts, queries, exported tokenizers."""

import string

import numpy as np
import pytest

from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.data.tokenizers import build_tokenizer
from vlp_jax.data.wording import Wording, wording_of
from vlp_jax.errors import UserError

TEXTS = (
    *("A Red Card", "two_words", "it's, well... DONE!", "  white \t space\n", "ΟΔΟΣ Σ", "İstanbul"),
    *("x\u00a0y\u2003z", "C3-PO & R2_D2", "“quotes” ß", "emoji 🌊 NO"),
    *("ÉCOLE", "a" * 300, "&amp;amp; caf\u00c3\u00a9", "НЕТ, да"),
)
# Nothing is left of these without punctuation, and an empty text is no example.
EMPTIED = (string.punctuation, "_")
PREPROCESS = (
    {"lowercase": {}},
    {"canonicalize_text": {}},
    {"clean_text": {}, "lowercase": {}},
    {"truncate_text": {"max_words": 2}, "lowercase": {}},
    # As a sequence operations run in the order given: the underscore is cut off before it goes.
    (("truncate_text", {"max_chars": 4}), ("canonicalize_text", {})),
    (("lowercase", {}), ("clean_text", {"unescape_html": False})),
)


def folder(tmp_path, texts):
    """Data whose captions are the texts."""
    captions = np.array([t.encode() for t in texts], object)
    image = np.zeros((len(texts), 2, 2, 3), np.uint8)
    return {"source": "arrays", "arrays": {"image": image, "text": captions}}


@pytest.mark.parametrize("preprocess", PREPROCESS, ids=str)
def test_a_prompt_is_worded_as_the_same_text_in_the_data(preprocess, tmp_path):
    data = {**folder(tmp_path, TEXTS), "preprocess": preprocess}
    batches = EvalPipeline(data, None, batch_size=4, extra_fields=("text_raw",)).batches()
    expected = [text for b in batches for text in b["text_raw"][b["mask"]]]
    wording, notes = wording_of(data)
    assert wording(TEXTS) == expected and not notes
    assert wording([t.encode() for t in TEXTS]) == expected


def test_what_is_random_or_makes_a_prompt_is_left_out():
    wording, _ = wording_of(
        {
            "source": "folder",
            "preprocess": {
                "choose_text": {},
                "prompt_template": {"templates": ["a photo of {}"]},
                "lowercase": {},
                "truncate_text": {"max_words": 3, "where": "random"},
                "decode_image": {},
            },
        }
    )
    assert wording.names == ("lowercase",) and str(wording) == "lowercase"
    assert wording(["One Two Three Four"]) == [b"one two three four"]
    assert str(Wording()) == "none" and Wording()(["A", "\ud800"]) == [b"A", b"?"]


def mixture(**parts):
    return {
        "source": "mixture",
        "parts": {
            name: {"source": "folder", "weight": weight, "preprocess": preprocess}
            for name, (weight, preprocess) in parts.items()
        },
    }


def test_the_parts_of_a_mixture_word_texts_alike_or_it_is_said():
    lower = {"lowercase": {}}
    same, notes = wording_of(mixture(a=(1, lower), b=(3, {**lower, "choose_text": {}})))
    assert same.names == ("lowercase",) and not notes
    other, (note,) = wording_of(mixture(cards=(1, lower), web=(3, {"canonicalize_text": {}})))
    assert other.names == ("canonicalize_text",)
    assert "cards: lowercase" in note and "web: canonicalize_text" in note and "'web'" in note
    # Arguments make a difference too.
    clean = {"clean_text": {"strip_urls": True}}
    _, (note,) = wording_of(mixture(a=(1, {"clean_text": {}}), b=(1, clean)))
    assert "clean_text(strip_urls=True)" in note


def test_an_unknown_operation_is_named():
    with pytest.raises(UserError, match="lowercase"):
        wording_of({"source": "folder", "preprocess": {"lower_case": {}}})


def test_the_exported_tokenizer_canonicalizes_as_the_run():
    import tokenizers

    ours = build_tokenizer({"name": "bytes", "context_length": 400}, lambda: (), None)
    theirs = tokenizers.Tokenizer.from_str(ours.to_json(False, canonicalize=True))
    worded = Wording((("canonicalize_text", {}),))((*TEXTS, *EMPTIED))
    rows = ours(worded)
    for text, row in zip((*TEXTS, *EMPTIED), rows):
        ids = theirs.encode(text).ids
        assert ids == [i for i in row.tolist() if i != ours.pad_id], text
