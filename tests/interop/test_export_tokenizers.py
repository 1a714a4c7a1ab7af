"""Runs with CLIP's tokenizer and with SentencePiece: what others read of a text afterwards."""

import corpus
import numpy as np
import open_clip
import pytest
import runs
import transformers
from foreign import some

from vlp_jax import export
from vlp_jax.data.tokenizers import build_tokenizer
from vlp_jax.training import workdir as workdir_lib

SQUASH = {"decode_image": {}, "resize": {"size": 24}}
TEXTS = list(corpus.captions(("mojibake", "control")))[:300]


def export_run(tokenizer, preprocess, objective, format, folder):
    """Writes a run and exports it; returns the tokenizer that the run has kept."""
    config = runs.run_config(objective, tokenizer, preprocess)
    runs.write_run(config, folder / "run")
    arguments = (
        "--workdir",
        folder / "run",
        "--format",
        format,
        "--output",
        folder / "out",
        "--no-verify",
    )
    assert export.main([str(argument) for argument in arguments]) == 0
    return workdir_lib.open_kept_tokenizer(folder / "run", config)


@pytest.mark.parametrize("format", some(["hf", "open_clip"], "open_clip"))
def test_a_run_with_clips_tokenizer(format, tmp_path, capsys):
    section = {"name": "clip", "context_length": 12}
    ours = export_run(section, SQUASH, runs.CLIP, format, tmp_path)
    assert "repairs text that was decoded wrongly" in capsys.readouterr().out
    if format == "open_clip":
        # It cleans as its own tokenizer does before it reads ours: nothing is left out.
        texts = list(corpus.captions())
        theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")(texts).numpy()
        np.testing.assert_array_equal(theirs, ours(texts))
        published = open_clip.get_tokenizer("ViT-B-32", context_length=12)(texts).numpy()
        np.testing.assert_array_equal(theirs, published)
        return
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = theirs(TEXTS, padding="max_length", truncation=True)["input_ids"]
    np.testing.assert_array_equal(np.array(rows), ours(TEXTS))


@pytest.mark.parametrize("pad", some([None, "eos"], "eos"))
@pytest.mark.parametrize("name", ["t5", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_run_with_sentencepiece(name, pad, tmp_path):
    file = tmp_path / "spiece.model"
    file.write_bytes(corpus.sentencepiece_model(**corpus.MODELS[name]))
    section = {"name": "sentencepiece", "context_length": 20, "file": str(file), "pad": pad}
    preprocess = {"lowercase": {}, **SQUASH}
    ours = export_run(section, preprocess, runs.SIGLIP, "hf_siglip", tmp_path)
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    rows = theirs(TEXTS, padding="max_length", truncation=True)["input_ids"]
    np.testing.assert_array_equal(np.array(rows), ours([text.lower() for text in TEXTS]))
    assert theirs.unk_token == "<unk>" and theirs.eos_token == "</s>"
    assert theirs.pad_token_id == ours.pad_id == (ours.eos_id if pad or name == "llama" else 0)
    assert theirs("</s>")["input_ids"].count(theirs.eos_token_id) == 1


def test_what_is_done_to_texts_before_the_tokenizer_is_said(tmp_path, capsys):
    preprocess = {"clean_text": {}, "canonicalize_text": {}, **SQUASH}
    ours = export_run(runs.SUBWORD, preprocess, runs.CLIP, "hf", tmp_path)
    out = capsys.readouterr().out
    assert "went through clean_text" in out and "canonicalize_text" not in out
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    # Their pipelines ask about "This is a photo of ...": what training left out goes there too.
    assert theirs("A_Red, Box.")["input_ids"] == theirs("a red box")["input_ids"]
    assert ours.vocab_size == build_tokenizer(runs.SUBWORD, lambda: runs.CAPTIONS, None).vocab_size
