"""Writes the model card (README.md) of an export: model, data, recipe, scores, how to load it.

Everything is taken from the run's config, its metrics and the model; unknown facts are left out.
The YAML header follows the model cards of the Hugging Face hub (huggingface.co/docs/hub, "Model
Cards"). It is written as JSON, which is valid YAML.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ml_collections import ConfigDict

from vlp_jax.data.ops import in_order
from vlp_jax.data.pipeline import split_mixture
from vlp_jax.data.sources.base import as_plain
from vlp_jax.handover.examples import TEXTS, example
from vlp_jax.handover.scores import Scores, is_score
from vlp_jax.interop.base import Extras
from vlp_jax.interop.transfer import Model
from vlp_jax.interop.trees import Module, image_of
from vlp_jax.models.coca import CoCa
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.values import tower_fields

LIBRARY = {
    "hf": "transformers",
    "saved": "tensorflow",
    "stablehlo": "jax",
    "safetensors": "vlp_jax",
}
# Tokens to which transformers' zero-shot pipeline pads the texts of every SigLIP.
SIGLIP_PIPELINE_LENGTH = 64
# Format -> how its library treats pixels that are not plain RGB, where it differs from training.
# Measured with transformers 5.24, open_clip 3.3 and timm 1.0.31 (table in docs/interop.md).
ODD_PIXELS = {
    "hf": "The image processor of transformers composites on white too, but does not turn images "
    "and clips 16 bits at 255; its pipelines turn them, and drop the alpha channel.",
    "open": "open_clip drops the alpha channel, so that the colors under transparent pixels are "
    "seen; it does not turn images, and clips 16 bits at 255.",
    "timm": 'timm takes RGB images alone: `convert("RGB")` drops the alpha channel, so that the '
    "colors under transparent pixels are seen, does not turn images, and clips 16 bits at 255.",
    "saved": "The program takes pixels: prepare them so.",
    "big": "Prepare the pixels so.",
}
TOWER_FIELDS = {
    "width": "width",
    "depth": "layers",
    "heads": "heads",
    "mlp_dim": "MLP width",
    "activation": "activation",
    "pooling": "pooling",
}
# Dataset -> a warning about the limits of a model trained on it.
DATA_LIMITS = {
    "shapes": "`shapes` is drawn: scenes of colored shapes with generated captions. Nothing here "
    "says how the model fares on photographs or on other sentences.",
}


@dataclasses.dataclass(frozen=True)
class CardContents:
    """The facts that a model card states.

    Attributes:
      name: the name of the model, from its folder.
      format: the format of the export.
      model: the module and its parameters.
      extras: further settings of the export.
      config: the run's config.
      step: the step of the checkpoint.
      part: the exported parameters, "params" or "ema".
      scores: the scores; None if they are unknown.
      versions: package -> version.
      commit: the commit of the code; None if it is unknown.
      architecture: the class of `transformers`, for its formats.
      license: the hub's name of the license; None if it was not given.
      notes: lines for the user.
    """

    name: str
    format: str
    model: Model
    extras: Extras
    config: ConfigDict
    step: int
    part: str
    scores: Scores | None
    versions: Mapping[str, str]
    commit: str | None
    architecture: str = ""
    license: str | None = None
    notes: Sequence[str] = ()


def text(contents: CardContents) -> str:
    """Returns the whole card."""
    sections = [
        ("", _what(contents)),
        ("Load it", f"Inside this folder:\n\n```python\n{_example(contents)}\n```"),
        ("Model", _architecture(contents)),
        ("Images and texts", _preprocessing(contents)),
        ("Training data", _data(contents)),
        ("Recipe", _recipe(contents)),
        ("Scores", _scores(contents)),
        ("Limits", _limits(contents)),
        ("Made with", _made(contents)),
    ]
    body = "\n\n".join(f"## {title}\n\n{x}" if title else x for title, x in sections)
    return f"---\n{_head(contents)}---\n\n# {contents.name}\n\n{body}\n"


def pipeline_of(format: str, module: Module, architecture: str) -> tuple[str | None, str]:
    """Returns the `pipeline_tag` of transformers' pipeline that can run an export.

    Source: transformers 5.24, pipelines/zero_shot_image_classification.py and
    image_feature_extraction.py.

    Args:
      architecture: the class of `transformers`, for its formats.

    Returns:
      (tag, ""), or (None, the reason for no tag); (None, "") for a format without pipelines.
    """
    library = format.split("_")[0]
    if library not in ("hf", "open", "timm"):
        return None, ""
    if "text" not in module.towers():
        if architecture == "ViTMAEForPreTraining":
            return None, (
                "no pipeline_tag: transformers' pipeline hides patches at random as in pretraining"
            )
        return "image-feature-extraction", ""
    if architecture == "SiglipModel":
        length = module.text.context_length
        if length != SIGLIP_PIPELINE_LENGTH:
            return None, (
                f"no pipeline_tag: transformers' zero-shot pipeline pads the texts of every SigLIP "
                f"to {SIGLIP_PIPELINE_LENGTH} tokens, and this model takes {length}"
            )
        if module.logit_bias_init is None:
            return None, (
                "no pipeline_tag: transformers' zero-shot pipeline scores a SigLIP by the sigmoid "
                "of each logit, and this model was trained with a softmax"
            )
    return "zero-shot-image-classification", ""


def _head(contents: CardContents) -> str:
    name = contents.format
    head: dict[str, Any] = {
        "library_name": LIBRARY.get(name.split("_")[0], name),
        "tags": ["vlp_jax", contents.config.objective.name, name],
    }
    tag, _ = pipeline_of(name, contents.model.module, contents.architecture)
    if tag is not None:
        head["pipeline_tag"] = tag
    if contents.license:
        head["license"] = contents.license
    results = _results(contents) if contents.scores else []
    if results:
        head["model-index"] = [{"name": contents.name, "results": results}]
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items())


def _results(contents: CardContents) -> list[dict[str, Any]]:
    """Converts the scores to the hub's `model-index`: an entry for each evaluator."""
    by_evaluator: dict[str, list[tuple[str, float]]] = {}
    for name, value in contents.scores.values.items():
        if is_score(name):
            evaluator, _, score = name.partition("/")
            by_evaluator.setdefault(evaluator, []).append((score, value))
    return [
        {
            "task": {"type": name},
            "dataset": {"name": _dataset(contents.config, name), "type": "custom"},
            "metrics": [{"type": score, "value": value} for score, value in scores],
        }
        for name, scores in by_evaluator.items()
    ]


def _dataset(config: ConfigDict, evaluator: str) -> str:
    section = config.evaluators.get(evaluator, {})
    data = {**config.data.to_dict(), **dict(section.get("data", {}))}
    chosen = {**dict(data.get("where") or {}), "limit": data.get("limit")}
    words = [f"split {data['split']}"] if data.get("split") else []
    words += [f"{key} {value}" for key, value in chosen.items() if value is not None]
    return ", ".join([_named(data), *words])


def _named(data: Mapping[str, Any]) -> str:
    """Returns the name of a dataset, without its path, which means nothing on other machines."""
    for key in ("dataset", "path", "files", "pattern"):
        if isinstance(data.get(key), str):
            return PurePosixPath(data[key]).name
    return str(data.get("source", "unknown"))


def _what(contents: CardContents) -> str:
    module = contents.model.module
    kinds = {
        DualEncoder: "An image and a text encoder that end in one embedding space",
        CoCa: "An image and a text encoder that end in one embedding space, and a decoder that "
        "says captions",
        MaskedAutoencoder: "A masked autoencoder: an image encoder and a decoder that paints what "
        "was hidden",
    }
    kind = kinds.get(type(module), "An image encoder")
    numbers = sum(x.size for x in contents.model.params.values())
    kept = {"params": "its parameters", "ema": "the average of its parameters"}[contents.part]
    return (
        f"{kind}, {numbers:,} parameters, written as `{contents.format}` with weights in "
        f"{contents.extras.weights}. It is {kept} at step {contents.step:,} of a run of vlp_jax."
    )


def _example(contents: CardContents) -> str:
    given = [section.get("class_names") for section in contents.config.evaluators.values()]
    lists = [list(names) for names in given if names and not isinstance(names, str)]  # no path
    texts = next((names[:2] for names in lists if len(names) > 1), TEXTS)
    return example(contents.format, contents.model.module, contents.architecture, texts)


def _architecture(contents: CardContents) -> str:
    module = contents.model.module
    towers = module.towers()
    rows = [
        (label, *(str(tower_fields(tower).get(field, "-")) for tower in towers.values()))
        for field, label in TOWER_FIELDS.items()
    ]
    lines = [_row(["", *towers]), _row(["---"] * (1 + len(towers))), *map(_row, rows)]
    vit = towers["image"]
    more = [
        f"Images of {vit.image_size[0]} x {vit.image_size[1]} pixels in patches of "
        f"{vit.patch_size}."
    ]
    if "text" in towers:
        more.append(
            f"Texts of {module.text.context_length} tokens out of {module.text.vocab_size:,}. "
            f"Embeddings of {module.embed_dim} numbers."
        )
    return "\n".join([*lines, "", " ".join(more)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _preprocessing(contents: CardContents) -> str:
    extras, module = contents.extras, contents.model.module
    pixels = extras.pixels_of(module)
    height, width = image_of(module).image_size
    how = {
        "squash": f"resized to {height} x {width} pixels, whatever their shape",
        "crop": f"scaled to cover {height} x {width} pixels, of which the middle is cut out",
    }[extras.resize]
    lines = [
        f"Images are RGB, {how} ({extras.interpolation}, antialiased), scaled to [0, 1], and "
        f"normalized with mean {_numbers(pixels.mean)} and standard deviation "
        f"{_numbers(pixels.std)}."
    ]
    lines.append(
        "In training, what is transparent is composited on white, images are turned as their Exif "
        "orientation says, and of 16 bits the upper 8 are kept."
    )
    lines.append(ODD_PIXELS.get(contents.format.split("_")[0], ""))
    if "text" in module.towers() and extras.tokenizer is not None:
        lines.append(
            "Texts are tokenized, framed, cut and padded as `tokenizer.json` and its "
            "neighbours say."
        )
    return " ".join(filter(None, lines))


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{x:g}" for x in values) + ")"


def _data(contents: CardContents) -> str:
    config = contents.config
    lines = []
    for which, data in _datasets(config).items():
        split = f", split `{data['split']}`" if data.get("split") else ""
        which = f" ({which})" if which else ""
        lines.append(f"- `{_named(data)}`{which}, read as `{data.get('source')}`{split}")
        names = [name for name, _ in in_order(data.get("preprocess"))]
        if names:
            lines.append(f"  - each example: {', '.join(f'`{name}`' for name in names)}")
    seen = contents.step * config.batch_size
    lines.append(f"- {seen:,} examples seen, counting repetitions, at step {contents.step:,}")
    return "\n".join(lines)


def _datasets(config: ConfigDict) -> dict[str, Mapping[str, Any]]:
    """Returns the training datasets by name ("" for `config.data`), with the parts of mixtures."""
    datasets = {}
    for name, data in {"": config.data, **config.extra_data}.items():
        parts = split_mixture(as_plain(data))[0]
        one = len(parts) == 1
        datasets |= {name if one else f"{name}/{part}".strip("/"): x for part, x in parts.items()}
    return datasets


def _recipe(contents: CardContents) -> str:
    config = contents.config
    optimizer, objective = config.optimizer, config.objective
    name = "`, `".join(filter(None, (objective.name, objective.get("loss"))))
    lines = [
        f"objective `{name}`",
        f"batches of {config.batch_size:,}, step {contents.step:,} of a run of "
        f"{_duration(config.duration)}",
        f"optimizer `{optimizer.name}`, learning rate {optimizer.learning_rate:g}"
        + (
            f" (matrices of layers {optimizer.muon.learning_rate:g})"
            if optimizer.name == "muon"
            else ""
        )
        + f", weight decay {optimizer.weight_decay:g}",
        f"schedule `{optimizer.schedule}`, warmup of {_duration(optimizer.warmup)}",
        f"seed {config.seed}",
    ]
    if objective.get("mask_ratio"):
        lines.append(f"share of the patches that is hidden {objective.mask_ratio:g}")
    if optimizer.ema_decay:
        lines.append(f"average of the parameters with decay {optimizer.ema_decay:g}")
    if config.init_from.source:
        lines.append(f"started from `{PurePosixPath(config.init_from.source).name}`")
    if optimizer.frozen:
        lines.append(f"kept as they were: {', '.join(f'`{x}`' for x in optimizer.frozen)}")
    return "\n".join(f"- {line}" for line in lines)


def _duration(section: Mapping[str, Any]) -> str:
    for unit in ("steps", "examples", "epochs"):
        if section.get(unit) is not None:
            return f"{section[unit]:,} {unit}"
    return f"{section['percent']:g} % of the run"


def _scores(contents: CardContents) -> str:
    scores = contents.scores
    if scores is None:
        return "None are known."
    lines = [_row(["evaluator", "data", "score", "value"]), _row(["---"] * 3 + ["---:"])]
    for name, value in scores.values.items():
        if is_score(name):
            evaluator, _, score = name.partition("/")
            data = _dataset(contents.config, evaluator)
            lines.append(_row([evaluator, data, score, f"{value:.4f}"]))
    chance = [
        f"{name.partition('/')[0]} {value:.4f}"
        for name, value in scores.values.items()
        if name.rpartition("/")[2] in ("chance", "chance_r1")
    ]
    more = f" By chance: {', '.join(chance)}." if chance else ""
    return "\n".join([*lines, "", f"{scores.source[0].upper()}{scores.source[1:]}.{more}"])


def _limits(contents: CardContents) -> str:
    sets = map(_named, _datasets(contents.config).values())
    lines = [DATA_LIMITS[name] for name in sets if name in DATA_LIMITS]
    lines += [f"{note[0].upper()}{note[1:]}." for note in contents.notes]
    lines.append("Nothing but the scores above has been measured.")
    return "\n".join(f"- {line}" for line in dict.fromkeys(lines))


def _made(contents: CardContents) -> str:
    used = ", ".join(f"{name} {version}" for name, version in contents.versions.items())
    commit = f" at commit `{contents.commit}`" if contents.commit else ""
    return f"Exported by vlp_jax{commit}, with {used}. `export.json` has the digests of all files."
