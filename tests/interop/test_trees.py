"""The flat form of parameters, and weights that a model starts from."""

import flax.linen as nn
import jax
import pytest
from foreign import (
    MEAN,
    assert_same,
    clip,
    masked_decoder,
    random_params,
    siglip,
    vit,
)
from modules import changed

from vlp_jax import interop
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.values import ComputeConfig, Pixels


def mae():
    image = vit(pooling="none", position="sincos")
    return MaskedAutoencoder(image, masked_decoder(24, 2, 40, 3))


@pytest.mark.parametrize("module", [clip(), vit(), mae()], ids=lambda m: type(m).__name__)
def test_the_flat_form_is_the_tree_of_the_model(module):
    params = random_params(module)
    tree = interop.to_tree(module, params)
    assert_same(interop.from_tree(module, tree), params)
    made = jax.eval_shape(lambda: module.init(jax.random.key(0), *module.example())["params"])
    assert jax.tree.structure(tree) == jax.tree.structure(nn.unbox(made))


def test_weights_come_with_their_grids_and_what_differs(tmp_path):
    source = clip()
    interop.write("hf_clip", source, random_params(source), tmp_path)
    weights = interop.read_weights(f"hf_clip:{tmp_path}", like=source)
    assert_same(weights.params, random_params(source))
    assert weights.grids == {"image/position_embedding": (4, 4)}
    assert weights.notes == []

    again = ComputeConfig(remat="full")
    here = clip(
        image=dict(size=48, activation="gelu_tanh", norm_eps=1e-6, heads=2, compute=again),
        text=dict(eos_id=7, stochastic_depth=0.1, pad_id=9),
    ).clone(pixels=Pixels(MEAN, MEAN))
    weights = interop.read_weights(f"hf_clip:{tmp_path}", like=here)
    assert weights.notes == [
        "image.image_size is (32, 32) in the source and (48, 48) here",
        "image.heads is 4 in the source and 2 here",
        "image.activation is 'quick_gelu' in the source and 'gelu_tanh' here",
        "image.norm_eps is 1e-05 in the source and 1e-06 here",
        "text.eos_id is 5 in the source and 7 here",
        f"image_std is {source.pixels.std} in the source and {MEAN} here",
    ]


def test_weights_of_another_kind_of_model(tmp_path):
    source = mae().clone(decoder=mae().decoder.clone(position="learned"))
    interop.write("hf", by_activation(source), random_params(source), tmp_path)
    here = siglip()
    weights = interop.read_weights(f"hf:{tmp_path}", like=here)
    assert weights.grids == {"decoder/position_embedding": (4, 4)}
    for note in (
        "image.pooling is 'none' in the source and 'map' here",
        "image.class_token is True in the source and False here",
        "image.position is 'sincos' in the source and 'learned' here",
    ):
        assert note in weights.notes
    assert not any(note.startswith("text") for note in weights.notes)


def by_activation(module):
    """Both halves with one activation, as the format has it."""
    return module.clone(image=changed(module.image, activation="gelu"))
