"""Attention maps against transformers, the forward pass and NumPy; rollout against a loop."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from foreign import clip, images, pixels, random_params, siglip, token_ids

from vlp_jax import interop
from vlp_jax.inspection import attention_maps, image_rollout, rollout, token_strings
from vlp_jax.inspection.taps import attention_weights, layer_path, tapped
from vlp_jax.models.attention import AttentionMask
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.values import ComputeConfig

EOS = 5
PADDED = dict(padding_mask=True, pooling="map", pad_id=1, causal=False, eos_id=EOS)
MODULES = {
    "clip": clip(image=dict(qk_norm=True, compute=ComputeConfig(remat="full"))),
    "clip, layers written out": clip(
        image=dict(compute=ComputeConfig(scan_layers=False), registers=2),
        text=dict(compute=ComputeConfig(scan_layers=False, remat="dots")),
    ),
    "siglip": siglip(text=PADDED),
}


def parts(module: DualEncoder, seed=0):
    params = interop.to_tree(module, random_params(module, seed))
    tokens = token_ids(module.text.vocab_size, module.text.context_length, EOS)
    return params, images(32), tokens


@pytest.mark.parametrize("name", MODULES)
def test_a_tapped_pass_computes_what_the_model_computes(name):
    module = MODULES[name]
    params, image, tokens = parts(module)
    out, seen = jax.jit(lambda *x: tapped(module, *x))(params, image, tokens)
    expected = jax.jit(module.apply)({"params": params}, image, tokens)
    for what in expected:
        np.testing.assert_allclose(out[what], expected[what], atol=2e-6)
    paths = [path for path in seen if path.endswith("/attention")]
    pooled = sum(tower.pooling == "map" for tower in (module.image, module.text))
    assert len(paths) == module.image.transformer.depth + module.text.transformer.depth + pooled
    for path in paths:  # what the model mixed itself, by weights that it does not tell
        weights, values = (np.asarray(seen[p], np.float64) for p in (path, f"{path}/value"))
        mixed = np.einsum("bhqk,bkhd->bqhd", weights, values)
        np.testing.assert_allclose(mixed, seen[f"{path}/mixed"], atol=1e-5)
        assert np.abs(mixed).max() > 0.1
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_what_may_not_be_seen_has_no_weight(name):
    module = MODULES[name]
    params, _, tokens = parts(module)
    tokens[:, -2:] = 1
    maps = attention_maps(module, params, tokens=tokens)
    text = maps["text"]
    if module.text.causal:
        assert (text * np.triu(np.ones(text.shape[-2:]), 1) == 0).all()
        assert set(maps) == {"text"}
    else:
        assert (text[..., -2:] == 0).all() and (maps["text_pooling"][..., -2:] == 0).all()
    assert (text > 1e-4).any()


def test_images_alone_or_with_texts_give_the_same():
    module, params = MODULES["siglip"], random_params(MODULES["siglip"])
    image, tokens = images(32), token_ids(41, 9, EOS)
    both = attention_maps(module, interop.to_tree(module, params), image, tokens)
    other = attention_maps(module, interop.to_tree(module, params), image)
    assert set(both) == {"image", "image_pooling", "text", "text_pooling"}
    for name in other:
        np.testing.assert_allclose(both[name], other[name], atol=1e-6)
    assert both["image"].shape == (3, 2, 4, 16, 16) and both["image_pooling"].shape == (3, 4, 16)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_maps_are_those_of_transformers(kind, tmp_path):
    module = clip() if kind == "clip" else siglip()
    flat = random_params(module)
    interop.write("hf", module, flat, tmp_path)
    image, tokens = images(32), token_ids(41, 9, EOS)
    model = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    mean, std = module.pixels.mean, module.pixels.std
    with torch.no_grad():
        theirs = {
            "image": model.vision_model(pixels(image, mean, std), output_attentions=True),
            "text": model.text_model(torch.from_numpy(tokens).long(), output_attentions=True),
        }
        if kind == "siglip":
            head, last = model.vision_model.head, theirs["image"].last_hidden_state
            probe = head.probe.repeat(len(image), 1, 1)
            _, pooling = head.attention(probe, last, last, average_attn_weights=False)
    ours = attention_maps(module, interop.to_tree(module, flat), image, tokens)
    for tower, out in theirs.items():
        expected = torch.stack(out.attentions, dim=1).numpy()
        assert ours[tower].shape == expected.shape
        np.testing.assert_allclose(ours[tower], expected, atol=1e-5)
        assert np.std(expected) > 0.01
    if kind == "siglip":
        np.testing.assert_allclose(ours["image_pooling"], pooling[:, :, 0].numpy(), atol=1e-5)


def test_the_step_compiles_to_the_same_whether_or_not_anything_was_looked_at():
    module = clip()
    params, image, tokens = parts(module)

    def loss(params):
        out = module.apply({"params": params}, image, tokens, train=True)
        return -jnp.trace(out["image"] @ out["text"].T)

    def compiled():
        text = jax.jit(jax.grad(loss)).lower(params).as_text()
        return str(jax.make_jaxpr(jax.grad(loss))(params)), text

    before = compiled()
    attention_maps(module, params, image, tokens)
    assert compiled() == before
    assert "scan" in before[0]  # the layers are still one loop


def test_weights_of_bfloat16_models_are_float32():
    query, key = np.random.default_rng(0).normal(size=(2, 1, 3, 2, 8)).astype(np.float32)
    low = attention_weights(jnp.bfloat16(query), jnp.bfloat16(key), AttentionMask(True))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, attention_weights(query, key, AttentionMask(True)), atol=0.02)


def test_an_edit_takes_the_place_of_what_was_seen():
    module = clip()
    params, image, _ = parts(module)
    last = layer_path("image", 1)

    def run(edits):
        out, seen = tapped(module, params, image, method="embed_image", edits=edits)
        return np.asarray(out), np.asarray(seen[last])

    same, weights = run({last: lambda x: x})
    other, reported = run({last: lambda x: jnp.roll(x, 1, axis=-1)})
    np.testing.assert_array_equal(reported, weights)
    assert np.abs(other - same).max() > 1e-2
    with pytest.raises(ValueError, match="embed_image does not come by text/encoder"):
        run({"text/encoder": lambda x: x})


def test_rollout_is_the_product_of_the_layers():
    maps = np.random.default_rng(0).dirichlet(np.ones(5), size=(2, 3, 4, 5)).astype(np.float32)
    got = rollout(maps)
    for n in range(2):
        expected = np.eye(5)
        for layer in maps[n].astype(np.float64).mean(axis=1):
            expected = (0.5 * layer + 0.5 * np.eye(5)) @ expected
        np.testing.assert_allclose(got[n], expected, atol=1e-6)
    np.testing.assert_allclose(got.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(rollout(maps, residual=1), np.broadcast_to(np.eye(5), (2, 5, 5)))
    with pytest.raises(ValueError, match=r"residual 2 is not in \[0, 1\]"):
        rollout(maps, residual=2)
    with pytest.raises(ValueError, match="maps are"):
        rollout(maps[0])


def test_rollout_of_an_image_is_what_its_pooling_takes():
    rng = np.random.default_rng(0)

    def module(pooling, **fields):
        return siglip(image=dict(pooling=pooling, **fields))

    maps = {
        "image": rng.dirichlet(np.ones(17), size=(2, 3, 4, 17)),
        "image_pooling": rng.dirichlet(np.ones(17), size=(2, 4)),
    }
    rolled = rollout(maps["image"])
    by_class = image_rollout(module("cls", class_token=True), maps)
    np.testing.assert_allclose(by_class.reshape(2, -1), rolled[:, 0, 1:], rtol=1e-6)
    by_mean = image_rollout(module("mean", class_token=True), maps)
    np.testing.assert_allclose(by_mean.reshape(2, -1), rolled[:, 1:, 1:].mean(axis=1), rtol=1e-6)
    by_map = image_rollout(module("map", class_token=True), maps).reshape(2, -1)
    expected = [maps["image_pooling"][n].mean(0) @ rolled[n, :, 1:] for n in range(2)]
    np.testing.assert_allclose(by_map, expected, rtol=1e-5)


def test_attention_maps_need_something_to_look_at():
    with pytest.raises(ValueError, match="needs images or tokens"):
        attention_maps(clip(), {})


def test_token_strings_name_what_is_special_and_leave_padding_out():
    names = {3: "a", 4: " ", 6: "ring"}
    tokenizer = types.SimpleNamespace(bos_id=2, decode=lambda ids: [names[int(ids[0, 0])]])
    row = np.array([2, 3, 4, 6, 1, 0, 0])
    expected = ["<bos>", "a", "<special>", "ring", "<eos>"]
    assert token_strings(tokenizer, row, eos_id=1, pad_id=0) == expected
    del tokenizer.bos_id
    names |= {1: ".", 2: ""}
    assert token_strings(tokenizer, row, eos_id=9, pad_id=0) == ["<special>", *expected[1:4], "."]
