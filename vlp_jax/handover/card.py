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
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from vlp_jax.data.ops import in_order
from vlp_jax.data.pipeline import split_mixture
from vlp_jax.data.sources.base import as_plain
from vlp_jax.handover.examples import TEXTS, example
from vlp_jax.handover.scores import Scores, is_score
from vlp_jax.interop.trees import Module, image_of
from vlp_jax.models.coca import CoCa
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.values import tower_fields

if TYPE_CHECKING:
    from vlp_jax.handover.job import ExportJob

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
KINDS = {
    DualEncoder: "An image and a text encoder that end in one embedding space",
    CoCa: "An image and a text encoder that end in one embedding space, and a decoder that says "
    "captions",
    MaskedAutoencoder: "A masked autoencoder: an image encoder and a decoder that paints what was "
    "hidden",
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
    "says how the model fares on photographs or on other sentences."
}


@dataclasses.dataclass(frozen=True)
class Card:
    """The facts that a model card states, of an export.

    Attributes:
      name: the name of the model, from its folder.
      job: the export.
      scores: the scores; None if they are unknown.
      versions: package -> version.
      commit: the commit of the code; None if it is unknown.
      architecture: the class of `transformers`, for its formats.
    """

    name: str
    job: ExportJob
    scores: Scores | None
    versions: Mapping[str, str]
    commit: str | None
    architecture: str

    module = property(lambda self: self.job.model.module)
    config = property(lambda self: self.job.config)
    step = property(lambda self: self.job.saved.step)
    library = property(lambda self: self.job.format.split("_")[0])  # "hf" of "hf_clip"


def text(card: Card) -> str:
    """Returns the whole card."""
    sections = [
        ("", _what(card)),
        ("Load it", f"Inside this folder:\n\n```python\n{_example(card)}\n```"),
        ("Model", _architecture(card)),
        ("Images and texts", _preprocessing(card)),
        ("Training data", _data(card)),
        ("Recipe", _recipe(card)),
        ("Scores", _scores(card)),
        ("Limits", _limits(card)),
        ("Made with", _made(card)),
    ]
    body = "\n\n".join(f"## {title}\n\n{x}" if title else x for title, x in sections)
    return f"---\n{_head(card)}---\n\n# {card.name}\n\n{body}\n"


def pipeline_of(format: str, module: Module, architecture: str) -> tuple[str | None, str]:
    """Returns the `pipeline_tag` of transformers' pipeline that can run an export.

    Source: transformers 5.24, pipelines/zero_shot_image_classification.py and
    image_feature_extraction.py.

    Args:
      architecture: the class of `transformers`, for its formats.

    Returns:
      (tag, ""), or (None, the reason for no tag); (None, "") for a format without pipelines.
    """
    if format.split("_")[0] not in ("hf", "open", "timm"):
        return None, ""
    texts, why = "text" in module.towers(), ""
    if architecture == "ViTMAEForPreTraining":
        why = "pipeline hides patches at random as in pretraining"
    elif architecture == "SiglipModel" and module.text.context_length != SIGLIP_PIPELINE_LENGTH:
        why = (
            f"zero-shot pipeline pads the texts of every SigLIP to {SIGLIP_PIPELINE_LENGTH} "
            f"tokens, and this model takes {module.text.context_length}"
        )
    elif architecture == "SiglipModel" and module.logit_bias_init is None:
        why = (
            "zero-shot pipeline scores a SigLIP by the sigmoid of each logit, and this model was "
            "trained with a softmax"
        )
    if why:
        return None, f"no pipeline_tag: transformers' {why}"
    return "zero-shot-image-classification" if texts else "image-feature-extraction", ""


def _head(card: Card) -> str:
    name = card.job.format
    tag, _ = pipeline_of(name, card.module, card.architecture)
    results = [
        {
            "task": {"type": evaluator},
            "dataset": {"name": _dataset(card.config, evaluator), "type": "custom"},
            "metrics": [{"type": score, "value": value} for score, value in scores.items()],
        }
        for evaluator, scores in _by_evaluator(card.scores).items()
    ]
    head: dict[str, Any] = {
        "library_name": LIBRARY.get(card.library, name),
        "tags": ["vlp_jax", card.config.objective.name, name],
        "pipeline_tag": tag,
        "license": card.job.license or None,
        "model-index": [{"name": card.name, "results": results}] if results else None,
    }
    return "".join(f"{key}: {json.dumps(x)}\n" for key, x in head.items() if x is not None)


def _by_evaluator(scores: Scores | None) -> dict[str, dict[str, float]]:
    """Returns evaluator -> score -> value."""
    found: dict[str, dict[str, float]] = {}
    for name, value in ({} if scores is None else scores.values).items():
        if is_score(name):
            evaluator, _, score = name.partition("/")
            found.setdefault(evaluator, {})[score] = value
    return found


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


def _what(card: Card) -> str:
    kind = KINDS.get(type(card.module), "An image encoder")
    numbers = sum(x.size for x in card.job.model.params.values())
    kept = {"params": "its parameters", "ema": "the average of its parameters"}
    return (
        f"{kind}, {numbers:,} parameters, written as `{card.job.format}` with weights in "
        f"{card.job.settings.weights}. It is {kept[card.job.saved.part]} at step {card.step:,} of "
        f"a run of vlp_jax."
    )


def _example(card: Card) -> str:
    given = [section.get("class_names") for section in card.config.evaluators.values()]
    lists = [list(names) for names in given if names and not isinstance(names, str)]  # no path
    texts = next((names[:2] for names in lists if len(names) > 1), TEXTS)
    return example(card.job.format, card.module, card.architecture, texts)


def _architecture(card: Card) -> str:
    towers = card.module.towers()
    rows = [["", *towers], ["---"] * (1 + len(towers))]
    for field, label in TOWER_FIELDS.items():
        rows.append([label, *(str(tower_fields(x).get(field, "-")) for x in towers.values())])
    vit, text = towers["image"], towers.get("text")
    more = (
        f"Images of {vit.image_size[0]} x {vit.image_size[1]} pixels in patches of "
        f"{vit.patch_size}."
    )
    if text is not None:
        more += (
            f" Texts of {text.context_length} tokens out of {text.vocab_size:,}. Embeddings of "
            f"{card.module.embed_dim} numbers."
        )
    return "\n".join([*map(_row, rows), "", more])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _preprocessing(card: Card) -> str:
    extras, module = card.job.settings, card.module
    pixels = extras.pixels_of(module)
    height, width = image_of(module).image_size
    how = {
        "squash": f"resized to {height} x {width} pixels, whatever their shape",
        "crop": f"scaled to cover {height} x {width} pixels, of which the middle is cut out",
    }[extras.resize]
    mean, std = (", ".join(f"{x:g}" for x in numbers) for numbers in (pixels.mean, pixels.std))
    lines = [
        f"Images are RGB, {how} ({extras.interpolation}, antialiased), scaled to [0, 1], and "
        f"normalized with mean ({mean}) and standard deviation ({std}).",
        "In training, what is transparent is composited on white, images are turned as their Exif "
        "orientation says, and of 16 bits the upper 8 are kept.",
        ODD_PIXELS.get(card.library, ""),
    ]
    if "text" in module.towers() and extras.tokenizer is not None:
        lines.append(
            "Texts are tokenized, framed, cut and padded as `tokenizer.json` and its neighbours "
            "say."
        )
    return " ".join(filter(None, lines))


def _data(card: Card) -> str:
    config = card.config
    lines = []
    for which, data in _datasets(config).items():
        split = f", split `{data['split']}`" if data.get("split") else ""
        which = f" ({which})" if which else ""
        lines.append(f"- `{_named(data)}`{which}, read as `{data.get('source')}`{split}")
        names = [name for name, _ in in_order(data.get("preprocess"))]
        if names:
            lines.append(f"  - each example: {', '.join(f'`{name}`' for name in names)}")
    seen = card.step * config.batch_size
    lines.append(f"- {seen:,} examples seen, counting repetitions, at step {card.step:,}")
    return "\n".join(lines)


def _datasets(config: ConfigDict) -> dict[str, Mapping[str, Any]]:
    """Returns the training datasets by name ("" for `config.data`), with the parts of mixtures."""
    datasets = {}
    for name, data in {"": config.data, **config.extra_data}.items():
        parts = split_mixture(as_plain(data))[0]
        one = len(parts) == 1
        datasets |= {name if one else f"{name}/{part}".strip("/"): x for part, x in parts.items()}
    return datasets


def _recipe(card: Card) -> str:
    config = card.config
    optimizer, objective = config.optimizer, config.objective
    name = "`, `".join(filter(None, (objective.name, objective.get("loss"))))
    rate = f"learning rate {optimizer.learning_rate:g}"
    if optimizer.name == "muon":
        rate += f" (matrices of layers {optimizer.muon.learning_rate:g})"
    lines = [
        f"objective `{name}`",
        f"batches of {config.batch_size:,}, step {card.step:,} of a run of "
        f"{_duration(config.duration)}",
        f"optimizer `{optimizer.name}`, {rate}, weight decay {optimizer.weight_decay:g}",
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


def _scores(card: Card) -> str:
    scores = card.scores
    if scores is None:
        return "None are known."
    rows = [["evaluator", "data", "score", "value"], ["---"] * 3 + ["---:"]]
    for evaluator, known in _by_evaluator(scores).items():
        data = _dataset(card.config, evaluator)
        rows += [[evaluator, data, score, f"{value:.4f}"] for score, value in known.items()]
    chance = [
        f"{name.partition('/')[0]} {value:.4f}"
        for name, value in scores.values.items()
        if name.rpartition("/")[2] in ("chance", "chance_r1")
    ]
    more = f" By chance: {', '.join(chance)}." if chance else ""
    return "\n".join(
        [*map(_row, rows), "", f"{scores.source[0].upper()}{scores.source[1:]}.{more}"]
    )


def _limits(card: Card) -> str:
    sets = map(_named, _datasets(card.config).values())
    lines = [DATA_LIMITS[name] for name in sets if name in DATA_LIMITS]
    lines += [f"{note[0].upper()}{note[1:]}." for note in card.job.notes]
    lines.append("Nothing but the scores above has been measured.")
    return "\n".join(f"- {line}" for line in dict.fromkeys(lines))


def _made(card: Card) -> str:
    used = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    commit = f" at commit `{card.commit}`" if card.commit else ""
    return f"Exported by vlp_jax{commit}, with {used}. `export.json` has the digests of all files."
