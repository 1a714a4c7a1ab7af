"""The operation `tokenize`: several fields, framing, bad examples, and what tokenizers train on."""

import itertools

import numpy as np
import pytest

from vlp_jax.data.pipeline import EvalPipeline, TrainPipeline
from vlp_jax.data.samples import sample_texts
from vlp_jax.data.tokenizers import ByteTokenizer, train_subword
from vlp_jax.data.tokenizing import Framing
from vlp_jax.errors import UserError

LENGTH = 16
TOKENIZER = ByteTokenizer(LENGTH)
PREFIXES = [f"what is {n}?" for n in range(24)]
SUFFIXES = [f"answer {n}" for n in range(24)]


def source(prefixes=PREFIXES, suffixes=SUFFIXES, **more):
    arrays = {"prefix": prefixes, "suffix": suffixes, **more}
    arrays = {k: np.array([t.encode() for t in v], object) for k, v in arrays.items()}
    arrays["number"] = np.arange(len(prefixes))
    return {"source": "arrays", "arrays": arrays}


def batches_of(preprocess, data=None, tokenizer=TOKENIZER, **keys):
    config = {**(data or source()), "preprocess": preprocess, "max_bad_fraction": 1.0}
    pipeline = EvalPipeline(config, tokenizer, batch_size=8, **keys)
    found = list(pipeline.batches())
    spec = pipeline.batch_spec()
    for batch in found:
        assert {k: (batch[k].shape, batch[k].dtype) for k in spec} == spec
    return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}, pipeline


def expected(texts, length, bos=True, eos=True, left=False):
    """Plain Python's rows of ids of a byte tokenizer."""
    rows = []
    for text in texts:
        room = length - bos - eos
        ids = [2] * bos + [byte + 3 for byte in text.encode()[:room]] + [1] * eos
        pad = [0] * (length - len(ids))
        rows.append(pad + ids if left else ids + pad)
    return np.array(rows, np.int32)


BOTH = [
    ("tokenize", {"field": "prefix", "length": 20, "eos": False, "padding": "left"}),
    ("tokenize", {"field": "suffix", "into": "target", "length": 10, "bos": False}),
]


def test_prefix_and_suffix_are_fields_of_their_own():
    batch, _ = batches_of(BOTH)
    np.testing.assert_array_equal(batch["prefix"], expected(PREFIXES, 20, eos=False, left=True))
    np.testing.assert_array_equal(batch["target"], expected(SUFFIXES, 10, bos=False))
    assert set(batch) == {"prefix", "target", "number", "mask"}


def test_a_mapping_repeats_an_operation_by_its_number():
    mapping = {"tokenize#2": BOTH[1][1], "tokenize": BOTH[0][1]}
    first, second = batches_of(BOTH)[0], batches_of(mapping)[0]
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("arguments", [{}, {"field": "text"}, {"into": "text"}])
def test_the_default_is_what_becomes_of_text_without_it(arguments):
    pairs = [("prompt_template", {"templates": "{prefix} {suffix}"})]
    plain, _ = batches_of(pairs, extra_fields=["text_raw"])
    named, _ = batches_of([*pairs, ("tokenize", arguments)], extra_fields=["text_raw"])
    assert list(plain) == list(named)
    for name in plain:
        np.testing.assert_array_equal(plain[name], named[name])
    assert plain["text_raw"][3] == b"what is 3? answer 3"


def test_one_text_after_the_other_in_the_order_of_the_list():
    pairs = [
        ("choose_text", {"field": "prefix"}),
        ("prompt_template", {"templates": "Q: {}", "index": 0}),
        ("tokenize", {"into": "question"}),
        ("choose_text", {"field": "suffix"}),
        ("tokenize", {"into": "answer"}),
        ("keep", {"fields": ("question", "answer")}),
    ]
    batch, _ = batches_of(pairs)
    questions = [f"Q: {text}" for text in PREFIXES]
    np.testing.assert_array_equal(batch["question"], expected(questions, LENGTH))
    np.testing.assert_array_equal(batch["answer"], expected(SUFFIXES, LENGTH))
    assert set(batch) == {"question", "answer", "mask"}


def test_framing_of_a_trained_tokenizer():
    tokenizer = train_subword([*PREFIXES, *SUFFIXES], 300, LENGTH)
    whole = tokenizer.encode(PREFIXES)
    for bos, eos, left in itertools.product((None, True, False), (True, False), (True, False)):
        framing = Framing(30, bos, eos, "left" if left else "right")
        for row, ids in zip(framing.rows(tokenizer, PREFIXES), whole, strict=True):
            body = [tokenizer.bos_id] * (bos is not False) + ids + [tokenizer.eos_id] * eos
            pad = [tokenizer.pad_id] * (30 - len(body))
            assert row.tolist() == (pad + body if left else body + pad)
    np.testing.assert_array_equal(Framing().rows(tokenizer, PREFIXES), tokenizer(PREFIXES))
    cut = Framing(5).rows(tokenizer, PREFIXES)
    assert cut.shape == (24, 5) and (cut[:, -1] == tokenizer.eos_id).all()


@pytest.mark.parametrize("field", ["prefix", "suffix"])
def test_an_empty_text_of_any_field_is_a_bad_example(field):
    texts = {"prefixes": list(PREFIXES), "suffixes": list(SUFFIXES)}
    texts["prefixes" if field == "prefix" else "suffixes"][5] = " \n"
    batch, pipeline = batches_of(BOTH, source(**texts))
    assert np.flatnonzero(~batch["mask"]).tolist() == [5]
    totals = pipeline.faults.totals()["bad"]
    assert totals == {"data": {"empty caption": 1}}


def test_bytes_that_are_no_text_are_a_bad_example_in_any_field():
    data = source()
    data["arrays"]["suffix"][7] = b"\xff\xfe\xfa"
    batch, pipeline = batches_of(BOTH, data)
    assert np.flatnonzero(~batch["mask"]).tolist() == [7]
    assert pipeline.faults.totals()["bad"] == {"data": {"malformed text": 1}}


def test_each_field_is_one_call_for_a_chunk(monkeypatch):
    calls = []
    encode = ByteTokenizer.encode

    def counted(self, texts):
        calls.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(ByteTokenizer, "encode", counted)
    batches_of(BOTH)
    assert calls == [24, 24]


def test_training_and_processes_give_the_same_rows():
    config = {**source(), "preprocess": BOTH}

    def take(**keys):
        pipeline = TrainPipeline(config, TOKENIZER, batch_size=8, seed=1, **keys)
        return list(itertools.islice(pipeline.batches(), 4))

    whole = take()
    parts = [take(process_index=index, process_count=2) for index in (0, 1)]
    for number, batch in enumerate(whole):
        halves = [part[number] for part in parts]
        for name in batch:
            both = np.concatenate([half[name] for half in halves])
            assert sorted(map(bytes, both)) == sorted(map(bytes, batch[name]))
        np.testing.assert_array_equal(
            batch["target"], expected([SUFFIXES[n] for n in batch["number"]], 10, bos=False)
        )


def test_without_a_tokenizer_the_texts_are_left_out():
    batch, _ = batches_of(BOTH, tokenizer=None)
    assert set(batch) == {"number", "mask"}


def test_a_tokenizer_is_trained_on_all_fields():
    texts = list(sample_texts({**source(), "preprocess": BOTH}, limit=1000))
    assert set(texts) == {*PREFIXES, *SUFFIXES}
    assert len(list(sample_texts({**source(), "preprocess": BOTH}, limit=10))) == 10


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ([("tokenize", {"field": "sufix"})], "did you mean 'suffix'"),
        ([("tokenize", {"field": "number"})], "'number' is no string"),
        ([("tokenize", {"field": "prefix", "length": 2})], "no room for a token beside 2"),
        ([("tokenize", {"field": "prefix", "length": 0})], "number from 1, got 0"),
        ([("tokenize", {"field": "prefix", "padding": "both"})], "'right' or 'left'"),
        ([("tokenize", {"field": "prefix", "eos": None})], "eos True or False"),
        ([("tokenize", {"field": "prefix", "into": 3})], "names of fields"),
        ([("tokenize", {"field": "prefix"})] * 2, "'prefix' is tokenized already"),
        (
            [("choose_text", {"field": "prefix"}), ("tokenize", {}), ("lowercase", {})],
            "put lowercase before tokenize",
        ),
        ([("tokenize", {"field": "prefix"}), ("resize", {"size": 4, "field": "prefix"})], "uint8"),
    ],
)
def test_mistakes_are_one_line(preprocess, message):
    with pytest.raises(UserError, match=message) as caught:
        batches_of(preprocess)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_bos_refuses_one():
    class NoBos(ByteTokenizer):
        bos_id = None

    with pytest.raises(UserError, match="'prefix' is to begin with bos"):
        batches_of([("tokenize", {"field": "prefix", "bos": True})], tokenizer=NoBos(LENGTH))
