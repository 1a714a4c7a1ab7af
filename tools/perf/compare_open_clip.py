"""Trains one config's model here and in open_clip, and compares their scores.

    python -m tools.perf.compare_open_clip --output DIR --set data.path=pictures --seeds 0 1 2

Both get the same batches in the same order, with the same augmentation and tokenizer, as many of
them, and AdamW with the same learning rates, weight decay and bound on gradients. open_clip's side
is its own model of the same sizes with its own initialization and loss, in PyTorch, float32. Both
are judged by the config's retrieval evaluator on the pictures that it holds out. What comes out:

- a table: scores as means over the seeds, with the least and the most, beside chance.
- DIR/curves.png: the training losses.
- DIR/comparison.json: all of it.

Every seed has a folder of its own, DIR/ours/seed_N and DIR/open_clip/seed_N; what is finished is
not trained again. requirements-test.txt has what it needs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as in the demo: they keep two cores busy

import numpy as np
from ml_collections import ConfigDict
from rich.progress import track

from tools.perf import harness
from tools.perf.compare_settings import add_run_arguments, config_of, loss_curve, smoothed
from tools.perf.mae_then_clip import train_stage
from tools.perf.peers import open_clip_peer
from tools.perf.peers.torch_step import patch_torchvision, to_tensors
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.data.samples import sample_texts
from vlp_jax.data.tokenizers import build_tokenizer
from vlp_jax.errors import UserError
from vlp_jax.evaluators import merged_data
from vlp_jax.evaluators.ranking import rank_both_ways
from vlp_jax.evaluators.retrieval import RetrievalOutcome
from vlp_jax.files import write_whole
from vlp_jax.objectives import Objective, make_objective
from vlp_jax.observe.pictures import draw_differences
from vlp_jax.report.run_record import RunRecord
from vlp_jax.training.optimizer import make_schedule
from vlp_jax.training.setup import make_pipeline, make_units
from vlp_jax.training.when import EverySteps

OURS, THEIRS = "vlp_jax", "open_clip"
SCORES = ("image_to_text_r1", "text_to_image_r1", "image_to_text_r10", "text_to_image_r10")
RECORD = "record.json"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = harness.make_parser("compare_open_clip", __doc__)
    told = "default: %(default)s"
    parser.add_argument("--config", metavar="FILE[:ARG]", default="clip_folder", help=told)
    add_run_arguments(parser, seeds=[0, 1, 2])
    parser.add_argument("--evaluator", default="retrieval", metavar="NAME", help=told)
    return parse_with_overrides(parser, argv)[0]


def checked(config: ConfigDict, evaluator: str) -> tuple[Any, Objective]:
    """Makes tokenizer and objective of `config`, if open_clip can train it and be evaluated.

    Raises:
      UserError: it cannot, or the optimizer is another one than AdamW.
    """
    if evaluator not in config.evaluators or config.evaluators[evaluator].name != "retrieval":
        raise UserError(f"--evaluator {evaluator} is no retrieval evaluator of the config")
    optimizer = config.optimizer
    if optimizer.name != "adamw" or optimizer.frozen or optimizer.ema_decay:
        raise UserError(
            "both sides train all parameters with AdamW and without an average: "
            "--set optimizer.name=adamw"
        )
    tokenizer = build_tokenizer(config.tokenizer, lambda: sample_texts(config.data), None)
    objective = make_objective(config.objective, tokenizer)
    refusal = open_clip_peer.refusal(objective)
    if refusal:
        raise UserError(f"open_clip has no such model: {refusal}")
    return tokenizer, objective


def train_theirs(
    config: ConfigDict, evaluator: str, tokenizer: Any, objective: Objective, folder: Path
) -> dict[str, Any]:
    """Trains and judges open_clip's model, unless that is done: {"steps", "losses", "scores"}."""
    file = folder / RECORD
    if file.exists():
        print(f"{folder} is finished: it is not run again")
        return json.loads(file.read_text())
    import torch

    patch_torchvision()
    recipe = open_clip_peer.recipe(objective)
    # Both sides differ by seed in the same places: initialization and data.
    torch.manual_seed(config.seed)
    model = recipe.build().train()
    pipeline = make_pipeline(config, tokenizer)
    units = make_units(config, len(pipeline))
    schedule = make_schedule(config.optimizer, units)
    # As our loop logs: the loss of a step before its update.
    period, last = units.steps(config.log.every, "config.log.every"), units.total_steps - 1
    logged = EverySteps(period, last=last)
    optimizer = torch.optim.AdamW(decayed(model, config.optimizer.weight_decay), **adamw(config))
    mean, std = objective.model.pixels.mean, objective.model.pixels.std
    steps, losses = [], []
    batches = zip(range(units.total_steps), pipeline.batches(), strict=False)
    for step, batch in track(batches, f"{THEIRS}, seed {config.seed}", units.total_steps):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        loss = recipe.loss(model, to_tensors(batch, mean, std))
        loss.backward()
        if config.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            recipe.after_step(model)
        if not step or logged(step):
            steps.append(step)
            losses.append(float(loss.detach()))
    scores = judged(model.eval(), config, evaluator, tokenizer, objective)
    record = {"steps": steps, "losses": losses, "scores": scores, "torch": torch.__version__}
    write_whole(file, json.dumps(record))
    return record


def adamw(config: ConfigDict) -> dict[str, Any]:
    """Returns the arguments of PyTorch's AdamW."""
    optimizer = config.optimizer
    return {"betas": (optimizer.b1, optimizer.b2), "eps": optimizer.eps}


def decayed(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Groups parameters by weight decay, as open_clip's training does."""
    named = dict(model.named_parameters())
    plain = [n for n, p in named.items() if p.ndim < 2 or "bias" in n or "logit_scale" in n]
    return [
        {"params": [named[n] for n in plain], "weight_decay": 0.0},
        {"params": [p for n, p in named.items() if n not in plain], "weight_decay": weight_decay},
    ]


def judged(
    model: Any, config: ConfigDict, evaluator: str, tokenizer: Any, objective: Objective
) -> dict[str, float]:
    """Scores their model by our retrieval evaluator."""
    import torch

    section = config.evaluators[evaluator]
    data = merged_data(config.data, section)
    mean, std = objective.model.pixels.mean, objective.model.pixels.std
    image, text = [], []
    for batch in EvalPipeline(data, tokenizer, batch_size=config.batch_size).batches():
        tensors = to_tensors({k: batch[k] for k in ("image", "text")}, mean, std)
        with torch.no_grad():
            image.append(model.encode_image(tensors["image"], normalize=True)[batch["mask"]])
            text.append(model.encode_text(tensors["text"], normalize=True)[batch["mask"]])
    vectors = [torch.cat(x).numpy().astype(np.float32) for x in (image, text)]
    # One caption an image, as the config's data has it.
    owners = np.arange(len(vectors[1]))
    ranks = rank_both_ways(*vectors, owners)
    ks = tuple(section.get("ks", (1, 5, 10)))
    return RetrievalOutcome(*vectors, owners, owners, *ranks, ks).scores()


def table(scores: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Returns mean, least and most of each score as Markdown: a row for each side, and chance."""
    rows = []
    for name, runs in scores.items():
        values = ([run[score] for run in runs] for score in SCORES)
        cells = (f"{np.mean(v):.4f} ({min(v):.4f} to {max(v):.4f})" for v in values)
        rows.append([name, *cells])
    chance = next(iter(scores.values()))[0]["chance_r1"]
    found = (min(1.0, chance * int(score.rpartition("_r")[2])) for score in SCORES)
    rows.append(["chance", *(f"{cell:.4f}" for cell in found)])
    return harness.markdown(["", *SCORES], rows)


def compare(arguments: argparse.Namespace, argv: Sequence[str]) -> str:
    """Trains what is not finished, draws, writes comparison.json; returns the table."""
    output, name = arguments.output, arguments.evaluator
    configs = [
        config_of(arguments.config, arguments.set, seed, [f"{name}/{SCORES[0]}"])
        for seed in arguments.seeds
    ]
    tokenizer, objective = checked(configs[0], name)  # seeds change neither
    scores: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    curves: dict[str, list[Any]] = {OURS: [], THEIRS: []}
    for config in configs:
        folder = f"seed_{config.seed}"
        theirs = train_theirs(config, name, tokenizer, objective, output / THEIRS / folder)
        train_stage(config, output / "ours" / folder)
        ours = RunRecord.read(output / "ours" / folder)
        prefix = f"eval/{name}/"
        found = {k.removeprefix(prefix): v for k, v in ours.last_scores()[0].items()}
        scores[OURS].append({k: found[k] for k in theirs["scores"]})
        scores[THEIRS].append(theirs["scores"])
        curves[OURS].append(loss_curve(ours))
        curves[THEIRS].append(smoothed(theirs["steps"], theirs["losses"]))
    names = ("config", "set", "seeds")
    content = {name: getattr(arguments, name) for name in names} | {"scores": scores}
    for file in (output / "comparison.json", arguments.json):
        harness.write_json(file, "compare_open_clip", argv, content)
    draw_differences(
        output / "curves.png",
        curves,
        baseline=OURS,
        title=f"{Path(arguments.config).stem} here and in open_clip",
        subtitle=f"mean of {len(configs)} seeds; the band is from the least to the most",
        ylabel="training loss",
    )
    return table(scores)


def command(argv: list[str]) -> None:
    """Trains, compares and prints."""
    arguments = parse(argv)
    harness.start_run()
    print(compare(arguments, argv))
    print(f"see {arguments.output}/curves.png and {arguments.output}/comparison.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
