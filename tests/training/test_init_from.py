"""A run that starts from other weights: what is loaded, what is refused, what is told."""

import sys
import types

import helpers
import jax
import numpy as np
import pytest

from vlp_jax import config as config_lib
from vlp_jax.errors import UserError
from vlp_jax.parallel.batch import put_batch
from vlp_jax.training import param_groups
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.init_from import Start, make_start
from vlp_jax.training.matching import Source, match

UP = "image/encoder/layers/mlp/up/kernel"
ALL = ((".*", "load"),)


def setup_from(source=None, rules=ALL, step=None, mesh=None, optimizer=(), **objective):
    config = helpers.tiny_config(**objective)
    config.init_from.update({"source": source and str(source), "step": step, "rules": rules})
    for key, value in dict(optimizer).items():
        config.optimizer[key] = value
    return helpers.setup_on(config, mesh or {"replica": 1}, 8 if mesh else 1)


def start_of(setup, workdir):
    return make_start(setup, workdir, helpers.TOKENIZER)


def flat(tree):
    return param_groups.flatten(jax.device_get(tree))


def save(workdir, state, step):
    with Checkpointer(workdir, keep_last=9) as checkpointer:
        checkpointer.save(step, state, input_state={"position": step})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints of steps 1 and 3: (workdir, parameters of step 3)."""
    workdir = tmp_path_factory.mktemp("run")
    setup = helpers.setup_on(helpers.tiny_config(), {"replica": 2, "fsdp": 4})
    state = helpers.fresh(setup)
    save(workdir, state, 1)
    shifted = state.replace(params=jax.tree.map(lambda x: x + 0.25, state.params))
    save(workdir, shifted, 3)
    return workdir, flat(shifted.params)


def assert_same(ours, expected):
    assert set(ours) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)


# What is loaded.


@pytest.mark.parametrize(
    "mesh", [pytest.param(None, marks=pytest.mark.slow), {"replica": 2, "fsdp": 2, "tensor": 2}]
)
def test_the_same_model_gets_the_same_numbers_where_they_belong(run, tmp_path, mesh):
    workdir, params = run
    setup = setup_from(workdir, mesh=mesh, optimizer={"ema_decay": 0.9})
    state = start_of(setup, tmp_path).state(setup)
    assert_same(flat(state.params), params)
    assert_same(flat(state.ema), params)
    assert int(state.step) == 0
    assert jax.tree.structure(state) == jax.tree.structure(setup.abstract)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(setup.abstract), strict=True):
        assert leaf.sharding == wanted.sharding and leaf.dtype == wanted.dtype
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(state.opt_state),
        jax.device_get(helpers.fresh(setup).opt_state),
    )


def test_the_step_that_takes_over_the_memory_trains_as_from_any_other_state(run, tmp_path):
    setup = setup_from(run[0], optimizer={"ema_decay": 0.9})
    state = start_of(setup, tmp_path).state(setup)
    with Checkpointer(tmp_path / "copy") as checkpointer:
        checkpointer.save(1, state, input_state={"position": 0})
        checkpointer.wait()
        other = checkpointer.restore(setup.abstract, 1)
    step = helpers.compiled(setup)
    for batch in helpers.batches(3):
        state, other = (step(s, put_batch(batch, setup.mesh))[0] for s in (state, other))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(other))


def test_a_checkpoint_can_be_chosen(run, tmp_path):
    workdir, params = run
    setup = setup_from(workdir, step=1)
    state = start_of(setup, tmp_path).state(setup)
    np.testing.assert_allclose(flat(state.params)[UP], params[UP] - 0.25, atol=1e-6)


def test_the_average_is_preferred(run, tmp_path):
    setup = setup_from(optimizer={"ema_decay": 0.9})
    state = helpers.fresh(setup)
    state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    save(tmp_path, state, 1)
    plain = setup_from(tmp_path)
    start = start_of(plain, tmp_path / "new")
    assert_same(flat(start.state(plain).params), flat(state.ema))
    assert "ema of step 1" in start.report()


def test_one_tower_by_rules_and_the_other_from_the_seed(run, tmp_path):
    workdir, params = run
    setup = setup_from(
        workdir, rules=(("image/.*", "load"), (".*", "fresh")), optimizer={"ema_decay": 0.9}
    )
    state = start_of(setup, tmp_path).state(setup)
    seed = flat(helpers.fresh(setup).params)
    for tree in (flat(state.params), flat(state.ema)):
        for path, value in tree.items():
            expected = params if path.startswith("image/") else seed
            np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_the_first_rule_that_fits_decides(run, tmp_path):
    rules = ((".*/bias", "skip"), ("image/.*", "load"), ("image/pooling/probe", "fresh"), ALL[0])
    fates = {f.path: str(f) for f in start_of(setup_from(run[0], rules), tmp_path).fates}
    assert fates["image/encoder/norm/bias"] == "fresh" and fates[UP] == "loaded"
    assert fates["image/pooling/probe"] == "loaded"


def test_a_run_that_started_from_another_can_be_started_from(run, tmp_path):
    workdir, params = run
    first = setup_from(workdir)
    state = start_of(first, tmp_path / "a").state(first)
    save(tmp_path / "a", state, 1)
    second = setup_from(tmp_path / "a")
    assert_same(flat(start_of(second, tmp_path / "b").state(second).params), params)


def test_a_run_that_resumes_looks_at_no_other_weights(run, tmp_path):
    save(tmp_path, helpers.fresh(setup_from()), 1)
    assert start_of(setup_from("/no/such/folder", rules=((")", "x"),)), tmp_path) == Start()
    assert start_of(setup_from(), tmp_path / "new") == Start()


# What is refused.


def refused(setup, workdir):
    with pytest.raises(UserError) as error:
        start_of(setup, workdir)
    assert "\n" not in str(error.value) and not (workdir / "init_from.txt").exists()
    return str(error.value)


def test_parameters_that_are_missing_too_many_or_of_another_shape(run, tmp_path):
    message = refused(setup_from(run[0], loss="sigmoid"), tmp_path)
    assert "logit_bias is absent in the source and () in the model" in message
    assert "begin config.init_from.rules with ('logit_bias', 'fresh')" in message

    message = refused(setup_from(run[0], embed_dim=24), tmp_path)
    assert "image_projection/kernel is (32, 16) in the source and (32, 24) in the model" in message
    assert "text_projection/kernel is (32, 16)" in message
    assert "with ('image_projection/kernel|text_projection/kernel', 'fresh')" in message

    image = {**helpers.tiny_config().objective.image.to_dict(), "pooling": "mean"}
    message = refused(setup_from(run[0], image=image), tmp_path)
    assert "fit the model: 15 of " in message and "such as image/pooling/" in message
    assert message.count(" in the source and ") == 1 and "parameters, such as" in message
    assert "begin config.init_from.rules with ('image/pooling/.*', 'skip')" in message


def test_the_mended_rules_do(run, tmp_path):
    setup = setup_from(run[0], (("logit_bias", "fresh"), *ALL), loss="sigmoid")
    assert float(start_of(setup, tmp_path).state(setup).params["logit_bias"]) == -10
    image = {**helpers.tiny_config().objective.image.to_dict(), "pooling": "mean"}
    setup = setup_from(run[0], (("image/pooling/.*", "skip"), *ALL), image=image)
    start = start_of(setup, tmp_path)
    assert sum(fate.kind == "skipped" for fate in start.fates) == 15
    start.state(setup)


@pytest.mark.parametrize(
    ("source", "step", "message"),
    [
        ("/no/such/run", None, "the folder /no/such/run does not exist"),
        ("/", None, "/ holds no checkpoint"),
        ("RUN", 2, r"has no checkpoint of step 2 \(it has: 1, 3\)"),
        ("foo:BAR", None, "unknown key 'foo'.*hf:DIR.*open_clip:FILE.*big_vision:.*timm:FILE"),
        ("hff:BAR", None, "did you mean 'hf'"),
        ("hf:DIR", 3, "step is of a workdir's checkpoints, not of hf:DIR"),
        (None, 3, "step is set and config.init_from.source is not"),
    ],
)
def test_sources_that_are_none(run, tmp_path, source, step, message):
    source = str(run[0]) if source == "RUN" else source
    with pytest.raises(UserError, match=message):
        start_of(setup_from(source, step=step), tmp_path)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("image/.*", "lod"),), "unknown key 'lod'.*did you mean 'load'"),
        (("image/.*", "load"), "'image/.*' is no pair"),
        ((("image/(", "load"),), "is no regular expression"),
        ((("imge/.*", "load"), *ALL), "'imge/.*' is the whole path of no .*there are image"),
        ((("image/.*", "load"),), r"end config.init_from.rules with \('\.\*', 'load'\)"),
        (((".*", "fresh"),), "load nothing from"),
    ],
)  # fmt: skip
def test_bad_rules(run, tmp_path, rules, message):
    with pytest.raises(UserError, match=message):
        start_of(setup_from(run[0], rules), tmp_path)


# Positions, and what is told.


def shapes_source(shapes, grids=()):
    return Source("somewhere", shapes, dict(grids), (), lambda: {})


POSITIONS, TEXT = "image/position_embedding", "text/position_embedding"


@pytest.mark.parametrize(
    ("rows", "grid", "new_rows", "new_grid", "fate"),
    [
        (4, None, 9, (3, 3), "resampled 2x2 -> 3x3"),
        (5, None, 10, (3, 3), "resampled 2x2 -> 3x3"),  # a class token in front of both
        (6, (2, 3), 9, (3, 3), "resampled 2x3 -> 3x3"),
        (16, (2, 8), 16, (4, 4), "resampled 2x8 -> 4x4"),  # of the same shape, and yet another
        (16, None, 16, (4, 4), "loaded"),
        (9, (3, 3), 9, (3, 3), "loaded"),
    ],
)
def test_positions_for_another_grid(rows, grid, new_rows, new_grid, fate):
    source = shapes_source({POSITIONS: (rows, 8)}, {POSITIONS: grid} if grid else {})
    (found,) = match({POSITIONS: (new_rows, 8)}, source, ALL, new_grid)
    assert str(found) == fate


@pytest.mark.parametrize(
    ("rows", "grid", "new_rows", "new_grid"),
    [(6, None, 9, (3, 3)), (5, (2, 2), 9, (3, 3)), (16, (3, 5), 16, (4, 4))],
)
def test_positions_that_cannot_be_resampled(rows, grid, new_rows, new_grid):
    source = shapes_source({POSITIONS: (rows, 8)}, {POSITIONS: grid} if grid else {})
    with pytest.raises(UserError, match="the same tokens besides the patches"):
        match({POSITIONS: (new_rows, 8)}, source, ALL, new_grid)


def test_positions_of_texts_and_of_another_width_are_not_resampled():
    with pytest.raises(UserError, match=r"is \(4, 8\) .* set config.tokenizer.context_length to 4"):
        match({TEXT: (9, 8)}, shapes_source({TEXT: (4, 8)}), ALL)
    with pytest.raises(UserError, match=r"is \(4, 8\) in the source and \(9, 6\) in the model"):
        match({POSITIONS: (9, 6)}, shapes_source({POSITIONS: (4, 8)}), ALL, (3, 3))


def test_foreign_weights_are_resampled_and_reported(run, tmp_path, monkeypatch):
    params = {p: x for p, x in run[1].items() if p.startswith("image/")}
    params[POSITIONS] = np.arange(9 * 32, dtype=np.float64).reshape(9, 32)
    calls = []

    def read_weights(spec, like):
        calls.append((spec, type(like).__name__))
        return types.SimpleNamespace(
            params={**params, "head/kernel": np.ones((3, 5))},
            grids={POSITIONS: (3, 3)},
            notes=["made for a test"],
        )

    def resample(table, old_grid, new_grid, prefix_tokens):
        calls.append((table.shape, old_grid, new_grid, prefix_tokens))
        return table[:4] * 2

    fakes = {"vlp_jax.interop": {"read_weights": read_weights}}
    fakes["vlp_jax.models.positions"] = {"resample": resample}
    for name, content in fakes.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    rules = (("head/.*", "skip"), ("image/.*", "load"), (".*", "fresh"))
    setup = setup_from("timm:some.safetensors", rules)
    start = start_of(setup, tmp_path)
    state = start.state(setup)
    assert calls == [
        ("timm:some.safetensors", "DualEncoder"),
        ((9, 32), (3, 3), (2, 2), 0),
    ]
    np.testing.assert_array_equal(flat(state.params)[POSITIONS], params[POSITIONS][:4] * 2)

    told = []
    start.announce(tmp_path, told.append)
    text = (tmp_path / "init_from.txt").read_text()
    assert told == [text.rstrip("\n")]
    lines = text.splitlines()
    assert lines[0] == "start from timm:some.safetensors"
    assert lines[1] == "note: made for a test"
    assert f"  {UP}" in "\n".join(lines) and "(2, 32, 64)" in text
    rows = {line.split()[0]: line for line in lines[2:-1]}
    assert rows[POSITIONS].endswith("resampled 3x3 -> 2x2")
    assert rows[UP].endswith("loaded") and rows["logit_scale"].endswith("fresh")
    assert rows["head/kernel"].split() == ["head/kernel", "(3,", "5)", "skipped"]
    sizes = {path: x.size for path, x in flat(state.params).items()}
    fresh = sum(size for path, size in sizes.items() if not path.startswith("image/"))
    loaded = sum(sizes.values()) - fresh - 4 * 32
    assert lines[-1] == (
        f"parameters: {loaded:,} loaded, 128 resampled, {fresh:,} fresh, 15 skipped"
    )


def test_a_workdirs_config_tells_its_grid(run, tmp_path):
    image = {**helpers.tiny_config().objective.image.to_dict(), "image_size": 32}
    config = helpers.tiny_config(image=image)
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    state = helpers.fresh(setup_from())
    state.params["image"]["position_embedding"] = np.zeros((16, 32), np.float32)
    save(tmp_path, state, 1)
    start = start_of(setup_from(tmp_path), tmp_path / "new")
    (fate,) = (fate for fate in start.fates if fate.path == POSITIONS)
    assert str(fate) == "resampled 4x4 -> 2x2"


def test_token_embeddings_of_another_tokenizer(run, tmp_path):
    save(tmp_path, helpers.fresh(setup_from()), 1)
    (tmp_path / "tokenizer.json").write_text("theirs")

    def tokenizer(text):
        def write(path):
            with open(path, "w") as file:
                file.write(text)

        return types.SimpleNamespace(save=write)

    setup, new = setup_from(tmp_path), tmp_path / "new"
    make_start(setup, new, tokenizer("theirs"))
    with pytest.raises(UserError, match="set config.tokenizer.file to .*/tokenizer.json"):
        make_start(setup, new, tokenizer("ours"))
    rules = ((".*/token_embedding/.*", "fresh"), *ALL)
    make_start(setup_from(tmp_path, rules), new, tokenizer("ours"))


# Several sources.


def setup_of(sources, rules=ALL, source=None, **objective):
    config = helpers.tiny_config(**objective)
    config.init_from.source, config.init_from.rules = source and str(source), rules
    with config.unlocked():
        config.init_from.sources = {name: dict(given) for name, given in sources.items()}
    return helpers.setup_on(config, {"replica": 1}, 1)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another run of the same model: (workdir, parameters)."""
    workdir = tmp_path_factory.mktemp("other")
    setup = helpers.setup_on(helpers.tiny_config(), {"replica": 1}, 1)
    state = helpers.fresh(setup)
    state = state.replace(params=jax.tree.map(lambda x: x - 0.5, state.params))
    save(workdir, state, 7)
    return workdir, flat(state.params)


def test_a_tower_from_here_and_a_tower_from_there(run, other, tmp_path):
    """An image tower of one run, a text tower of another, the rest from the seed."""
    sources = {
        "eyes": {"source": str(run[0]), "into": "image"},
        "words": {"source": str(other[0]), "into": "text"},
    }
    setup = setup_of(sources)
    start, told = start_of(setup, tmp_path), []
    params, seed = flat(start.state(setup).params), flat(helpers.fresh(setup).params)
    for path, value in params.items():
        source = {"image": run[1], "text": other[1]}.get(path.split("/")[0], seed)
        np.testing.assert_array_equal(value, source[path], err_msg=path)
    start.announce(tmp_path, told.append)
    assert sorted(fate.path for fate in start.fates) == sorted(
        path for path in params if "encoder/layer_" not in path
    )
    (text,) = told
    assert f"start from {run[0]}, params of step 3, image into image" in text
    assert "start from the seed" in text and "image_projection/kernel" in text


def test_a_tower_goes_to_another_place(other, tmp_path):
    """The text tower of the source becomes the image tower's encoder: its layers are as large."""
    rules = (("image/encoder/.*", "load"), (".*", "skip"))
    setup = setup_of(
        {"odd": {"source": str(other[0]), "take": "text", "into": "image", "rules": rules}}
    )
    params = flat(start_of(setup, tmp_path).state(setup).params)
    np.testing.assert_array_equal(params[UP], other[1][UP.replace("image", "text")])


def test_a_further_source_replaces_a_part_of_the_first(run, other, tmp_path):
    rules = (("text/.*", "fresh"), *ALL)
    words = {"source": str(other[0]), "into": "text", "step": 7}
    setup = setup_of({"words": words}, rules, run[0])
    params = flat(start_of(setup, tmp_path).state(setup).params)
    for path, value in params.items():
        expected = other[1] if path.startswith("text/") else run[1]
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            {"a": {"into": "image"}, "b": {"into": "image/encoder"}},
            "sources.a and config.init_from.sources.b both give image/encoder/.*b.into",
        ),
        ({"a": {"into": "imagine"}}, "sources.a.into: the model has no parameters under 'imagine'"),
        ({"a": {"take": "imagine", "into": "image"}}, "no parameters under 'imagine' .there are"),
        ({"a": {"onto": "image"}}, "sources.a.* into"),
        ({"a": {"into": "image", "rules": (("text/.*", "load"),)}}, "sources.a.rules: 'text/"),
        ({"a": {"into": "image", "step": 99}}, "sources.a: .*has no checkpoint of step 99"),
    ],
)
def test_sources_that_do_not_go_together(run, tmp_path, sources, message):
    given = {name: {"source": str(run[0]), **section} for name, section in sources.items()}
    with pytest.raises(UserError, match=message) as caught:
        start_of(setup_of(given), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_source_is_named_on_the_command_line():
    config = helpers.tiny_config()
    with config.unlocked():
        config.init_from.sources = {"eyes": {"source": "runs/a"}}
    config_lib.override(config, ["init_from.sources.eyes.into=image"])
    assert config.init_from.sources.eyes.into == "image"
    config_lib.check(config)
