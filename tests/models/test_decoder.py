"""The text decoder against transformers, its cache, and what it generates."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from modules import apply, init, perturbed

from tools.perf.peers.torch_step import patch_torchvision
from vlp_jax.models.attention import AttentionMask
from vlp_jax.models.decoder import make_decoder
from vlp_jax.models.generation import Sampling, beam_search, generate
from vlp_jax.models.layers import Attended, Encoder
from vlp_jax.models.values import ComputeConfig

KEY = jax.random.key(0)
VOCAB, EOS, PAD = 11, 1, 0
KINDS = {
    "learned positions": {},
    "rotary, shared keys, tied": {
        "rope": 100.0,
        "kv_heads": 1,
        "norm": "rms",
        "gated": True,
        "bias": False,
        "tied": True,
    },  # fmt: skip
    "layers one by one": {"compute": ComputeConfig(scan_layers=False), "qk_norm": True},
}


def tiny(vocab=VOCAB, length=12, **fields):
    return make_decoder(
        "mu", vocab_size=vocab, context_length=length, depth=2, embedding_stddev=0.5, **fields
    )


def ids(batch=3, length=7, vocab=VOCAB):
    return jnp.asarray(np.random.default_rng(0).integers(2, vocab, (batch, length)), jnp.int32)


def seen(batch=3, length=5, width=24, lengths=None):
    tokens = np.random.default_rng(1).normal(size=(batch, length, width)).astype(np.float32)
    lengths = None if lengths is None else jnp.asarray(lengths)
    return Attended(jnp.asarray(tokens), AttentionMask(lengths=lengths))


def with_params(decoder, context=None):
    """(parameters that are not zero, a function of them)."""
    return perturbed(decoder, ids(), context)


def test_logits_are_those_of_mbart():
    patch_torchvision()
    mbart = importlib.import_module("transformers.models.mbart.modeling_mbart")
    torch.manual_seed(0)
    config = mbart.MBartConfig(
        vocab_size=99, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64,
        max_position_embeddings=32, scale_embedding=False, attn_implementation="eager",
    )  # fmt: skip
    theirs = mbart.MBartDecoder(config).eval()
    for parameter in theirs.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    w = {name: x.numpy() for name, x in theirs.state_dict().items()}
    # Its first norm, of the embeddings, is made to do nothing by sequences that are normal already.
    tokens = np.random.default_rng(0).integers(3, 99, (2, 9))
    encoded = np.random.default_rng(1).normal(size=(2, 5, 32)).astype(np.float32)
    expected = theirs(
        input_ids=torch.from_numpy(tokens), encoder_hidden_states=torch.from_numpy(encoded)
    ).last_hidden_state.detach()
    decoder = make_decoder(
        "mu",
        vocab_size=99,
        context_length=32,
        depth=2,
        width=32,
        heads=4,
        mlp_dim=64,
        activation="gelu",
        norm_eps=1e-5,
    )
    attentions = {"attention": "self_attn", "cross_attention": "encoder_attn"}
    rows = []
    for i in range(2):
        layer = {}
        for ours, name in attentions.items():
            part = {}
            for to, proj in (("query", "q"), ("key", "k"), ("value", "v")):
                at = f"layers.{i}.{name}.{proj}_proj"
                part[to] = {
                    "kernel": w[f"{at}.weight"].T.reshape(32, 4, 8),
                    "bias": w[f"{at}.bias"].reshape(4, 8),
                }
            at = f"layers.{i}.{name}.out_proj"
            part["out"] = {"kernel": w[f"{at}.weight"].T.reshape(4, 8, 32), "bias": w[f"{at}.bias"]}
            layer[ours] = part
            at = f"layers.{i}.{name}_layer_norm"
            layer[f"norm_{ours}"] = {"scale": w[f"{at}.weight"], "bias": w[f"{at}.bias"]}
        at = f"layers.{i}.final_layer_norm"
        layer["norm_mlp"] = {"scale": w[f"{at}.weight"], "bias": w[f"{at}.bias"]}
        layer["mlp"] = {
            to: {"kernel": w[f"layers.{i}.{fc}.weight"].T, "bias": w[f"layers.{i}.{fc}.bias"]}
            for to, fc in (("up", "fc1"), ("down", "fc2"))
        }
        rows.append(layer)
    encoder = {
        "layers": jax.tree.map(lambda *x: np.stack(x), *rows),
        "norm": {"scale": w["layer_norm.weight"], "bias": w["layer_norm.bias"]},
    }
    # What their layers begin with, its positions two rows further and its norm of embeddings.
    x = w["embed_tokens.weight"][tokens] + w["embed_positions.weight"][2 : 2 + 9]
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    x = x * w["layernorm_embedding.weight"] + w["layernorm_embedding.bias"]
    stack = Encoder(decoder.transformer)
    found = stack.apply(
        {"params": encoder},
        jnp.asarray(x),
        AttentionMask(causal=True),
        context=Attended(jnp.asarray(encoded)),
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_scores_are_of_what_came_before_alone(kind):
    decoder = tiny(**KINDS[kind])
    params, tokens = with_params(decoder), ids()
    before = apply(decoder, params, tokens)
    assert before.shape == (3, 7, VOCAB) and before.dtype == jnp.float32
    after = apply(decoder, params, tokens.at[:, 4:].set(13 - tokens[:, 4:]) % VOCAB)
    np.testing.assert_allclose(after[:, :4], before[:, :4], atol=1e-5)
    assert np.abs(after[:, 4:] - before[:, 4:]).max() > 1e-3


def test_scores_are_zero_at_first_and_a_mask_token_is_no_word():
    decoder = tiny(extra_tokens=1)
    params = init(decoder, ids())
    masked = jnp.full((2, 7), VOCAB)  # the token behind the vocabulary
    assert not np.asarray(apply(decoder, params, masked)).any()
    assert params["params"]["token_embedding"].shape[0] == VOCAB + 1


@pytest.mark.parametrize(
    ("kind", "looks"),
    [
        *((kind, True) for kind in KINDS),
        ("learned positions", False),
        *(pytest.param(kind, False, marks=pytest.mark.slow) for kind in list(KINDS)[1:]),
    ],
)
def test_with_the_cache_all_is_as_without(kind, looks):
    """Token by token, after a prompt of several at once."""
    decoder = tiny(**KINDS[kind])
    context = seen(lengths=(5, 3, 1)) if looks else None
    params, tokens = with_params(decoder, context), ids()
    expected = apply(decoder, params, tokens, context)
    cache = decoder.apply(params, 3, 10, method="start")
    step = jax.jit(stepper(decoder, params, context))
    scores, cache = step(tokens[:, :4], cache)
    for place in range(4, 8):
        np.testing.assert_allclose(scores, expected[:, place - 1], atol=1e-5)
        if place < 7:
            scores, cache = step(tokens[:, place : place + 1], cache)
    assert int(cache.filled) == 7
    if looks:
        moved = apply(decoder, params, tokens, seen(lengths=(5, 3, 2)))
        assert np.abs(moved - expected)[2].max() > 1e-4  # it is looked at


def stepper(decoder, params, context=None):
    return lambda tokens, cache: decoder.apply(params, tokens, cache, context, method="step")


def test_greedy_generation_takes_the_best_token_each_time_and_ends():
    decoder = tiny(length=20)
    params = with_params(decoder)
    prompt = ids(8, 2)
    cache = decoder.apply(params, 8, 12, method="start")
    found = jax.jit(
        lambda cache: generate(
            stepper(decoder, params), cache, prompt, 10, eos_id=EOS, pad_id=PAD, rng=KEY
        )
    )(cache)
    ends, whole = 0, np.zeros((1, 12), np.int32)  # no place sees what comes after it
    for row in range(8):
        text, total = [], 0.0
        while len(text) < 10 and (not text or text[-1] != EOS):
            whole[0, : 2 + len(text)] = [*np.asarray(prompt[row]), *text]
            scores = apply(decoder, params, jnp.asarray(whole))[0, 1 + len(text)]
            log = np.asarray(jax.nn.log_softmax(scores))
            text.append(int(log.argmax()))
            total += log.max()
        ends += text[-1] == EOS
        assert list(found.tokens[row]) == text + [PAD] * (10 - len(text))
        np.testing.assert_allclose(found.scores[row], total, atol=1e-4)
    assert ends > 0


def test_sampling_chooses_from_what_it_may_by_its_probability():
    scores = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.06, 0.04]]))
    rows = jnp.repeat(scores, 20_000, axis=0)

    def shares(**fields):
        drawn = Sampling(**fields)(rows, KEY)
        return np.bincount(np.asarray(drawn), minlength=5) / len(drawn)

    np.testing.assert_allclose(shares(temperature=1.0), np.exp(scores[0]), atol=0.015)
    cold = np.exp(np.asarray(scores[0]) / 0.5)
    np.testing.assert_allclose(shares(temperature=0.5), cold / cold.sum(), atol=0.015)
    np.testing.assert_allclose(
        shares(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0, 0], atol=0.015
    )
    np.testing.assert_allclose(
        shares(temperature=1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0, 0], atol=0.015
    )
    assert shares(temperature=1.0, top_p=0.01)[0] == 1 and shares(temperature=0.0)[0] == 1


@pytest.mark.parametrize("penalty", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_beam_search_equals_a_search_of_all_texts(penalty):
    """Of a vocabulary of 5 and 4 tokens: beams for all beginnings leave nothing out."""
    decoder = tiny(vocab=5)
    params = with_params(decoder)
    prompt, length, width = ids(2, 3, 5), 4, 125
    cache = decoder.apply(params, 2 * width, 7, method="start")
    found = jax.jit(
        lambda cache: beam_search(
            stepper(decoder, params), cache, prompt, length,
            width=width, eos_id=EOS, pad_id=PAD, length_penalty=penalty,
        )
    )(cache)  # fmt: skip
    for row in range(2):
        best, value = None, -np.inf
        for text in itertools.product(range(5), repeat=length):
            end = text.index(EOS) + 1 if EOS in text else length
            if any(token != PAD for token in text[end:]):
                continue
            own = log_of(decoder, params, prompt[row : row + 1], text)[:end].sum() / end**penalty
            if own > value:
                best, value = text, own
        assert tuple(np.asarray(found.tokens[row])) == best
        np.testing.assert_allclose(found.scores[row], value, atol=1e-4)


def log_of(decoder, params, prompt, text, known={}):  # noqa: B006
    """Log-probabilities of the tokens of a text behind a prompt, by one pass without a cache."""
    key = (id(params), tuple(np.asarray(prompt[0])))
    if key not in known:
        texts = np.array(list(itertools.product(range(5), repeat=len(text))), np.int32)
        whole = jnp.concatenate([jnp.repeat(prompt, len(texts), axis=0), texts], axis=1)
        log = jax.nn.log_softmax(jax.jit(decoder.apply)(params, whole[:, :-1]))
        log = np.asarray(log)[:, prompt.shape[1] - 1 :]
        rows = np.take_along_axis(log, texts[..., None], axis=2)[..., 0]
        known[key] = {tuple(t): row for t, row in zip(texts, rows, strict=True)}
    return known[key][text]


def test_one_beam_is_greedy():
    decoder = tiny()
    params, prompt = with_params(decoder), ids(3, 2)
    start = lambda: decoder.apply(params, 3, 8, method="start")  # noqa: E731
    step = stepper(decoder, params)
    ends = {"eos_id": EOS, "pad_id": PAD}
    greedy = jax.jit(lambda cache: generate(step, cache, prompt, 6, rng=KEY, **ends))(start())
    beam = jax.jit(lambda cache: beam_search(step, cache, prompt, 6, width=1, **ends))(start())
    np.testing.assert_array_equal(beam.tokens, greedy.tokens)
    np.testing.assert_allclose(beam.scores, greedy.scores, atol=1e-5)


def no_cache():
    return tiny().apply(with_params(tiny()), 3, 8, method="start")


def no_step(tokens, cache):
    raise AssertionError("a refused search takes no step")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: init(tiny(), ids(1, 13)), "at most 12 tokens, not 13"),
        (lambda: Sampling(temperature=-1.0), "temperature must be >= 0"),
        (lambda: Sampling(top_k=-1), "top_k must be >= 0"),
        (lambda: Sampling(top_p=0.0), r"top_p must be in \(0, 1\]"),
        (
            lambda: beam_search(no_step, no_cache(), ids(), 3, width=0, eos_id=EOS, pad_id=PAD),
            "width of a beam search must be at least 1, not 0",
        ),
    ],
)
def test_what_cannot_be_generated(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_prompt_longer_than_the_context_is_refused():
    decoder = tiny()
    params = with_params(decoder)
    with pytest.raises(ValueError, match="at most 12 tokens, not 15"):
        decoder.apply(params, 1, 15, method="start")
