"""Questions of an example: which is chosen, and with what answer."""

import collections

import numpy as np
import pytest
import tensorflow as tf

from vlp_jax.data.ops import apply_ops, build_ops
from vlp_jax.data.pipeline import EvalPipeline, TrainPipeline
from vlp_jax.data.samples import sample_texts
from vlp_jax.data.shapes import vocabulary
from vlp_jax.errors import UserError

QUESTIONS = ["what color is it?", "how many are there?", "is it large?"]
EXAMPLE = {
    "questions/question": QUESTIONS,
    "questions/answer_label": np.array([7, 3, 0], np.int64),
    "questions/kind": np.array([0, 6, 2], np.int64),
}
SHAPES = {"source": "tfds", "dataset": "shapes/tiny", "split": "test", "limit": 64}


def run(example, seed=(0, 0), **arguments):
    ops = build_ops({"choose_question": arguments})
    tensors = {name: tf.constant(value) for name, value in example.items()}
    specs = {k: tf.TensorSpec([None] * v.shape.rank, v.dtype) for k, v in tensors.items()}
    seeds = tf.constant([seed], tf.int32)
    process = tf.function(lambda e: apply_ops(ops, e, seeds), [specs], autograph=False)
    return {k: v.numpy() for k, v in process(tensors).items()}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_question_answer_and_kind_belong_together(index):
    found = run(EXAMPLE, index=index)
    assert found["text"].decode() == QUESTIONS[index]
    assert found["answer"] == EXAMPLE["questions/answer_label"][index]
    assert found["kind"] == EXAMPLE["questions/kind"][index]
    assert found["answer"].dtype == found["kind"].dtype == np.int32


def test_each_is_chosen_as_often_and_by_the_seed_alone():
    rng = np.random.default_rng(0)
    seeds = rng.integers(-(2**31), 2**31, (300, 2)).astype(np.int32)
    ops = build_ops({"choose_question": {}})
    tensors = {name: tf.constant(value) for name, value in EXAMPLE.items()}
    dataset = tf.data.Dataset.from_tensor_slices(seeds[:, None]).map(
        tf.autograph.experimental.do_not_convert(
            lambda s: (apply_ops(ops, tensors, s)["text"], apply_ops(ops, tensors, s)["answer"])
        )
    )
    found = [(text.decode(), int(answer)) for text, answer in dataset.as_numpy_iterator()]
    counts = collections.Counter(found)
    assert set(counts) == set(zip(QUESTIONS, (7, 3, 0), strict=True))
    assert min(counts.values()) > 70
    assert found == [(t.decode(), int(a)) for t, a in dataset.as_numpy_iterator()]


def test_names_of_fields_and_no_kinds():
    example = {"q": ["a", "b"], "a": np.array([4, 5])}
    found = run(example, index=1, question="q", answer="a", kind=None)
    assert found["text"] == b"b" and found["answer"] == 5 and "kind" not in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": -1}, "a number from 0"),
        ({"index": True}, "a number from 0"),
        ({"question": "questions/kind"}, "no list of strings"),
        ({"answer": "questions/question"}, "no list of whole numbers"),
        ({"answer": "questions/answer"}, "did you mean 'questions/answer_label'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        run(EXAMPLE, **arguments)


def test_an_example_with_fewer_questions_cannot_be_used():
    with pytest.raises(tf.errors.InvalidArgumentError, match="there is no question 3"):
        run(EXAMPLE, index=3)


def test_questions_of_shapes_each_once_and_at_random(shapes_dir):
    keep = {"keep": {"fields": ("text", "answer", "kind", "num_objects")}}

    def texts(index):
        data = {**SHAPES, "preprocess": {"choose_question": {"index": index}, **keep}}
        pipeline = EvalPipeline(data, None, batch_size=64, extra_fields=("text_raw",))
        assert pipeline.class_names("questions/kind") == vocabulary.QUESTION_KINDS
        rows = [row for batch in pipeline.batches() for row in zip(
            batch["text_raw"].tolist(), batch["answer"].tolist(), batch["kind"].tolist(),
            batch["num_objects"].tolist(), batch["mask"].tolist(), strict=True)]  # fmt: skip
        return [row for row in rows if row[-1]]

    asked = [texts(index) for index in (0, 3, 5)]
    for questions in zip(*asked, strict=True):  # of one scene
        assert len({question[0] for question in questions}) == 3
        for text, answer, kind, objects, _ in questions:
            if text == b"how many objects are there?":
                assert vocabulary.ANSWERS[answer] == vocabulary.COUNTS[objects]
                assert vocabulary.QUESTION_KINDS[kind] == "count"
    # Training asks another one in another epoch.
    data = {**SHAPES, "preprocess": {"choose_question": {}, **keep}}
    pipeline = TrainPipeline(data, None, batch_size=64, seed=0)
    batches = pipeline.batches()
    first, second = next(batches), next(batches)
    assert sorted(first["answer"].tolist()) != sorted(second["answer"].tolist())
    assert b"?" in b"".join(t.encode() for t in sample_texts(data, limit=3))
