"""open_clip's CoCa, in both directions, against the library itself."""

import json

import jax
import numpy as np
import open_clip
import pytest
import runs
import safetensors.torch
import torch
from foreign import MEAN, STD, assert_close, assert_same, images, pixels, random_params, some, vit
from open_clip.coca_model import CoCa as TheirCoCa
from open_clip.loss import CoCaLoss

import vlp_jax
from vlp_jax import export, interop
from vlp_jax.errors import UserError
from vlp_jax.handover.artifacts import artifact_functions
from vlp_jax.interop.trees import to_tree
from vlp_jax.models.coca import CoCa, CoCaDecoder, CoCaText
from vlp_jax.models.values import Pixels, make_tower
from vlp_jax.objectives.base import Context
from vlp_jax.objectives.coca import coca_parts
from vlp_jax.objectives.weight import Weight

LENGTH, VOCAB, BATCH = 12, 99, 4
CONFIG = {
    "embed_dim": 32,
    "multimodal_cfg": dict(context_length=LENGTH, vocab_size=VOCAB, width=32, heads=4, layers=2),
    "text_cfg": dict(
        context_length=LENGTH,
        vocab_size=VOCAB,
        width=32,
        heads=4,
        layers=2,
        embed_cls=True,
        output_tokens=True,
    ),
    "vision_cfg": dict(
        layers=2,
        width=32,
        head_width=8,
        image_size=32,
        patch_size=8,
        attentional_pool=True,
        attn_pooler_queries=9,
        attn_pooler_heads=4,
        output_tokens=True,
    ),
}
CHANGES = {
    "one matrix in the pooler": {},
    "three matrices in the pooler": {"vision_cfg": dict(width=48, attn_pooler_heads=2)},
    "quick GELU, LayerScale, epsilons, padding 3, a bias of the logits": {
        "quick_gelu": True,
        "init_logit_bias": -3.0,
        "vision_cfg": dict(ls_init_value=0.1, norm_kwargs=dict(eps=1e-3), no_ln_pre=True),
        "text_cfg": dict(ls_init_value=0.1, norm_kwargs=dict(eps=1e-3), pad_id=3, layers=3),
        "multimodal_cfg": dict(ls_init_value=0.1, heads=2),
    },
    "tanh GELU in the towers": {
        "vision_cfg": dict(act_kwargs=dict(approximate="tanh"), mlp_ratio=2.5),
        "text_cfg": dict(act_kwargs=dict(approximate="tanh"), mlp_ratio=2.25),
    },
}


def config_with(changes):
    config = json.loads(json.dumps(CONFIG))
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return config


def their_model(config):
    """One of theirs, in which every parameter is drawn anew: some are memory that was not set."""
    model, rng = TheirCoCa(**config), np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        gain = name == "logit_scale" or (name.endswith("weight") and parameter.ndim == 1)
        drawn = rng.normal(float(gain), 0.2, tuple(parameter.shape)).astype(np.float32)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(drawn))
    return model.eval()


def save(model, config, folder):
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: x.contiguous() for key, x in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    content = {
        "model_cfg": {**config, "custom_text": True},
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(content))


def texts(pad=0, seed=3):
    """bos, words, eos and padding; the last is full."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, VOCAB - 2, (BATCH, LENGTH)).astype(np.int32)
    ids[:, 0] = VOCAB - 2
    for row, end in enumerate((2, 5, 8, LENGTH - 1)):
        ids[row, end], ids[row, end + 1 :] = VOCAB - 1, pad
    return ids


def ours(module, params, image, ids):
    def compute(model, image, ids):
        out, seen = model(image, ids), model.look(image)
        features = model.features(image, ids)
        return {**out, "logits": model.score(features), "again": model.score_tokens(ids, seen)}

    tree = {"params": to_tree(module, params)}
    run = jax.jit(lambda tree, *x: module.apply(tree, *x, method=compute))
    return jax.tree.map(np.asarray, run(tree, image, ids))


def theirs_of(model, image, ids):
    with torch.no_grad():
        return model(pixels(image), torch.from_numpy(ids).long())


def assert_computes_the_same(module, params, model, pad=0):
    image, ids = images(32, BATCH), texts(pad)
    mine, other = ours(module, params, image, ids), theirs_of(model, image, ids)
    assert_close(mine["image"], other["image_features"], "image_features")
    assert_close(mine["text"], other["text_features"], "text_features")
    assert_close(mine["logits"][:, :-1], other["logits"], "logits")
    assert_close(mine["again"][:, :-1], other["logits"], "logits of score_tokens")
    np.testing.assert_allclose(np.exp(mine["logit_scale"]), other["logit_scale"], rtol=1e-6)
    if "logit_bias" in other:
        np.testing.assert_allclose(mine["logit_bias"], other["logit_bias"])
    return mine, other


def assert_same_losses(module, params, model, pad=0):
    """Both losses, and their weighted sum, by the library's own class."""
    image, ids = images(32, BATCH), texts(pad)
    out = theirs_of(model, image, ids)
    out.pop("logit_bias", None)
    losses = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=pad)(**out)
    weights = {"contrast": Weight(1.0), "caption": Weight(2.0)}
    objective = coca_parts(module, **weights, max_logit_scale=0.0)
    tree, batch = to_tree(module, params), {"image": image, "text": ids}
    value, output = jax.jit(lambda p, b: objective.loss(p, b, Context(jax.random.key(0))))(
        tree, batch
    )
    found = {name: float(a / b) for name, (a, b) in output.metrics.items()}
    wanted = [float(loss) for loss in losses]
    mine = [found["contrast/loss"], 2 * found["caption/loss"]]
    print("losses", wanted, mine)
    np.testing.assert_allclose(mine, wanted, atol=1e-4)
    np.testing.assert_allclose(value, sum(wanted), atol=2e-4)


@pytest.mark.parametrize("name", some(CHANGES, *list(CHANGES)[::2]))
def test_reads_theirs_and_writes_it_again(name, tmp_path):
    config = config_with(CHANGES[name])
    model, pad = their_model(config), config["text_cfg"].get("pad_id", 0)
    save(model, config, tmp_path / "theirs")
    imported = interop.read(f"open_clip:{tmp_path / 'theirs'}")
    module, params = imported.module, imported.params
    assert isinstance(module, CoCa) and module.queries == 9
    assert any("the token that captions begin with: 97" in note for note in imported.notes)
    assert_computes_the_same(module, params, model, pad)
    if "init_logit_bias" not in config:  # which CoCaLoss leaves out
        assert_same_losses(module, params, model, pad)

    written = tmp_path / "again"
    interop.write("open_clip", module, params, written)
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{written}")
    assert isinstance(again, TheirCoCa) and again.pad_id == pad
    assert_same(
        {key: x.numpy() for key, x in again.state_dict().items()},
        {key: x.numpy() for key, x in model.state_dict().items()},
    )
    before, after = (theirs_of(x.eval(), images(32, BATCH), texts(pad)) for x in (model, again))
    for key in ("image_features", "text_features", "logits"):
        assert torch.equal(before[key], after[key])


def small(embed_dim=32, decoder=None, text=None, image=None, **fields):
    """A model of ours."""
    sizes = dict(width=32, depth=2, heads=4, vocab_size=VOCAB, context_length=LENGTH)
    layers = dict(activation="gelu", norm_eps=1e-5)
    fields = {"queries": 5, "pooler_heads": 2, "pixels": Pixels(MEAN, STD), **fields}
    own = {**layers, "pooling": "none", "norm_after_pool": True, "patch_bias": False}
    ids = dict(bos_id=97, eos_id=98, pad_id=0)
    return CoCa(
        vit(width=48, pre_norm=True, **{**own, **(image or {})}),
        make_tower(CoCaText, **{**sizes, **layers, **ids, "mlp_dim": 72, **(text or {})}),
        make_tower(CoCaDecoder, **{**sizes, **layers, "mlp_dim": 128, **(decoder or {})}),
        embed_dim,
        2.6,
        **fields,
    )


def test_writes_ours(tmp_path):
    module = small(text={"depth": 3, "heads": 2}, queries=2)
    params = random_params(module)
    interop.write("open_clip", module, params, tmp_path, bos_id=97, eos_id=98, pad_id=0)
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    assert_computes_the_same(module, params, model)
    imported = interop.read(f"open_clip:{tmp_path}")
    assert_same(imported.params, params)
    assert not interop.differences(imported.module, module)
    (tmp_path / "open_clip_config.json").unlink()
    again = interop.read(f"open_clip:{tmp_path}", like=module)
    assert_same(again.params, params)
    assert not interop.differences(again.module, module)


def test_compiled_programs_embed_as_the_model_does():
    module = small()
    params = random_params(module)
    image, ids = images(32, BATCH), texts()
    mine = ours(module, params, image, ids)
    found = {
        function.name: jax.jit(function.call)(function.weights, inputs)
        for function, inputs in zip(
            artifact_functions(module, params, interop.Extras()), (image, ids), strict=True
        )
    }
    assert_close(found["embed_image"], mine["image"])
    assert_close(found["embed_text"], mine["text"])


def test_our_own_format_holds_it(tmp_path):
    module = small(text={"bos_id": 7})
    params = random_params(module)
    interop.write("safetensors", module, params, tmp_path)
    imported = interop.read(f"safetensors:{tmp_path}")
    assert_same(imported.params, params)
    assert not interop.differences(imported.module, module)
    assert imported.module.text.bos_id == 7


def test_loaded_it_embeds_and_says_captions(tmp_path):
    from vlp_jax.data.tokenizers import build_tokenizer
    from vlp_jax.interop.hf_tokenizer import TokenizerFiles

    words = [f"a {c} {s}" for c in ("red", "blue") for s in ("ring", "box")] * 9
    section = {"name": "subword", "vocab_size": 280, "context_length": LENGTH}
    tokenizer = build_tokenizer(section, lambda: words, None)
    ids = {name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "pad_id")}
    sizes = {"vocab_size": tokenizer.vocab_size}
    module = small(text={**sizes, **ids}, decoder=sizes)
    files = TokenizerFiles.from_json(tokenizer.to_json(False, False), context_length=LENGTH, **ids)
    params = random_params(module)
    interop.write("open_clip", module, params, tmp_path, tokenizer=files, **ids)
    loaded = vlp_jax.load(f"open_clip:{tmp_path}")
    assert loaded.module.text.bos_id == tokenizer.bos_id
    model, image = open_clip.create_model(f"local-dir:{tmp_path}").eval(), images(32, BATCH)
    rows = tokenizer(words[:4])
    out = theirs_of(model, image, rows)
    assert_close(loaded.embed_image(image), out["image_features"], "images")
    assert_close(loaded.embed_text(words[:4]), out["text_features"], "texts")
    logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T
    np.testing.assert_allclose(loaded.logits(image, words[:4]), logits.detach(), atol=1e-3)

    # The best token each time, by the library's forward pass over the whole text so far.
    said = torch.full((BATCH, 1), tokenizer.bos_id)
    with torch.no_grad():
        for _ in range(LENGTH - 1):
            scores = model(pixels(image), said, output_labels=False)["logits"][:, -1]
            said = torch.cat([said, scores.argmax(-1, keepdim=True)], dim=1)
    wanted = tokenizer.decode(said[:, 1:].numpy())
    captions = loaded.caption(image)
    print(captions)
    assert captions == wanted and any(captions)


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_run_is_loaded_and_exported(scan_layers, tmp_path):
    sizes = {**runs.SIZES, "activation": "gelu", "norm_eps": 1e-5}
    image = {"variant": "Ti/8", "image_size": 24, "patch_bias": False, "pre_norm": True}
    section = {
        "name": "coca",
        "image": {**image, **sizes},
        "text": {"variant": "Ti", **sizes},
        "decoder": {"variant": "Ti", **sizes, "mlp_dim": 128},
        "embed_dim": 32,
        "queries": 4,
        "scan_layers": scan_layers,
    }
    preprocess = {"decode_image": {}, "resize": {"size": 24}}
    runs.write_run(runs.run_config(section, runs.SUBWORD, preprocess), tmp_path / "run")
    run = vlp_jax.load(tmp_path / "run")
    proof = [] if scan_layers else ["--no-verify"]  # once in a process of its own, as a user's
    command = ["--workdir", tmp_path / "run", "--format", "open_clip", "--output", tmp_path / "out"]
    assert export.main([*map(str, command), *proof]) == 0
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    image, words = images(24, BATCH), ["A red box", "on the left", "Blue circle", "floor"]
    with torch.no_grad():
        x = pixels(image, (0.5,) * 3, (0.5,) * 3)
        out = model.eval()(x, tokenizer(words))
    assert_close(run.embed_image(image), out["image_features"], "a run's images")
    assert_close(run.embed_text(words), out["text_features"], "a run's texts")
    again = vlp_jax.load(f"open_clip:{tmp_path / 'out'}")
    assert again.caption(image) == run.caption(image)
    assert run.caption(image, beams=2, length=5) == again.caption(image, beams=2, length=5)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vision_cfg", {"attentional_pool": "cascade"}, "attentional_pool 'cascade' cannot"),
        ("vision_cfg", {"attentional_pool": "parallel"}, "attentional_pool 'parallel' cannot"),
        ("vision_cfg", {"attentional_pool": False}, "attentional_pool False cannot"),
        ("vision_cfg", {"pool_type": "avg"}, "pool_type 'avg' cannot"),
        ("vision_cfg", {"attn_pooler_heads": 5}, "5 pooler_heads do not divide"),
        ("text_cfg", {"embed_cls": False}, "embed_cls False cannot"),
        ("text_cfg", {"no_causal_mask": True}, "no_causal_mask True cannot"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "hf_model_name 'roberta-base' cannot"),
        ("text_cfg", {"proj_bias": True}, "proj_bias True cannot"),
        ("multimodal_cfg", {"context_length": 77}, "context_length 77 is not text_cfg"),
        ("multimodal_cfg", {"heads": 0}, "heads is 0, not a positive"),
    ],
)
def test_configs_that_cannot_be_read(section, change, message, tmp_path):
    module = small()
    interop.write("open_clip", module, random_params(module), tmp_path)
    file = tmp_path / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"][section].update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        interop.read(f"open_clip:{tmp_path}")
    assert "\n" not in str(error.value)


def test_a_config_of_another_kind_of_model(tmp_path):
    module = small()
    interop.write("open_clip", module, random_params(module), tmp_path)
    file = tmp_path / "open_clip_config.json"
    config = json.loads(file.read_text())
    del config["model_cfg"]["vision_cfg"]["attentional_pool"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="needs vision_cfg.attentional_pool true"):
        interop.read(f"open_clip:{tmp_path}")
    del config["model_cfg"]["multimodal_cfg"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no multimodal_cfg, and the weights beside it"):
        interop.read(f"open_clip:{tmp_path}")
    file.unlink()
    with pytest.raises(UserError, match="needs its open_clip_config.json beside it"):
        interop.read(f"open_clip:{tmp_path}")


def test_what_cannot_be_written_is_all_said(tmp_path):
    module = small(
        embed_dim=16,
        image={"registers": 1},
        text={"activation": "quick_gelu"},
        decoder={"mlp_dim": 64, "norm_eps": 1e-6, "activation": "gelu_tanh"},
    )
    with pytest.raises(UserError) as error:
        interop.write("open_clip", module, random_params(module), tmp_path, pad_id=4)
    for reason in (
        "image.registers 0, not 1",
        "decoder.mlp_dim 128, not 64",
        "decoder.norm_eps 1e-05, not 1e-06",
        "decoder.activation 'gelu' or 'quick_gelu', not 'gelu_tanh'",
        "embed_dim 32, the decoder's width, not 16",
        "quick_gelu in all towers or in none",
        "pad_id 4 is not text.pad_id 0",
    ):
        assert reason in str(error.value)
    with pytest.raises(UserError, match="not a CoCa"):
        interop.write("hf_clip", module, random_params(module), tmp_path)
