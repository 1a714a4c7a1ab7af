"""Weights in fewer bits, beside PyTorch's."""

import numpy as np
import pytest
import torch
from foreign import autoencoder, clip, random_params, siglip

from vlp_jax.interop import precision


@pytest.mark.parametrize("model", [clip(), siglip(), autoencoder()], ids=["clip", "siglip", "mae"])
def test_int8_is_what_pytorch_makes_of_each_output(model):
    params = random_params(model)
    stored = precision.stored(params, "int8")
    kernels = [path for path in params if path.endswith("kernel")]
    assert kernels and all(stored[path].dtype == np.int8 for path in kernels)
    for path in kernels:
        x, scale = params[path], stored[path + precision.SCALE]
        outputs = outputs_of(path, x.shape)
        assert scale.size == np.prod([x.shape[i] for i in outputs]), path
        rows = np.moveaxis(x, outputs, range(len(outputs))).reshape(scale.size, -1)
        ours = np.moveaxis(stored[path], outputs, range(len(outputs))).reshape(scale.size, -1)
        largest = torch.from_numpy(rows).abs().amax(dim=1)
        np.testing.assert_allclose(scale.reshape(-1), largest.numpy() / 127, rtol=1e-6)
        theirs = torch.fake_quantize_per_channel_affine(
            torch.from_numpy(np.ascontiguousarray(rows)),
            torch.from_numpy(scale.reshape(-1).copy()),
            torch.zeros(scale.size, dtype=torch.int32),
            *(0, -127, 127),
        )
        # Where x / scale is all but a half the two may differ by one.
        apart = np.abs(ours - theirs.numpy() / scale.reshape(-1, 1))
        assert apart.max() < 1.01 and (apart < 0.01).mean() > 0.999, path
        assert np.abs(ours).max(axis=1).min() == 127  # every output uses the whole range
        assert np.abs(precision.restored(stored)[path] - x).max() <= 0.501 * scale.max()


def outputs_of(path, shape):
    """The axes of a kernel that are not summed over, by what the model does with it."""
    stacked = [0] if "/layers/" in path else []
    rest = list(range(len(stacked), len(shape)))
    name = path.split("/")[-2]
    if name in ("query", "key", "value"):
        return stacked + rest[-2:]
    return stacked + rest[-1:]


def test_what_is_no_matrix_stays_and_tables_of_tokens_have_a_scale_a_row():
    params = random_params(clip())
    stored = precision.stored(params, "int8")
    for path, x in params.items():
        if path.endswith("kernel"):
            continue
        if path == "text/token_embedding/embedding":
            assert stored[path].dtype == np.int8
            assert stored[path + precision.SCALE].shape == (x.shape[0], 1)
        else:
            assert stored[path].dtype == np.float32 and path + precision.SCALE not in stored
            np.testing.assert_array_equal(stored[path], x)


def test_each_layer_is_rounded_by_itself():
    """A scale of int8 is of one layer's weights alone."""
    params = {path: x for path, x in random_params(clip()).items() if "/layers/" in path}
    assert params
    for weights in ("bfloat16", "int8"):
        for path, x in precision.rounded(params, weights).items():
            for layer, own in enumerate(params[path]):
                alone = precision.rounded({path.replace("/layers/", "/layer/"): own}, weights)
                np.testing.assert_array_equal(x[layer], *alone.values())


def test_bfloat16_is_pytorchs_and_single_numbers_stay():
    params = random_params(clip())
    rounded = precision.rounded(params, "bfloat16")
    for path, x in params.items():
        expected = torch.from_numpy(np.array(x)).bfloat16().float().numpy() if x.ndim else x
        np.testing.assert_array_equal(rounded[path], expected)


def test_a_row_of_zeros_stays_zero():
    quantized, scale = precision.quantize(np.zeros((3, 2), np.float32), (-2,))
    assert not quantized.any() and np.all(scale == 1)


def test_narrowed_keeps_what_bfloat16_cannot_hold():
    exact = np.asarray([[1.5, -0.25]], np.float32)
    sines = np.sin(np.arange(6, dtype=np.float32)).reshape(2, 3)
    ids = np.arange(3)
    narrow = precision.narrowed({"exact": exact, "sines": sines, "ids": ids})
    assert narrow["exact"].dtype.itemsize == 2
    np.testing.assert_array_equal(narrow["exact"].astype(np.float32), exact)
    assert narrow["sines"] is sines and narrow["ids"] is ids
