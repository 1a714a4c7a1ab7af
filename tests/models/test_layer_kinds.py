"""Layers as language models have them, against transformers; what a `TransformerConfig` refuses."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.experimental.pallas import tpu as pltpu
from modules import apply, changed, init, perturbed

from tools.perf.peers.torch_step import patch_torchvision
from vlp_jax import config as config_lib
from vlp_jax.errors import UserError
from vlp_jax.models import layers
from vlp_jax.models.attention import ATTENTIONS, AttentionMask
from vlp_jax.models.dense import Norm
from vlp_jax.models.heads import MultiHeadAttention
from vlp_jax.models.masked_autoencoder import make_masked_decoder
from vlp_jax.models.positions import rotate
from vlp_jax.models.text import make_text
from vlp_jax.models.values import (
    ComputeConfig,
    TransformerConfig,
    make_tower,
    tower_fields,
)
from vlp_jax.models.vit import VisionTransformer, make_vit

patch_torchvision()
LLAMA = TransformerConfig(
    width=32, depth=2, mlp_dim=48, heads=4, kv_heads=2, norm="rms", norm_eps=1e-5,
    activation="silu", gated=True, bias=False, rope=10_000.0,
)  # fmt: skip
QWEN3 = dataclasses.replace(LLAMA, head_dim=16, kv_heads=1, qk_norm=True, rope=1e6)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 32)), jnp.float32)


def theirs(name, config):
    """transformers' decoder layers of these sizes, with random weights."""
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(
        vocab_size=8, hidden_size=config.width, num_hidden_layers=config.depth,
        intermediate_size=config.mlp_dim, num_attention_heads=config.heads,
        num_key_value_heads=config.key_heads, head_dim=config.head_width, hidden_act="silu",
        rms_norm_eps=config.norm_eps, rope_parameters={
            "rope_type": "default", "rope_theta": config.rope
        }, attn_implementation="eager",
    )  # fmt: skip
    model = getattr(transformers, f"{name}Model")(made).eval()
    for parameter in model.parameters():  # norms too, which begin at one
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def ours(model, config):
    """The parameters of our `Encoder` with their weights."""
    heads = (config.heads, config.head_width)
    keys = (config.key_heads, config.head_width)
    names = {
        "norm_attention/scale": ("input_layernorm", lambda w: w),
        "norm_mlp/scale": ("post_attention_layernorm", lambda w: w),
        "attention/query/kernel": ("self_attn.q_proj", lambda w: w.T.reshape(-1, *heads)),
        "attention/key/kernel": ("self_attn.k_proj", lambda w: w.T.reshape(-1, *keys)),
        "attention/value/kernel": ("self_attn.v_proj", lambda w: w.T.reshape(-1, *keys)),
        "attention/out/kernel": ("self_attn.o_proj", lambda w: w.T.reshape(*heads, -1)),
        "mlp/gate/kernel": ("mlp.gate_proj", lambda w: w.T),
        "mlp/up/kernel": ("mlp.up_proj", lambda w: w.T),
        "mlp/down/kernel": ("mlp.down_proj", lambda w: w.T),
    }
    if config.qk_norm:
        names["attention/query_norm/scale"] = ("self_attn.q_norm", lambda w: w)
        names["attention/key_norm/scale"] = ("self_attn.k_norm", lambda w: w)
    weights = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    flat = {("norm", "scale"): weights["norm.weight"]}
    for path, (name, form) in names.items():
        each = [form(weights[f"layers.{i}.{name}.weight"]) for i in range(config.depth)]
        flat["layers", *path.split("/")] = np.stack(each)
    tree = {}
    for path, value in flat.items():
        place = tree
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return {"params": tree}


@pytest.mark.parametrize("name, config", [("Llama", LLAMA), ("Qwen3", QWEN3)])
def test_layers_are_those_of_transformers(name, config):
    model = theirs(name, config)
    encoder = layers.Encoder(config)
    params = ours(model, config)
    shapes = jax.tree.map(np.shape, init(encoder, X))
    assert jax.tree.map(np.shape, params) == shapes
    weight = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
    x = torch.from_numpy(np.array(X)).requires_grad_()
    expected = model(inputs_embeds=x).last_hidden_state
    (expected * torch.from_numpy(weight)).sum().backward()

    @jax.jit
    def both(params, x):
        out, pull = jax.vjp(lambda p, x: encoder.apply(p, x, AttentionMask(causal=True)), params, x)
        return out, *pull(jnp.asarray(weight))

    out, to_params, to_x = both(params, X)
    np.testing.assert_allclose(out, expected.detach(), atol=2e-5)
    np.testing.assert_allclose(to_x, x.grad, atol=2e-4)
    of_norm = dict(model.named_parameters())["layers.1.input_layernorm.weight"].grad
    found = to_params["params"]["layers"]["norm_attention"]["scale"][1]
    np.testing.assert_allclose(found, of_norm, atol=5e-4)


def test_rotary_scores_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (np.broadcast_to(rng.normal(size=(1, 1, 1, 8)), (1, 9, 1, 8)) for _ in range(2))
    turned_q, turned_k = (np.asarray(rotate(jnp.asarray(x), 100.0))[0, :, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in range(-3, 4):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(scores) > 0.1
    np.testing.assert_allclose(turned_q[0], q[0, 0, 0], atol=1e-6)


def test_rms_norm_equals_float64_definition():
    x = 100 + jax.random.normal(jax.random.key(0), (4, 32))
    module = Norm(1e-3, jnp.float32, use_bias=False, centered=False)
    params = perturbed(module, x)
    x64 = np.asarray(x, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-3) * params["params"]["scale"]
    np.testing.assert_allclose(apply(module, params, x), expected, rtol=1e-5)


def test_without_biases_there_are_none():
    config = TransformerConfig(32, 1, 48, 4, bias=False)
    paths = jax.tree_util.tree_leaves_with_path(init(layers.Encoder(config), X))
    names = {jax.tree_util.keystr(path) for path, _ in paths}
    assert len(names) == 6 + 3 and not any("bias" in name for name in names)


@pytest.mark.parametrize("attention", ["xla", "xla_bf16", "xla_padded"])
def test_shared_keys_are_keys_that_are_repeated(attention):
    config = dataclasses.replace(LLAMA, rope=None)
    shared = MultiHeadAttention(config, ComputeConfig(attention=attention))
    params = perturbed(shared, X, X)
    apart = {"params": dict(params["params"])}
    for name in ("key", "value"):  # a head of keys serves two heads of queries in a row
        kernel = jnp.repeat(params["params"][name]["kernel"], 2, axis=1)
        apart["params"][name] = {"kernel": kernel}
    plain = MultiHeadAttention(dataclasses.replace(config, kv_heads=None))
    mask = AttentionMask(lengths=jnp.asarray([7, 3]))
    np.testing.assert_allclose(
        apply(shared, params, X, X, mask), apply(plain, apart, X, X, mask), atol=1e-5
    )


WIDE = TransformerConfig(128, 1, 64, 2)


@pytest.mark.parametrize("qk_norm, rope", [(True, None), (False, 10_000.0)])
def test_a_kernel_that_takes_heads_side_by_side_gives_the_same(qk_norm, rope):
    config = dataclasses.replace(WIDE, qk_norm=qk_norm, rope=rope)
    x = np.random.default_rng(0).normal(size=(2, 7, 128)).astype(np.float32)
    plain, kernel = (
        MultiHeadAttention(config, ComputeConfig(attention=name)) for name in ("xla", "pallas")
    )
    params = perturbed(plain, x, x)
    with pltpu.force_tpu_interpret_mode():
        found = apply(kernel, params, x, x)
    np.testing.assert_allclose(found, apply(plain, params, x, x), atol=2e-5)


@pytest.mark.parametrize("lengths", [None, (7, 2)])
def test_the_pooling_is_computed_by_the_attention_that_is_asked_for(lengths):
    x = np.random.default_rng(0).normal(size=(2, 7, 128)).astype(np.float32)
    mask = AttentionMask(lengths=None if lengths is None else jnp.asarray(lengths))
    plain = layers.AttentionPooling(WIDE)
    params = perturbed(plain, x)
    expected = apply(plain, params, x, mask)
    for name in ("xla_bf16", "xla_padded", "pallas"):
        module = layers.AttentionPooling(WIDE, ComputeConfig(attention=name))
        with pltpu.force_tpu_interpret_mode():
            traced = jax.jit(module.apply).trace(params, x, mask)
            np.testing.assert_allclose(apply(module, params, x, mask), expected, atol=2e-5)
        assert ("pallas_call" in str(traced.jaxpr)) == (name == "pallas")
    small = layers.AttentionPooling(WIDE, ComputeConfig(quantization="fp8"))
    assert str(jax.make_jaxpr(small.apply)(params, x, mask)).count("f8_e4m3fn") > 10
    error = np.abs(apply(small, params, x, mask) - expected).max()
    assert 1e-4 < error < 0.5


def test_a_tower_is_made_from_its_fields_and_changed_by_them():
    vit = make_vit("mu/8", 16, pooling="map", norm="rms", kv_heads=1, rope=100.0)
    fields = tower_fields(vit)
    assert fields["kv_heads"] == 1 and fields["pooling"] == "map" and fields["width"] == 32
    assert make_tower(VisionTransformer, **fields) == vit
    other = changed(vit, kv_heads=None, class_token=True)
    assert other.transformer == dataclasses.replace(vit.transformer, kv_heads=None)
    assert other.class_token and changed(other, kv_heads=1, class_token=False) == vit
    with pytest.raises(TypeError, match="headz"):
        make_tower(VisionTransformer, **fields, headz=1)


def test_a_section_may_have_every_field_and_no_other():
    arguments = set(inspect.signature(make_vit).parameters)
    assert arguments >= {f.name for f in dataclasses.fields(TransformerConfig)}
    assert {"variant", "pooling", "class_token"} < arguments and "parent" not in arguments
    with pytest.raises(UserError, match="unknown key 'kv_head'.*kv_heads"):
        config_lib.build(
            make_vit, {"variant": "mu/8", "image_size": 16, "kv_head": 1}, "config.objective.image"
        )
    with pytest.raises(UserError, match="lacks depth, heads, mlp_dim"):
        image = make_vit("mu/8", 16)
        config_lib.build(make_masked_decoder, {"width": 8}, "config.objective.decoder", image=image)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: make_vit("mu/8", 16, norm="batch"), "unknown norm 'batch'.*layer, rms"),
        (
            lambda: make_text("mu", vocab_size=9, context_length=9, kv_heads=3),
            "3 kv_heads do not divide the 2 heads",
        ),
        (
            lambda: make_text("mu", vocab_size=9, context_length=9, kv_heads=0),
            "0 kv_heads do not divide",
        ),
        (lambda: make_vit("mu/8", 16, heads=0), "0 heads do not divide"),
        (lambda: make_vit("mu/8", 16, head_dim=0), "head_dim must be at least 1, not 0"),
        (lambda: make_vit("mu/8", 16, head_dim=5, rope=10.0), "heads of an even width, not 5"),
        (
            lambda: MultiHeadAttention(LLAMA, ComputeConfig(attention="pallas")).init(
                jax.random.key(0), X, X
            ),
            "'pallas' takes as many heads of keys as of queries, not 2 and 4",
        ),
        (
            lambda: layers.Mlp(dataclasses.replace(LLAMA, activation="relu6")).init(
                jax.random.key(0), X
            ),
            "unknown activation 'relu6'",
        ),
    ],
)
def test_layers_that_there_are_not(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_attention_is_named_in_the_tests_above():
    assert set(ATTENTIONS) == {"xla", "xla_bf16", "xla_padded", "pallas", "cudnn"}
