"""Random models of ours and theirs, and what both compute."""

import jax
import numpy as np
import pytest
import torch

from vlp_jax import interop
from vlp_jax.interop.trees import expected_shapes
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder, MaskedDecoder
from vlp_jax.models.text import TextTransformer
from vlp_jax.models.values import Pixels, make_tower
from vlp_jax.models.vit import VisionTransformer

TOLERANCE = 1e-4
MEAN, STD = (0.48, 0.45, 0.41), (0.27, 0.26, 0.28)


def some(cases, *fast):
    """The names of cases for parametrize: those that are not in `fast` are slow."""
    assert set(fast) <= set(cases)
    return [x if x in fast else pytest.param(x, marks=pytest.mark.slow) for x in cases]


def random_params(module, seed=0):
    """Parameters of which none has a value, such as zero or one, that hides a mistake."""
    rng = np.random.default_rng(seed)
    return {
        path: _random(rng, shape, path.endswith("scale"), path.endswith("kernel"))
        for path, shape in sorted(expected_shapes(module).items())
    }


def randomize(model, seed=0):
    """The same for a model of theirs, in place."""
    rng = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        near_one = name == "logit_scale" or (name.endswith("weight") and parameter.ndim == 1)
        kernel = parameter.ndim >= 2 and "embedding" not in name
        parameter.copy_(torch.from_numpy(_random(rng, tuple(parameter.shape), near_one, kernel)))
    return model.eval()


def _random(rng, shape, near_one, kernel):
    x = rng.normal(size=shape)
    x = 1 + 0.3 * x if near_one else (0.25 if kernel else 0.4) * x
    return np.asarray(x, np.float32)


def images(size, batch=3, seed=1):
    """Random uint8 images of a height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), np.uint8)


def token_ids(vocab_size, length, eos_id, batch=3, seed=2):
    """Random ids that end at different places, with something else behind the end."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, vocab_size - 3, (batch, length)).astype(np.int32)
    ids[ids == eos_id] = 4
    for row, end in enumerate(rng.permutation(length - 3)[:batch] + 2):
        ids[row, end] = eos_id
        ids[row, end + 1 :: 2] = eos_id  # the first one counts
    return ids


def pixels(image, mean=MEAN, std=STD):
    """Theirs: normalized, channels first."""
    x = (image.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2), dtype=np.float32))


def applied(module, tree, *inputs, method=None):
    """What a module computes, compiled as one program: far faster than operation by operation."""
    return jax.jit(lambda tree, *x: module.apply(tree, *x, method=method))(tree, *inputs)


def embed(module, params, image, text):
    """Ours: features before and after normalization, and logits of every pair."""

    def compute(model, image, text):
        features = model.image(model.pixels.normalize(image))
        if model.image_head != "none":
            features = model.image_projection(features)
        words = model.text(text)
        if model.text_head != "none":
            words = model.text_projection(words)
        return features, words, model(image, text)

    tree = {"params": interop.to_tree(module, params)}
    run = jax.jit(lambda tree, *x: module.apply(tree, *x, method=compute))
    raw_image, raw_text, out = jax.tree.map(np.asarray, run(tree, image, text))
    logits = np.exp(out["logit_scale"]) * out["image"] @ out["text"].T + out["logit_bias"]
    return {
        "raw_image": raw_image,
        "raw_text": raw_text,
        "image": out["image"],
        "text": out["text"],
        "logits": logits,
    }


def features(module, params, image, mean=MEAN, std=STD):
    """Ours, of an image tower alone."""
    tree = {"params": interop.to_tree(module, params)}
    x = np.asarray(Pixels(mean, std).normalize(image))
    return np.asarray(jax.jit(module.apply)(tree, x))


def assert_close(ours, theirs, what=""):
    """Within the tolerance, and not because both are next to nothing or all rows alike."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    deviation = float(np.abs(ours - theirs).max())
    print(f"deviation {what} {deviation:.2e}")
    assert deviation <= TOLERANCE, (what, deviation)
    assert np.abs(theirs).max() > 1e-2 and np.std(theirs, axis=0).max() > 1e-3, what


def assert_same(a, b):
    """The same keys and the same bits."""
    assert sorted(a) == sorted(b)
    for key in a:
        x, y = np.asarray(a[key]), np.asarray(b[key])
        assert x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes(), key


def vit(size=32, patch=8, width=32, depth=2, heads=4, mlp_dim=80, **fields):
    """A small image tower of ours."""
    size = (size, size) if isinstance(size, int) else size
    sizes = {"width": width, "depth": depth, "mlp_dim": mlp_dim, "heads": heads}
    return make_tower(VisionTransformer, image_size=size, patch_size=patch, **sizes, **fields)


def text_tower(vocab=41, length=9, width=24, depth=3, heads=3, mlp_dim=56, **fields):
    """A small text tower of ours."""
    sizes = {"width": width, "depth": depth, "mlp_dim": mlp_dim, "heads": heads}
    sizes |= {"vocab_size": vocab, "context_length": length}
    return make_tower(TextTransformer, **sizes, **fields)


def clip(image=None, text=None, embed_dim=20, **fields):
    """A small model of ours as CLIP is."""
    image = {"activation": "quick_gelu", "norm_eps": 1e-5, **(image or {})}
    text = {"activation": "gelu", "norm_eps": 1e-5, "eos_id": 5, **(text or {})}
    return DualEncoder(
        vit(pre_norm=True, patch_bias=False, **image),
        text_tower(**text),
        embed_dim,
        logit_scale_init=2.6592,
        pixels=Pixels(MEAN, STD),
        **fields,
    )


def siglip(image=None, text=None, **fields):
    """A small model of ours as SigLIP is."""
    tower = vit(**{"pooling": "map", "class_token": False, **(image or {})})
    text = {"causal": False, "pooling": "last", **(text or {})}
    defaults = {"image_head": "none", "text_head": "linear_bias", "logit_bias_init": -10.0}
    return DualEncoder(
        tower,
        text_tower(**text),
        tower.width,
        logit_scale_init=2.3,
        **{**defaults, "pixels": Pixels(MEAN, STD), **fields},
    )


def masked_decoder(width, depth, mlp_dim, heads, grid=(4, 4), outputs=192, **fields):
    """A small decoder of ours."""
    sizes = {"width": width, "depth": depth, "mlp_dim": mlp_dim, "heads": heads}
    fields = {"activation": "gelu", **sizes, **fields}
    return make_tower(MaskedDecoder, grid=grid, class_token=True, outputs=outputs, **fields)


def autoencoder():
    """A small masked autoencoder of ours."""
    image = vit(pooling="none", position="sincos")
    return MaskedAutoencoder(image, masked_decoder(16, 1, 32, 2))
