"""Generated captions, their scores beside COCO's own, and classes by likelihood."""

import io
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlp_jax.data.tokenizers import build_tokenizer
from vlp_jax.errors import UserError
from vlp_jax.evaluators import caption_scores, make_evaluators
from vlp_jax.evaluators.base import Resources, compile_functions
from vlp_jax.evaluators.captioning import CaptionsOutcome
from vlp_jax.objectives import make_objective
from vlp_jax.parallel import mesh as mesh_lib

N, SIDE, LENGTH = 11, 8, 12
TOWER = {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2}
SECTION = {
    "name": "captioning",
    "image": {"variant": "mu/4", "image_size": SIDE, **TOWER},
    "decoder": {"variant": "mu", **TOWER},
}
WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "star",
    "on",
    "of",
    "and",
    "left",
    "right",
    "big",
    "small",
    "there",
    "is",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Eleven pictures with captions, of which one has none, and a model far from its start."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (N, SIDE, SIDE, 3)).astype(np.uint8)
    captions = [[f"Picture {i} {j}" for j in range(1 + i % 3)] for i in range(N)]
    captions[4] = [" ", ""]
    files = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        files.append(buffer.getvalue())
    labels = pa.array(np.arange(N) % 3, pa.int32())
    path = str(tmp_path_factory.mktemp("captions") / "x.parquet")
    pq.write_table(pa.table({"image": files, "captions": captions, "label": labels}), path)
    tokenizer = build_tokenizer({"name": "bytes", "context_length": LENGTH}, lambda: (), None)
    objective = make_objective(SECTION, tokenizer)
    spec = {
        "image": jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.uint8),
        "text": jax.ShapeDtypeStruct((1, LENGTH), np.int32),
    }
    params = jax.jit(lambda: nn.unbox(objective.init(jax.random.key(0), spec)))()
    params = jax.tree.map(lambda x: (x + 0.3 * rng.normal(size=x.shape)).astype(np.float32), params)
    return types.SimpleNamespace(
        pictures=pictures,
        captions=captions,
        path=path,
        tokenizer=tokenizer,
        objective=objective,
        params=params,
    )


def make(world, section, devices=1, batch_size=4, **data):
    mesh = mesh_lib.make_mesh({"replica": devices}, jax.devices()[:devices])
    made = compile_functions(world.objective.functions(), mesh)
    resources = Resources(made, world.tokenizer, mesh, batch_size)
    steps = [("choose_text", {}), ("lowercase", {}), ("decode_image", {}), ("resize", {"size": 8})]
    source = {"source": "parquet", "path": world.path, "preprocess": steps, **data}
    return make_evaluators({"x": section}, {**source, "max_bad_fraction": 0.5}, resources)["x"]


def greedy(world, prompt=b"", length=LENGTH):
    """Captions without a cache: the whole text again for each word."""
    apply = jax.jit(world.objective.model.apply)
    ids = world.tokenizer.encode([prompt])[0] if prompt else []
    found = np.zeros((N, LENGTH), np.int32)
    found[:, : len(ids)] = ids
    total, ended = np.zeros(N), np.zeros(N, bool)
    for place in range(len(ids), min(LENGTH, len(ids) + length)):
        scores = apply(
            {"params": world.params}, world.pictures, world.objective.decoder_inputs(found)
        )
        log = np.asarray(jax.nn.log_softmax(scores[:, place]), np.float64)
        best = log.argmax(-1)
        total += np.where(ended, 0, log.max(-1))
        found[:, place] = np.where(ended, 0, best)
        ended |= best == world.tokenizer.eos_id
    return world.tokenizer.decode(found[:, len(ids) :]), total


@pytest.mark.parametrize(
    ("devices", "batch_size"), [pytest.param(1, 4, marks=pytest.mark.slow), (2, 16), (8, 8)]
)
def test_captions_and_references_of_every_image(world, devices, batch_size):
    outcome = make(world, {"name": "captions"}, devices, batch_size).outcome(world.params)
    kept = [i for i in range(N) if i != 4]  # it has no caption to be compared with
    texts, likelihood = greedy(world)
    assert list(outcome.captions) == [texts[i] for i in kept]
    np.testing.assert_allclose(outcome.likelihood, likelihood[kept], rtol=1e-4)
    assert [list(own) for own in outcome.references] == [
        [caption.lower() for caption in world.captions[i]] for i in kept
    ]
    assert list(outcome.index) == kept
    scores = outcome.scores()
    assert scores["examples"] == N - 1 and set(caption_scores.SCORES) <= scores.keys()
    assert set(outcome.arrays()) == {"captions", "references", "likelihood", "index"}


def test_a_prompt_is_gone_on_with(world):
    section = {"name": "captions", "prompt": "ab", "length": 3}
    outcome = make(world, section).outcome(world.params)
    texts, _ = greedy(world, b"ab", 3)
    assert list(outcome.captions) == [texts[i] for i in range(N) if i != 4]


def test_beams_find_likelier_captions(world):
    few, many = (
        make(world, {"name": "captions", "beams": beams, "length": 4}).outcome(world.params)
        for beams in (1, 4)
    )
    assert (many.likelihood >= few.likelihood - 1e-4).all()
    assert many.likelihood.sum() > few.likelihood.sum()


def test_names_of_classes_in_captions():
    outcome = CaptionsOutcome(
        captions=("a red star.", "A blue star", "a red and a blue star", "nothing"),
        references=(("x",),) * 4,
        likelihood=np.zeros(4),
        index=np.arange(4),
        labels=np.array([0, 0, 0, 1]),
        class_names=("red star", "blue star"),
    )
    scores = outcome.scores()
    assert scores["named"] == 0.25 and scores["chance"] == 0.5
    assert scores["named_shuffled"] == 0.25  # "nothing", "a red star.", "A blue star", both


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_classes_by_the_likelihood_of_their_names(world, devices):
    names = ["dog", "hen", "a very long name", "x", "yy", "zzz"]
    section = {"name": "likelihood", "template": "{}!", "class_names": names}
    evaluator = make(world, section, devices)
    scores = dict(evaluator(world.params))
    tokens = world.tokenizer([f"{name}!" for name in names])
    logs = []
    for row in tokens:
        ids = jnp.broadcast_to(jnp.asarray(row), (N, LENGTH))
        found = world.objective.model.apply(
            {"params": world.params}, world.pictures, world.objective.decoder_inputs(ids)
        )
        log = np.asarray(jax.nn.log_softmax(found), np.float64)
        end = int(np.flatnonzero(row == world.tokenizer.eos_id)[0]) + 1
        logs.append(log[:, np.arange(end), row[:end]].sum(1))
    kept = np.arange(N) != 4  # it has no text, so that no batch of this data holds it
    labels, order = (np.arange(N) % 3)[kept], np.stack(logs, 1).argsort(1)[kept, ::-1]
    assert scores["top1"] == pytest.approx((order[:, 0] == labels).mean())
    assert scores["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean())
    assert scores["examples"] == N - 1 and scores["chance"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "captions", "prompt": "x" * 12}, "12 tokens leaves no room in the context of 12"),
        ({"name": "captions", "references": "texts"}, "unknown key 'texts'"),
        ({"name": "captions", "label_field": "class"}, "no whole numbers 'class'"),
        ({"name": "captions", "label_field": "label"}, "class_names"),
        ({"name": "likelihood"}, "no names of the classes in 'label'"),
        ({"name": "likelihood", "template": "dog", "class_names": ["a"]}, "dog"),
    ],
)
def test_bad_sections(world, section, message):
    with pytest.raises(UserError, match=message):
        make(world, section)


# Scores.


def test_scores_are_those_of_cocos_evaluation():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    rng = np.random.default_rng(0)
    text = lambda most: [str(w) for w in rng.choice(WORDS, rng.integers(1, most))]  # noqa: E731
    candidates = [text(12) for _ in range(60)]
    references = [[text(12) for _ in range(rng.integers(1, 6))] for _ in range(60)]
    for row in range(0, 60, 3):  # some that share long pieces
        references[row][0] = candidates[row][: len(candidates[row]) // 2 + 1] + text(4)
    given = {i: [" ".join(words)] for i, words in enumerate(candidates)}
    wanted = {i: [" ".join(words) for words in own] for i, own in enumerate(references)}
    theirs = {
        "cider": Cider().compute_score(wanted, given)[0],
        "bleu4": Bleu(4).compute_score(wanted, given, verbose=0)[0][3],
        "rouge_l": Rouge().compute_score(wanted, given)[0],
    }
    for name, value in theirs.items():
        ours = caption_scores.SCORES[name](candidates, references)
        assert ours == pytest.approx(value, abs=1e-6), name
        assert value > 1e-3


def test_meteor_knows_stems_and_needs_no_download():
    same, stem, other = (
        caption_scores.meteor([["two", word]], [[["two", "circles"]]])
        for word in ("circles", "circle", "stars")
    )
    assert same == pytest.approx(stem) and stem > other > 0


def test_words_are_those_of_penn_treebank_without_punctuation():
    found = caption_scores.tokens_of(["A dog's \"ball\", isn't it? (red) - no...", ""])
    assert found == [["a", "dog", "'s", "ball", "is", "n't", "it", "red", "no"], []]


def test_a_caption_without_words_has_no_score():
    for name, score in caption_scores.SCORES.items():
        assert score([[], ["red"]], [[["a", "red"]], [["blue"]]]) == pytest.approx(0, abs=1e-3), (
            name
        )
