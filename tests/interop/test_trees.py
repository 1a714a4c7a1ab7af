"""The flat form of parameters, and weights that a model starts from."""

import jax
import numpy as np
import pytest
from foreign import (
    MEAN,
    assert_same,
    clip,
    images,
    masked_decoder,
    random_params,
    siglip,
    token_ids,
    vit,
)
from modules import changed

from vlp_jax import interop
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.values import ComputeConfig, Pixels

ONE_BY_ONE = ComputeConfig(scan_layers=False)


def by_layer(module):
    """The same model whose layers stand alone."""
    if not hasattr(module, "image"):
        return module.clone(compute=ONE_BY_ONE)
    parts = [name for name in ("image", "text", "decoder") if hasattr(module, name)]
    return module.clone(**{name: by_layer(getattr(module, name)) for name in parts})


def mae():
    image = vit(pooling="none", position="sincos")
    return MaskedAutoencoder(image, masked_decoder(24, 2, 40, 3))


@pytest.mark.parametrize("module", [clip(), vit(), mae()], ids=lambda m: type(m).__name__)
def test_stacked_and_single_layers_are_the_same_parameters(module):
    params = random_params(module)
    stacked, apart = interop.to_tree(module, params), interop.to_tree(by_layer(module), params)
    assert_same(interop.from_tree(module, stacked), params)
    assert_same(interop.from_tree(by_layer(module), apart), params)
    assert jax.tree.structure(stacked) != jax.tree.structure(apart)
    assert_same(interop.stack_layers(interop.unstack_layers(params)), params)


def test_a_model_of_single_layers_takes_its_tree_and_computes_the_same():
    module = clip()
    params = random_params(module)
    inputs = (images(32), token_ids(41, 9, 5))
    out = [
        model.apply({"params": interop.to_tree(model, params)}, *inputs)
        for model in (module, by_layer(module))
    ]
    np.testing.assert_allclose(out[0]["image"], out[1]["image"], atol=1e-6)
    np.testing.assert_allclose(out[0]["text"], out[1]["text"], atol=1e-6)


def test_a_tower_with_one_kind_of_layers_beside_one_with_the_other(tmp_path):
    again = ComputeConfig(remat="full")
    module = clip(text={"compute": ONE_BY_ONE}, image={"compute": again})
    params = random_params(module)
    tree = interop.to_tree(module, params)
    assert "layers" in tree["image"]["encoder"] and "layer_2" in tree["text"]["encoder"]
    interop.write("hf_clip", module, interop.from_tree(module, tree), tmp_path)
    assert_same(interop.read(f"hf_clip:{tmp_path}").params, params)


def test_a_layer_that_is_not_there():
    with pytest.raises(ValueError, match=r"there are layers \[0, 2\], not all from 0 on"):
        interop.stack_layers({"encoder/layer_0/x": np.ones(1), "encoder/layer_2/x": np.ones(1)})


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
