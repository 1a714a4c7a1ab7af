"""Relevance against finite differences, torch and what is known of it."""

import jax
import numpy as np
import pytest
import torch
import transformers
from foreign import clip, images, pixels, random_params, siglip, token_ids

from vlp_jax import interop
from vlp_jax.inspection import relevance
from vlp_jax.inspection.taps import tapped

EOS = 5


def chefer(attentions, gradients):
    """R of Chefer et al. 2021 in torch: [n, tokens, tokens] from lists of [n, heads, q, k]."""
    size = attentions[0].shape[-1]
    relevant = torch.eye(size).expand(len(attentions[0]), size, size)
    for weights, gradient in zip(attentions, gradients):
        positive = (gradient * weights).clamp(min=0).mean(dim=1)
        relevant = relevant + positive @ relevant
    return relevant


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_it_is_that_of_attention_and_gradients_by_torch(kind, tmp_path):
    module = clip() if kind == "clip" else siglip()
    flat = random_params(module)
    interop.write("hf", module, flat, tmp_path)
    image, tokens = images(32), token_ids(41, 9, EOS)
    model = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    out = model(
        input_ids=torch.from_numpy(tokens).long(),
        pixel_values=pixels(image, module.pixels.mean, module.pixels.std),
        output_attentions=True,
    )
    cosine = (out.image_embeds * out.text_embeds).sum(dim=-1)
    towers = (out.vision_model_output, out.text_model_output)
    attentions = [tower.attentions for tower in towers]
    gradients = torch.autograd.grad(cosine.sum(), [*attentions[0], *attentions[1]])
    depth = len(attentions[0])
    ours = relevance(module, interop.to_tree(module, flat), image, tokens)
    np.testing.assert_allclose(ours.similarity, cosine.detach().numpy(), atol=1e-5)
    text = chefer(attentions[1], gradients[depth:])
    last = np.argmax(tokens == EOS, axis=1) if kind == "clip" else np.full(3, 8)
    expected = text[torch.arange(3), torch.from_numpy(last)].detach().numpy()
    np.testing.assert_allclose(ours.text, expected, atol=2e-5)
    assert np.std(expected) > 1e-3
    if kind == "clip":
        expected = chefer(attentions[0], gradients[:depth])[:, 0, 1:].detach().numpy()
        np.testing.assert_allclose(ours.image.reshape(3, -1), expected, atol=2e-5)
        assert np.std(expected) > 1e-4


@pytest.mark.parametrize("pooling", ["mean", "map"])
def test_the_gradient_of_a_weight_is_the_finite_difference(pooling):
    """Without attention but the pooling's, a patch counts as far as more weight would help."""
    module = siglip(
        image=dict(pooling=pooling, norm_after_pool=False), text=dict(pooling="mean", pad_id=-1)
    )
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if "attention" in str(path) and "layers" in str(path) else x,
        interop.to_tree(module, random_params(module)),
    )
    image, tokens = images(32), token_ids(41, 9, EOS)

    @jax.jit
    def similarity(scale):
        if pooling == "map":
            edits = {"image/pooling/attention": lambda x: x * scale[:, None, None]}
        else:
            edits = {"image/encoder": lambda x: x * scale[..., None]}
        out, _ = tapped(module, params, image, tokens, edits=edits)
        return (out["image"] * out["text"]).sum(axis=-1)

    step, expected = 2e-2, np.zeros((3, 16))
    for patch in range(16):
        nudge = np.zeros((3, 16), np.float32)
        nudge[:, patch] = step
        expected[:, patch] = (similarity(1 + nudge) - similarity(1 - nudge)) / (2 * step)
    got = relevance(module, params, image, tokens).image.reshape(3, 16)
    if pooling == "mean":
        np.testing.assert_allclose(got, np.maximum(expected, 0), atol=2e-3)
    else:  # positive parts are taken of each of the four heads: the sum of all is a lower bound
        assert (got >= np.maximum(expected / 4, 0) - 2e-3).all()
    assert expected.max() > 1e-2


def test_pairs_do_not_depend_on_each_other():
    module = siglip(image=dict(pooling="mean"), text=dict(pooling="mean"))
    params = interop.to_tree(module, random_params(module))
    image, tokens = images(32), token_ids(41, 9, EOS)
    whole = relevance(module, params, image, tokens)
    one = relevance(module, params, image[1:2], tokens[1:2])
    np.testing.assert_allclose(one.image[0], whole.image[1], atol=1e-5)
    np.testing.assert_allclose(one.text[0], whole.text[1], atol=1e-5)
    assert (whole.image >= 0).all() and (whole.text >= 0).all()
    assert whole.image.shape == (3, 4, 4) and whole.text.shape == (3, 9)
    with pytest.raises(ValueError, match="3 images and 2 texts are no pairs"):
        relevance(module, params, image, tokens[:2])
