"""A run keeps its tokenizer, whatever its kind, and resumes with the one it has kept."""

import base64
import importlib.util
import json

import corpus
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.errors import UserError
from vlp_jax.objectives import make_objective
from vlp_jax.training import workdir as workdir_lib

TEXTS = list(corpus.captions()[8:60])
NAMES = ("bytes", "subword", "clip", "sentencepiece")


def config_of(name, folder, **more):
    config = config_lib.base()
    config.data = ConfigDict({"source": "arrays", "arrays": {"text": TEXTS}})
    config.tokenizer = ConfigDict({"name": name, "context_length": 20, **more})
    if name == "subword":
        config.tokenizer.vocab_size = 300
    if name == "sentencepiece":
        (folder / "spiece.model").write_bytes(corpus.sentencepiece_model())
        config.tokenizer.file = str(folder / "spiece.model")
    return config


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumes_with_the_tokenizer_it_has_kept(name, tmp_path, monkeypatch):
    config, workdir = config_of(name, tmp_path), epath.Path(tmp_path / "run")
    first = workdir_lib.open_tokenizer(workdir, config)
    assert not workdir.exists()
    workdir_lib.prepare(workdir, config, first)
    content = (workdir / "tokenizer.json").read_text()
    # Neither the data, the file nor open_clip is needed any more.
    config.data = ConfigDict()
    (tmp_path / "spiece.model").unlink(missing_ok=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for open_tokenizer in (workdir_lib.open_tokenizer, workdir_lib.open_kept_tokenizer):
        kept = open_tokenizer(workdir, config)
        np.testing.assert_array_equal(kept(TEXTS), first(TEXTS))
        assert (kept.vocab_size, kept.pad_id) == (first.vocab_size, first.pad_id)
    kept.save(tmp_path / "again.json")  # what init_from compares
    assert (tmp_path / "again.json").read_text() == content


@pytest.mark.parametrize("name", NAMES)
def test_another_kind_of_tokenizer_than_the_run_began_with(name, tmp_path):
    config, workdir = config_of(name, tmp_path), epath.Path(tmp_path / "run")
    workdir_lib.prepare(workdir, config, workdir_lib.open_tokenizer(workdir, config))
    for other in NAMES:
        if other != name:
            with pytest.raises(UserError, match=f"set config.tokenizer.name to {name!r}"):
                workdir_lib.open_tokenizer(workdir, config_of(other, tmp_path))


def test_the_model_file_can_be_taken_out_of_a_run(tmp_path):
    config, workdir = config_of("sentencepiece", tmp_path), epath.Path(tmp_path / "run")
    workdir_lib.prepare(workdir, config, workdir_lib.open_tokenizer(workdir, config))
    note = json.loads((workdir / "tokenizer.json").read_text())
    assert base64.b64decode(note["model"]) == corpus.sentencepiece_model()


def test_padding_with_eos_survives(tmp_path):
    config = config_of("sentencepiece", tmp_path, pad="eos")
    workdir = epath.Path(tmp_path / "run")
    workdir_lib.prepare(workdir, config, workdir_lib.open_tokenizer(workdir, config))
    assert workdir_lib.open_kept_tokenizer(workdir, config).pad_id == 1


def test_a_model_has_the_vocabulary_of_its_tokenizer_and_no_other(tmp_path):
    tokenizer = workdir_lib.open_tokenizer(tmp_path, config_of("sentencepiece", tmp_path))
    text = {"variant": "Ti", "width": 32, "depth": 1, "mlp_dim": 64, "heads": 2}
    image = {**text, "variant": "Ti/8", "image_size": 16}
    section = {"name": "contrastive", "embed_dim": 8, "image": image, "text": text}
    assert make_objective(section, tokenizer).model.text.vocab_size == tokenizer.vocab_size
    with pytest.raises(UserError, match="unknown key 'vocab_size' in config.objective.text"):
        make_objective({**section, "text": {**text, "vocab_size": 100}}, tokenizer)


def test_a_smoke_test_needs_none_of_the_files(tmp_path):
    for name in ("clip", "sentencepiece"):
        config = config_of(name, tmp_path)
        config.data = ConfigDict(
            {
                "source": "folder",
                "preprocess": {"choose_text": {"fields": {"a": 1, "b": 2}}, "clean_text": {}},
            }
        )
        small = smoke_lib.smoke(config)
        assert small.tokenizer.name == "subword" and small.tokenizer.file is None
        assert small.data.preprocess.to_dict() == {"choose_text": {}, "clean_text": {}}
