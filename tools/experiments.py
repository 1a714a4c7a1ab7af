"""The experiments of `tools.results`: runs, and the figures that docs quote of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tools.pointing_game import play
from vlp_jax import evaluate
from vlp_jax.data.shapes import vocabulary
from vlp_jax.evaluators import make_evaluators
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.report.run_record import RunRecord
from vlp_jax.train import train
from vlp_jax.training import workdir as workdir_lib

LOSS, PREFIX = "train/loss", "eval/"
END = 0.1  # the share of the steps, at the end, over which the loss is averaged
END_LOSS = f"loss of the last {END:.0%}"
# "scores": name -> value; "loss": (steps, values), empty where nothing is trained.
Record = dict[str, Any]


def train_and_score(config: ConfigDict, folder: Path, source: Path | None) -> Record:
    """Trains what is left of the run in `folder`; returns its last scores.

    Args:
      source: the run whose weights it starts from.
    """
    if source:
        with config.unlocked():
            config.init_from.source = str(source)
            kept = source / workdir_lib.TOKENIZER
            if kept.exists() and "file" in config.tokenizer:
                config.tokenizer.file = str(kept)
    train(config, folder, StartupClock())
    record = RunRecord.read(folder)
    steps, losses = record.curve(LOSS)
    scores = {k.removeprefix(PREFIX): v for k, v in record.last_scores()[0].items()}
    return {"scores": {END_LOSS: end_of(steps, losses), **scores}, "loss": (steps, losses)}


def end_of(steps: list[int], losses: list[float]) -> float:
    """Returns the mean loss of the last steps."""
    # One step's loss is mostly its batch: a tenth of them tells settings apart.
    last = [v for s, v in zip(steps, losses, strict=True) if s >= (1 - END) * steps[-1]]
    return float(np.mean(last))


def judge_robustness(config: ConfigDict, folder: Path, source: Path) -> Record:
    """Scores the zero-shot classifier of `source` under corruptions and attacks."""
    subject, loaded = evaluate.load_run(source)
    section = subject.config.evaluators.zero_shot.to_dict()
    section = {key: section[key] for key in ("data", "templates", "class_names")}
    # Each image is seen once for every corruption and severity, and again by attacks.
    limit = min(256, section["data"].get("limit") or 256)
    section["data"] = {**section["data"], "limit": limit}
    section |= {"name": "robustness", "severities": (1, 3, 5), "radii": (1, 2, 4, 8)}
    made = make_evaluators(
        {"robustness": ConfigDict(section)}, subject.config.data, subject.resources
    )
    return {"scores": dict(made["robustness"](loaded.params)), "loss": ((), ())}


def play_pointing_game(config: ConfigDict, folder: Path, source: Path) -> Record:
    """Scores the heat maps of `source`; see `tools.pointing_game`."""
    return {"scores": play(source), "loss": ((), ())}


def train_open_clip(config: ConfigDict, folder: Path, source: Path | None) -> Record:
    """Trains and judges open_clip's model of the config; see the module that it calls."""
    from tools.perf.peers.open_clip_training import train_and_judge

    return train_and_judge(config)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run for each seed, which experiments share.

    Attributes:
      config: FILE[:ARG], or the name of an installed config.
      overrides: "KEY=VALUE", ...
      start: the stage whose weights, and tokenizer, it starts from or judges; empty for none.
      run: (config, folder, folder of `start`) -> its record.
    """

    config: str
    overrides: tuple[str, ...] = ()
    start: str = ""
    run: Callable[[ConfigDict, Path, Path | None], Record] = train_and_score


@dataclasses.dataclass(frozen=True)
class Figure:
    """A score of a stage, and what it has to be better than.

    Attributes:
      chance: a number, or the score that tells it; None if there is none.
      baseline: the stage whose value of the same score must lose; empty for none.
      baseline_score: the score of the baseline, if it is another; of `stage` without `baseline`.
      smaller: a smaller value is better.
    """

    stage: str
    score: str
    chance: float | str | None = None
    baseline: str = ""
    baseline_score: str = ""
    smaller: bool = False


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Stages, in the order in which they run, and figures by name."""

    stages: Mapping[str, Stage]
    figures: Mapping[str, Figure]
    about: str = ""


# One step at a learning rate of 0: the scores of the first weights.
_STILL = ("duration.steps=1", "optimizer.learning_rate=0.0", "optimizer.muon.learning_rate=0.0")
DEMO = {"demo": Stage("demo")}
_CLASSES = 1 / len(vocabulary.CLASS_NAMES)
_OPEN_CLIP = (
    *("data.path=pictures", "optimizer.name=adamw", "duration.epochs=5.0"),
    *("data.preprocess.random_resized_crop.min_scale=0.5", "data.preprocess.flip_left_right={}"),
)
_BOTH_WAYS = ("image_to_text_r1", "text_to_image_r1")


def _both_ways(stage: str, baseline: str) -> dict[str, Figure]:
    return {
        name: Figure(stage, f"retrieval/{name}", "retrieval/chance_r1", baseline)
        for name in _BOTH_WAYS
    }


EXPERIMENTS: dict[str, Experiment] = {
    "demo": Experiment(
        {**DEMO, "untrained": Stage("demo", _STILL)},
        {
            "zero_shot": Figure("demo", "zero_shot/top1", "zero_shot/chance", "untrained"),
            "zero_shot_unseen": Figure(
                "demo", "zero_shot_unseen/top1", "zero_shot_unseen/chance", "untrained"
            ),
            **_both_ways("demo", "untrained"),
        },
        "the config of `make demo`",
    ),
    "mae_then_clip": Experiment(
        {
            "mae": Stage("mae_then_clip:mae"),
            "from_mae": Stage("mae_then_clip:clip", start="mae"),
            "from_scratch": Stage("mae_then_clip:clip"),
        },
        {
            "reconstruction_error": Figure("mae", "reconstruction/error", smaller=True),
            "zero_shot": Figure("from_mae", "zero_shot/top1", "zero_shot/chance", "from_scratch"),
        },
        "CLIP whose image tower starts as a masked autoencoder's, and from scratch",
    ),
    "captioning": Experiment(
        {"captioning": Stage("cap_shapes")},
        {
            name: Figure("captioning", score, chance, baseline_score=f"{score}_shuffled")
            for name, score, chance in (
                ("named", "one_object/named", _CLASSES),
                ("named_unseen", "one_object_unseen/named", _CLASSES),
                ("cider", "captions/cider", None),
            )
        },
        "captions of scenes, beside the captions of other scenes",
    ),
    "classification": Experiment(
        {
            **DEMO,
            "finetune": Stage("classify_shapes:finetune", start="demo"),
            "probe": Stage("classify_shapes:probe", start="demo"),
            "classify_from_scratch": Stage("classify_shapes:finetune"),
        },
        {
            name: Figure(name, "accuracy/top1", _CLASSES, "classify_from_scratch")
            for name in ("finetune", "probe")
        },
        "the demo's image tower with a head, and the same from scratch",
    ),
    "questions": Experiment(
        {**DEMO, "questions": Stage("vqa_shapes", start="demo")},
        {
            "accuracy": Figure(
                *("questions", "answers/accuracy", "answers/most_common"),
                baseline_score="answers/most_common_of_kind",
            )
        },
        "answers about scenes, beside the most common answer of each kind",
    ),
    "retrieval": Experiment(
        {**DEMO, "retrieval": Stage("retrieval_shapes", start="demo")},
        _both_ways("retrieval", "demo"),
        "the demo tuned on detailed captions",
    ),
    "robustness": Experiment(
        {**DEMO, "robustness": Stage("demo", start="demo", run=judge_robustness)},
        {
            name: Figure("robustness", name, _CLASSES)
            for name in ("clean", "corruption_mean", "pgd_1")
        },
        "the demo as a zero-shot classifier under corruptions and attacks",
    ),
    "heat_maps": Experiment(
        {**DEMO, "heat_maps": Stage("demo", start="demo", run=play_pointing_game)},
        {
            name: Figure("heat_maps", name, "chance", baseline_score="middle")
            for name in ("windows", "occlusion", "patches", "patches+contrast", "relevance")
        },
        "the pointing game: peaks of heat maps in the box of the object that a text names",
    ),
    "open_clip": Experiment(
        {
            "clip_folder": Stage("clip_folder", _OPEN_CLIP),
            "open_clip": Stage("clip_folder", _OPEN_CLIP, run=train_open_clip),
        },
        _both_ways("clip_folder", "open_clip"),
        "clip_folder here and in open_clip; --set data.path=DIR names the pictures",
    ),
}


def read_record(folder: Path) -> Record | None:
    """Reads the record of a finished run; None if it is not finished."""
    file = folder / "result.json"
    return json.loads(file.read_text()) if file.exists() else None
