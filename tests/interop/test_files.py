"""Files that can be read, and those that are refused: damaged, pickled, of another model."""

import json
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from foreign import assert_same, clip, random_params, siglip, vit

from vlp_jax import interop
from vlp_jax.errors import UserError
from vlp_jax.interop import files
from vlp_jax.models.values import Pixels


@pytest.fixture
def folder(tmp_path):
    interop.write("hf_clip", clip(), random_params(clip()), tmp_path)
    return tmp_path


def refused(spec, like=None):
    """The one line of the error with which something is refused."""
    with pytest.raises(UserError) as error:
        interop.read(str(spec), like)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 9, 300, -1])
def test_truncated_safetensors(keep, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(f"hf_clip:{folder}")
    assert str(file) in message
    assert "truncated or corrupt" in message or "damaged" in message


def test_a_header_that_is_no_json(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[20:40] = b"x" * 20
    file.write_bytes(content)
    assert "truncated or corrupt" in refused(f"hf_clip:{folder}")


class Trap:
    """What a pickle may do: make a file while it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
@pytest.mark.parametrize("kind", ["zip", "old", "plain"])
def test_pickles_are_refused_and_never_loaded(name, kind, folder):
    (folder / "model.safetensors").unlink()
    sprung = folder / "sprung"
    content = {"weight": torch.ones(2), "trap": Trap(sprung)}
    if kind == "plain":
        (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    else:
        torch.save(content, folder / name, _use_new_zipfile_serialization=kind == "zip")
    for spec in (folder, folder / name):
        message = refused(f"hf_clip:{spec}")
        assert f"{folder / name} is a pickle" in message
        assert "weights_only=True" in message
    assert not sprung.exists()


def test_arrays_of_python_objects_are_refused(tmp_path):
    sprung = tmp_path / "sprung"
    file = tmp_path / "model.npz"
    np.savez(file, t=np.zeros(1), trap=np.array([Trap(sprung)], dtype=object))
    message = refused(f"big_vision:{file}")
    assert str(file) in message and "Python objects" in message
    assert not sprung.exists()


def test_a_truncated_npz(tmp_path):
    module = siglip().clone(pixels=Pixels())
    (file,) = interop.write("big_vision", module, random_params(module), tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated or corrupt" in refused(f"big_vision:{file}")


def test_what_is_not_there(folder, tmp_path):
    assert "nowhere does not exist" in refused(f"hf_clip:{folder / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    assert "holds no weights" in refused(f"timm:{tmp_path / 'empty'}")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config, "utf-8-sig")  # as Notepad saves it
    interop.read(f"hf_clip:{folder}")
    (folder / "config.json").write_text(config, "utf-16")
    assert "config.json is UTF-16, not UTF-8" in refused(f"hf_clip:{folder}")
    (folder / "config.json").rename(folder / "other.json")
    assert "needs its config.json" in refused(f"hf_clip:{folder}")
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in refused(f"hf_clip:{folder}")
    for name in ("a", "b"):
        (folder / "model.safetensors").with_stem(name).touch()
    (folder / "model.safetensors").unlink()
    assert "several files of weights (a.safetensors, b.safetensors)" in refused(f"timm:{folder}")
    assert "FORMAT:PATH" in refused("hf_clip")
    message = refused(f"hf_clop:{folder}")
    assert "'hf_clop'" in message and "did you mean 'hf_clip'?" in message


def test_everything_that_does_not_fit_is_named_with_its_shapes(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["text_model.final_layer_norm.bias"]
    tensors["vision_model.extra"] = np.zeros((2, 3), np.float32)
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"].T.copy()
    safetensors.numpy.save_file(tensors, file)
    message = refused(f"hf_clip:{folder}")
    assert str(file) in message
    assert "missing: text_model.final_layer_norm.bias [24]" in message
    assert "unexpected: vision_model.extra [2, 3]" in message
    assert "of another shape: visual_projection.weight [32, 20] instead of [20, 32]" in message


def test_of_many_names_the_first_eight_are_given(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    layer = {key: x for key, x in tensors.items() if ".layers.2." in key}
    assert len(layer) == 16
    kept = {key: x for key, x in tensors.items() if key not in layer}
    safetensors.numpy.save_file(kept, file)
    message = refused(f"hf_clip:{folder}")
    assert "text_model.encoder.layers.2.layer_norm1.bias [24]" in message
    assert "and 8 more" in message and message.count("layers.2.") == 8


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_becomes_float32(dtype, folder):
    file = folder / "model.safetensors"
    short = {k: x.astype(dtype) for k, x in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(short, file)
    params = interop.read(f"hf_clip:{folder}").params
    expected = {k: x.astype(dtype).astype(np.float32) for k, x in random_params(clip()).items()}
    assert_same(params, expected)


def test_shards(folder):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    file.unlink()
    keys = sorted(tensors)
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(keys)}
    for name in sorted(set(names.values())):
        part = {key: tensors[key] for key in keys if names[key] == name}
        safetensors.numpy.save_file(part, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert_same(interop.read(f"hf_clip:{folder}").params, random_params(clip()))

    index.write_text(json.dumps({"weight_map": {**names, "more": names[keys[0]]}}))
    assert "says that more is in" in refused(f"hf_clip:{folder}")
    (folder / names[keys[0]]).unlink()
    assert f"{names[keys[0]]} does not exist" in refused(f"hf_clip:{folder}")


def test_views_are_written_as_they_look(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T
    scalar = np.float32(3).reshape(())
    file = files.save_safetensors({"x": x, "scalar": scalar}, tmp_path / "x.safetensors")
    assert_same(files.load_tensors(file), {"x": np.ascontiguousarray(x), "scalar": scalar})
    with safetensors.safe_open(file, "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_extra_that_no_format_has(tmp_path):
    with pytest.raises(UserError, match="did you mean 'interpolation'?"):
        interop.write("timm", vit(), random_params(vit()), tmp_path, interpolatin="bicubic")
    with pytest.raises(UserError, match="resize='pad' must be squash or crop"):
        interop.write("timm", vit(), random_params(vit()), tmp_path, resize="pad")


def test_heads_that_do_not_fit(tmp_path):
    interop.write("timm", vit(), random_params(vit()), tmp_path)
    (tmp_path / "config.json").unlink()
    message = refused(f"timm:{tmp_path}", like=vit(width=30, heads=5))
    assert "5 heads do not divide the width 32" in message
