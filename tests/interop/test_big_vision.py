"""big_vision's .npz: against open_clip's own loader of such files, and modules of Flax's names."""

import re

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import open_clip
import pytest
import timm
import torch
from foreign import (
    applied,
    assert_close,
    assert_same,
    embed,
    features,
    images,
    pixels,
    random_params,
    siglip,
    some,
    token_ids,
    vit,
)
from modules import changed
from open_clip.convert import load_big_vision_weights

from vlp_jax import interop
from vlp_jax.errors import UserError
from vlp_jax.models.values import Pixels

HALF = (0.5, 0.5, 0.5)


def pair(**fields):
    """A small model of ours whose pixels are in [-1, 1]."""
    return siglip(**fields).clone(pixels=Pixels())


PAIRS = {
    "as SigLIP": pair(),
    "42 px, patch 14, mean": pair(
        image=dict(size=42, patch=14, width=48, heads=6, pooling="mean", mlp_dim=100)
    ),
    "class token without position": pair(
        image=dict(pooling="cls", class_token=True, class_position=False)
    ),
    "class token with position": pair(image=dict(pooling="cls", class_token=True)),
    "fixed positions": pair(image=dict(position="sincos")),
    "text head without bias": pair(text_head="linear"),
}


def weights(folder):
    with np.load(folder / "model.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def oracle(module, file):
    """open_clip's model of a module of ours, filled by open_clip from the file."""
    image, text = module.image, module.text
    trunk = timm.models.vision_transformer.VisionTransformer(
        img_size=image.image_size,
        patch_size=image.patch_size,
        embed_dim=image.width,
        depth=image.transformer.depth,
        num_heads=image.transformer.heads,
        mlp_ratio=image.transformer.mlp_dim / image.width,
        global_pool={"map": "map", "mean": "avg", "cls": "token"}[image.pooling],
        class_token=image.class_token,
        no_embed_class=True,
        fc_norm=False,
        num_classes=0,
        act_layer="gelu_tanh",
    )
    model = open_clip.CustomTextCLIP(
        module.embed_dim,
        vision_cfg=dict(
            timm_model_name="test_vit", timm_proj="none", timm_pool="token", image_size=160
        ),
        text_cfg=dict(
            context_length=text.context_length,
            vocab_size=text.vocab_size,
            width=text.width,
            heads=text.transformer.heads,
            layers=text.transformer.depth,
            mlp_ratio=text.transformer.mlp_dim / text.width,
            no_causal_mask=True,
            proj_bias=True,
            pool_type="last",
            norm_kwargs={"eps": 1e-6},
            act_kwargs={"approximate": "tanh"},
        ),
        init_logit_bias=0.0,
    )
    model.visual.trunk = trunk
    load_big_vision_weights(model, str(file))
    return model.eval()


def assert_computes_the_same(module, params, model):
    image = images(module.image.image_size)
    ids = token_ids(module.text.vocab_size, module.text.context_length, 2)
    ours = embed(module, params, image, ids)
    x, tokens = pixels(image, HALF, HALF), torch.from_numpy(ids).long()
    theirs = {
        "raw_image": model.encode_image(x),
        "raw_text": model.encode_text(tokens),
        "image": model.encode_image(x, normalize=True),
        "text": model.encode_text(tokens, normalize=True),
        "logits": model.get_logits(x, tokens)[0],
    }
    for what in theirs:
        assert_close(ours[what], theirs[what], f"big_vision {what}")


@pytest.mark.parametrize(
    "name",
    some(PAIRS, "42 px, patch 14, mean", "class token with position", "text head without bias"),
)
def test_writes_ours_and_reads_it_back(name, tmp_path):
    module = PAIRS[name]
    params = random_params(module)
    assert interop.write("big_vision", module, params, tmp_path) == [tmp_path / "model.npz"]
    model = oracle(module, tmp_path / "model.npz")
    assert_computes_the_same(module, params, model)

    imported = interop.read(f"big_vision:{tmp_path}", like=module)
    assert_computes_the_same(imported.module, imported.params, model)
    exact = not (module.image.class_token and module.image.class_position)
    if exact and module.image.position == "learned" and module.text_head == "linear_bias":
        assert_same(imported.params, params)
        assert not interop.differences(imported.module, module)


def stacked(tensors):
    """As a model with `scan` has its layers."""
    out, layers = {}, {}
    for key, x in tensors.items():
        match = re.fullmatch(r"(.*/encoderblock)_(\d+)(/.*)", key)
        if match:
            layers.setdefault(match[1] + match[3], {})[int(match[2])] = x
        else:
            out[key] = x
    return {**out, **{key: np.stack([x[i] for i in range(len(x))]) for key, x in layers.items()}}


@pytest.mark.parametrize(("prefix", "scan"), [("params/", False), ("", True)])
def test_reads_all_forms_of_a_file(prefix, scan, tmp_path):
    module = pair()
    params = random_params(module)
    interop.write("big_vision", module, params, tmp_path)
    tensors = weights(tmp_path)
    tensors = stacked(tensors) if scan else tensors
    tensors = {prefix + key.removeprefix("params/"): x for key, x in tensors.items()}
    if prefix:
        tensors["opt/0/count"] = np.zeros((), np.int32)
    file = tmp_path / "checkpoint.npz"
    np.savez(file, **tensors)
    assert_computes_the_same(module, params, oracle(module, file))
    imported = interop.read(f"big_vision:{file}")
    assert_same(imported.params, params)
    assert imported.module.text.pooling == "last"
    assert any("opt/0/count" in note for note in imported.notes) == bool(prefix)


def test_reads_bfloat16_which_numpy_keeps_as_raw_bytes(tmp_path):
    module = pair()
    params = random_params(module)
    interop.write("big_vision", module, params, tmp_path)
    short = {key: x.astype(jax.numpy.bfloat16) for key, x in weights(tmp_path).items()}
    np.savez(tmp_path / "model.npz", **short)
    assert weights(tmp_path)["params/t"].dtype == np.dtype("V2")
    imported = interop.read(f"big_vision:{tmp_path}")
    expected = {path: x.astype(jax.numpy.bfloat16) for path, x in params.items()}
    assert_same(imported.params, {k: x.astype(np.float32) for k, x in expected.items()})


@pytest.mark.parametrize("pooling", ["cls", "mean", "map"])
def test_an_image_model_alone(pooling, tmp_path):
    class_token = pooling == "cls"
    module = vit(42, 14, pooling=pooling, class_token=class_token, class_position=not class_token)
    params = random_params(module)
    interop.write("big_vision", module, params, tmp_path)
    tensors = weights(tmp_path)
    file = tmp_path / "classifier.npz"
    classifier = {"params/head/kernel": np.ones((32, 5)), "params/head/bias": np.ones(5)}
    np.savez(file, **tensors, **classifier)
    imported = interop.read(f"big_vision:{file}")
    assert imported.module == module
    assert_same(imported.params, params)
    assert any("head/bias, head/kernel" in note for note in imported.notes)

    # The oracle takes a pair: the tower becomes its image half.
    both = pair(
        image=dict(
            size=42, patch=14, pooling=pooling, class_token=class_token, class_position=False
        )
    )
    interop.write("big_vision", both, random_params(both), tmp_path / "pair")
    joined = weights(tmp_path / "pair")
    joined |= {key.replace("params/", "params/img/"): x for key, x in tensors.items()}
    np.savez(tmp_path / "joined.npz", **joined)
    image = images(42)
    theirs = oracle(both, tmp_path / "joined.npz").encode_image(pixels(image, HALF, HALF))
    ours = features(imported.module, imported.params, image, HALF, HALF)
    assert_close(ours, theirs, "big_vision image model")


def test_names_of_early_checkpoints(tmp_path):
    """A row of the class token in the positions, other numbers in names, the head inlined."""
    module = vit(pooling="cls", class_position=False)
    params = random_params(module)
    interop.write("big_vision", module, params, tmp_path)
    tensors = {key.removeprefix("params/"): x for key, x in weights(tmp_path).items()}
    row = np.random.default_rng(5).normal(size=(1, 1, 32)).astype(np.float32)
    old = {}
    for key, x in tensors.items():
        if "encoderblock" in key:
            key = key.replace("LayerNorm_1", "LayerNorm_2").replace("MlpBlock_0", "MlpBlock_3")
            key = key.replace("Attention_0", "Attention_1")
        old[key] = x
    table = np.concatenate([row, old.pop("pos_embedding")], axis=1)
    old["cls"] = old["cls"] - row
    for name in ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding"):
        np.savez(tmp_path / "old.npz", **old, **{name: table})
        imported = interop.read(f"big_vision:{tmp_path / 'old.npz'}")
        assert imported.module == module
        np.testing.assert_allclose(
            imported.params.pop("image/class_token"), params["image/class_token"], atol=1e-6
        )
        assert_same(imported.params, {k: x for k, x in params.items() if "class" not in k})

    pooled = vit(pooling="map", class_token=False)
    params = random_params(pooled)
    interop.write("big_vision", pooled, params, tmp_path)
    tensors = {
        key.replace("params/MAPHead_0/", "params/"): x for key, x in weights(tmp_path).items()
    }
    np.savez(tmp_path / "old.npz", **tensors)
    assert_same(interop.read(f"big_vision:{tmp_path / 'old.npz'}").params, params)


def test_text_positions_that_were_added_twice(tmp_path):
    module = pair()
    params = random_params(module)
    interop.write("big_vision", module, params, tmp_path)
    tensors = weights(tmp_path)
    tensors["params/txt/Encoder_0/pos_embedding"] = np.ones_like(
        tensors["params/txt/pos_embedding"]
    )
    np.savez(tmp_path / "model.npz", **tensors)
    expected = {**params, "text/position_embedding": params["text/position_embedding"] + 1}
    assert_same(interop.read(f"big_vision:{tmp_path}").params, expected)


class MlpBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(self.width)(x))
        return nn.Dense(x.shape[-1])(hidden)


class MAPHead(nn.Module):
    """Attention pooling of Flax's own layers, which give its parameters their names."""

    heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.normal(), (1, 1, x.shape[-1]))
        probe = np.ones((len(x), 1, 1), np.float32) * probe
        x = nn.MultiHeadDotProductAttention(self.heads)(probe, x)
        return (x + MlpBlock(self.mlp_dim)(nn.LayerNorm()(x)))[:, 0]


def test_texts_pooled_by_attention(tmp_path):
    module = pair(text=dict(pooling="map"), text_head="none")
    module = module.clone(text=changed(module.text, width=32, heads=4))
    params = random_params(module)
    interop.write("big_vision", module, params, tmp_path)
    imported = interop.read(f"big_vision:{tmp_path}", like=module)
    assert_same(imported.params, params)
    assert imported.module.text == module.text and imported.module.text_head == "none"

    ids = token_ids(41, 9, 2)
    tree = {"params": interop.to_tree(module, params)["text"]}
    _, seen = module.text.apply(
        tree, ids, capture_intermediates=lambda m, _: m.name == "encoder", mutable="intermediates"
    )
    tokens = seen["intermediates"]["encoder"]["__call__"][0]
    head = flax.traverse_util.unflatten_dict(
        {
            key.removeprefix("params/txt/MAPHead_0/"): x
            for key, x in weights(tmp_path).items()
            if "txt/MAPHead_0/" in key
        },
        sep="/",
    )
    theirs = MAPHead(4, module.text.transformer.mlp_dim).apply({"params": head}, tokens)
    ours = applied(module.text, tree, ids)
    assert_close(ours, np.asarray(theirs), "big_vision text MAPHead")


def test_a_grid_that_cannot_be_told(tmp_path):
    module = pair(image=dict(size=(24, 40)))
    params = random_params(module)
    interop.write("big_vision", module, params, tmp_path)
    with pytest.raises(UserError, match="15 positions are no square grid"):
        interop.read(f"big_vision:{tmp_path}")
    imported = interop.read(f"big_vision:{tmp_path}", like=module)
    assert imported.module.image.grid == (3, 5)
    assert_computes_the_same(module, imported.params, oracle(module, tmp_path / "model.npz"))


def test_what_big_vision_cannot_express_is_all_said(tmp_path):
    module = siglip(
        image=dict(activation="gelu", registers=1, class_token=True),
        text=dict(causal=True, pooling="mean", norm_eps=1e-5),
    )
    with pytest.raises(UserError) as error:
        interop.write("big_vision", module, random_params(module), tmp_path)
    for reason in (
        "image.activation 'gelu_tanh', not 'gelu'",
        "image.registers 0, not 1",
        "image.class_token False, not True",
        "text.causal False, not True",
        "text.pooling 'last' or 'map', not 'mean'",
        "text.norm_eps 1e-06, not 1e-05",
        "takes pixels in [-1, 1]",
    ):
        assert reason in str(error.value)
