"""The published recipes: sizes, schedules, formats and where weights come from. Nothing is run."""

import ast

import jax
import numpy as np
import pytest
from recipe_shapes import CONFIGS, count, load, objective_of, shapes_of

from vlp_jax import interop
from vlp_jax.data.ops import build_ops
from vlp_jax.errors import UserError
from vlp_jax.training import init_from, param_groups
from vlp_jax.training.matching import Source
from vlp_jax.training.optimizer import make_optimizer, make_schedule
from vlp_jax.training.when import Units

NO_RECIPES = {
    "bench_small",
    "clip_folder",
    "clip_webdataset",
    "clip_shapes",
    "siglip_shapes",
    "demo",
    "mae_then_clip",
    "classify_shapes",
    "vqa_shapes",
    "retrieval_shapes",
    "cap_shapes",
    "finetune",
}
DEBUG = {"debug_cpu", "debug_gpu"}
RECIPES = sorted({p.stem for p in CONFIGS.glob("[!_]*.py")} - NO_RECIPES - DEBUG)
SPECS = [*RECIPES, "flip_l16:tune", "siglip_so400m14:378", *sorted(DEBUG)]
IMAGENET = 1_281_167


def total_steps(config, epoch_examples=IMAGENET):
    return Units(config.batch_size, epoch_examples).steps(config.duration, "duration")


def test_the_recipes_are_there_and_say_what_they_aim_at():
    families = {"clip": 3, "siglip": 3, "lit": 1, "flip": 1, "mae": 3, "cappa": 1, "coca": 1}
    assert len(RECIPES) == sum(families.values())
    for name in RECIPES:
        docstring = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
        assert "Aims at: " in docstring and name.partition("_")[0] in families
        assert f"--config configs/{name}.py" in docstring


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [("clip_b16", 149_620_737), ("clip_b32", 151_277_313), ("clip_l14", 427_616_513)]
    + [("siglip_b16", 203_155_970), ("siglip_g", 1_871_393_906)],
)
def test_parameters_are_as_many_as_in_the_published_weights(spec, parameters):
    assert count(shapes_of(load(spec))) == parameters


@pytest.mark.parametrize(
    ("spec", "formats"),
    [(name, ["hf_clip", "open_clip"]) for name in ("clip_b16", "clip_b32", "clip_l14")]
    + [(name, ["hf_siglip", "big_vision"]) for name in RECIPES if "siglip" in name]
    + [(name, ["hf_vit_mae"]) for name in ("mae_b16", "mae_l16", "mae_h14")]
    + [
        ("coca_b32", ["open_clip"]),
        ("lit_b16", ["big_vision"]),
        ("clip_shapes", ["hf_clip", "open_clip"]),
    ]
    + [("siglip_shapes", ["hf_siglip", "big_vision"]), ("debug_gpu", ["hf_clip", "open_clip"])],
)
@pytest.mark.parametrize("eos_id", [1, 49_407])
def test_formats_can_express_the_model(spec, formats, eos_id):
    config = load(spec)
    model = objective_of(config, eos_id=eos_id).model if config.tokenizer else None
    model = model or objective_of(config).model
    for name in formats:
        assert interop.FORMATS[name].check(model, interop.Extras()) == []


@pytest.mark.parametrize(
    ("spec", "steps", "warmup", "rate"),
    [
        ("clip_b16", 390_625, 2_000, 5e-4),
        ("clip_b32", 390_625, 2_000, 5e-4),
        ("clip_l14", 390_625, 2_000, 4e-4),
        ("coca_b32", 144_265, 10_000, 5e-4),
        ("siglip_b16", 1_220_704, 20_000, 1e-3),
        ("siglip_so400m14", 1_220_704, 20_000, 1e-3),
        ("siglip_g", 1_220_704, 20_000, 1e-3),
        ("lit_b16", 60_000, 10_000, 1e-3),
        ("flip_l16", 195_491, 782, 1.024e-3),
        ("flip_l16:tune", 1_955, 391, 1.024e-5),
        ("mae_b16", 500_456, 12_512, 2.4e-3),
        ("mae_l16", 500_456, 12_512, 2.4e-3),
        ("mae_h14", 500_456, 12_512, 2.4e-3),
        ("debug_gpu", 1_000, 100, 5e-4),
        ("debug_cpu", 40, 4, 5e-4),
    ],
)
def test_schedules_in_steps(spec, steps, warmup, rate):
    config = load(spec)
    assert total_steps(config) == steps
    units = Units(config.batch_size, IMAGENET, steps)
    assert units.steps(config.optimizer.warmup, "warmup") == warmup
    schedule = make_schedule(config.optimizer, units)
    np.testing.assert_allclose(schedule(warmup - 1), rate, rtol=1e-6)
    assert schedule(steps) < 1e-6 * rate


@pytest.mark.parametrize("spec", SPECS)
def test_the_parts_of_a_run_fit_each_other(spec):
    config = load(spec)
    units = Units(config.batch_size, IMAGENET, total_steps(config))
    params = param_groups.unflatten(shapes_of(config))
    param_groups.check_groups(config.optimizer, params)
    jax.eval_shape(make_optimizer(config.optimizer, units).init, params)
    init_from.check_rules(config.init_from.rules)
    size = config.objective.image.image_size
    for section in (config, *config.evaluators.values()):
        assert build_ops(section.data.preprocess)
        sizes = {op.size for op in section.data.preprocess.values() if "size" in op}
        assert sizes == {size}
    for evaluator in config.evaluators.values():
        units.steps(evaluator.every, "every")


def test_weight_decay_is_of_what_the_papers_say():
    def without(spec):
        config = load(spec)
        flat = shapes_of(config)
        return {p.rpartition("/")[2] for p in flat} - set(config.optimizer.no_decay)

    assert without("clip_b16") == {"kernel", "embedding", "position_embedding", "class_token"}
    assert without("siglip_b16") == without("lit_b16") == {"kernel"}
    assert without("flip_l16") == {"kernel", "embedding", "class_token", "logit_scale"}
    assert without("mae_b16") == {"kernel", "class_token", "mask_token"}


def source(shapes, part=""):
    found = {path: tuple(leaf.shape) for path, leaf in shapes.items() if path.startswith(part)}
    return Source("some weights", found, {}, (), dict)


def fates(model, weights, rules):
    shapes = {path: tuple(leaf.shape) for path, leaf in model.items()}
    found = init_from.match(shapes, weights, rules, (14, 14))
    return {kind: {f.path for f in found if f.kind == kind} for kind in {f.kind for f in found}}


def test_the_second_stage_of_flip_takes_all_of_the_first():
    config = load("flip_l16:tune")
    assert config.init_from.source == "runs/flip_l16" and config.objective.mask_ratio == 0
    model = shapes_of(config)
    weights = source(shapes_of(load("flip_l16")))
    assert fates(model, weights, config.init_from.rules) == {"loaded": set(model)}


def test_lit_takes_the_image_tower_and_trains_the_rest():
    config = load("lit_b16")
    model = shapes_of(config)
    image = {path for path in model if path.startswith("image/")}
    found = fates(model, source(model, "image/"), config.init_from.rules)
    assert found == {"loaded": image, "fresh": set(model) - image}
    assert {p for p in model if param_groups.is_frozen(p, config.optimizer.frozen)} == image
    assert config.init_from.source.startswith("big_vision:")


def test_a_contrastive_recipe_can_start_from_a_masked_autoencoder():
    docstring = (CONFIGS / "mae_b16.py").read_text()
    rules = ast.literal_eval(docstring.partition('.rules="')[2].partition('"')[0])
    model, weights = shapes_of(load("flip_l16")), source(shapes_of(load("mae_l16")))
    found = fates(model, weights, rules)
    assert found["loaded"] == {path for path in model if path.startswith("image/")}
    assert found["skipped"] == {path for path in weights.shapes if path.startswith("decoder/")}


@pytest.mark.parametrize("spec", ["clip_b16:336", "siglip_so400m14:384", "flip_l16:unmask"])
def test_arguments_that_are_not_known(spec):
    with pytest.raises(UserError, match="has no argument"):
        load(spec)


def test_class_names_are_those_of_imagenet():
    names = load("clip_b16").evaluators.zero_shot.class_names
    assert len(names) == 1000 and all(name == name.lower().strip() for name in names)
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet paper")
