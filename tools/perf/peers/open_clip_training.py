"""open_clip's model of a config, trained in PyTorch on the batches of our run.

It is open_clip's own model of the same sizes with its own initialization and loss, in float32. It
gets the same batches in the same order, with the same augmentation and tokenizer, as many of them,
and AdamW with the same learning rates, weight decay and bound on gradients. Our retrieval evaluator
judges it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich.progress import track

from tools.perf.peers.torch_models import TORCH_PEERS
from tools.perf.peers.torch_step import patch_torchvision, to_tensors
from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.data.samples import sample_texts
from vlp_jax.data.tokenizers import build_tokenizer
from vlp_jax.errors import UserError
from vlp_jax.evaluators import merged_data
from vlp_jax.evaluators.ranking import rank_both_ways
from vlp_jax.evaluators.retrieval import RetrievalOutcome
from vlp_jax.objectives import Objective, make_objective
from vlp_jax.training.optimizer import make_schedule
from vlp_jax.training.setup import make_pipeline, make_units
from vlp_jax.training.when import EverySteps

EVALUATOR, OPEN_CLIP = "retrieval", TORCH_PEERS["open_clip"]


def checked(config: ConfigDict) -> tuple[Any, Objective]:
    """Makes tokenizer and objective of `config`, if open_clip can train it and be evaluated.

    Raises:
      UserError: it cannot, or the optimizer is another one than AdamW.
    """
    if EVALUATOR not in config.evaluators:
        raise UserError(f"the config has no evaluator {EVALUATOR!r} to judge open_clip's model by")
    optimizer = config.optimizer
    if optimizer.name != "adamw" or optimizer.frozen or optimizer.ema_decay:
        raise UserError(
            "both sides train all parameters with AdamW and without an average: "
            "--set optimizer.name=adamw"
        )
    tokenizer = build_tokenizer(config.tokenizer, lambda: sample_texts(config.data), None)
    objective = make_objective(config.objective, tokenizer)
    refusal = OPEN_CLIP.refusal(objective)
    if refusal:
        raise UserError(f"open_clip has no such model: {refusal}")
    return tokenizer, objective


def train_and_judge(config: ConfigDict) -> dict[str, Any]:
    """Trains open_clip's model; returns {"scores", "loss": (steps, values)}.

    Raises:
      UserError: see `checked`.
    """
    tokenizer, objective = checked(config)
    import torch

    patch_torchvision()
    recipe = OPEN_CLIP.recipe(objective)
    # Both sides differ by seed in the same places: initialization and data.
    torch.manual_seed(config.seed)
    model = recipe.build().train()
    pipeline = make_pipeline(config, tokenizer)
    units = make_units(config, len(pipeline))
    schedule = make_schedule(config.optimizer, units)
    # As our loop logs: the loss of a step before its update.
    period, last = units.steps(config.log.every, "config.log.every"), units.total_steps - 1
    logged = EverySteps(period, last=last, at_start=True)
    optimizer = torch.optim.AdamW(
        decayed(model, config.optimizer.weight_decay),
        betas=(config.optimizer.b1, config.optimizer.b2),
        eps=config.optimizer.eps,
    )
    pixels = objective.model.pixels
    steps, losses = [], []
    batches = zip(range(units.total_steps), pipeline.batches(), strict=False)
    for step, batch in track(batches, f"open_clip, seed {config.seed}", units.total_steps):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        loss = recipe.loss(model, to_tensors(batch, pixels.mean, pixels.std))
        loss.backward()
        if config.optimizer.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            recipe.after_step(model)
        if logged(step):
            steps.append(step)
            losses.append(float(loss.detach()))
    return {"scores": judged(model.eval(), config, tokenizer, objective), "loss": (steps, losses)}


def decayed(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Groups parameters by weight decay, as open_clip's training does."""
    named = dict(model.named_parameters())
    plain = [n for n, p in named.items() if p.ndim < 2 or "bias" in n or "logit_scale" in n]
    return [
        {"params": [named[n] for n in plain], "weight_decay": 0.0},
        {"params": [p for n, p in named.items() if n not in plain], "weight_decay": weight_decay},
    ]


def judged(
    model: Any, config: ConfigDict, tokenizer: Any, objective: Objective
) -> dict[str, float]:
    """Scores their model by our retrieval evaluator."""
    import torch

    section = config.evaluators[EVALUATOR]
    data = merged_data(config.data, section)
    image, text = [], []
    for batch in EvalPipeline(data, tokenizer, batch_size=config.batch_size).batches():
        fields = {key: batch[key] for key in ("image", "text")}
        tensors = to_tensors(fields, objective.model.pixels.mean, objective.model.pixels.std)
        with torch.no_grad():
            image.append(model.encode_image(tensors["image"], normalize=True)[batch["mask"]])
            text.append(model.encode_text(tensors["text"], normalize=True)[batch["mask"]])
    vectors = [torch.cat(x).numpy().astype(np.float32) for x in (image, text)]
    # One caption an image, as the config's data has it.
    owners = np.arange(len(vectors[1]))
    ranks = rank_both_ways(*vectors, owners)
    ks = tuple(section.get("ks", (1, 5, 10)))
    outcome = RetrievalOutcome(*vectors, owners, owners, *ranks, ks)
    return {f"{EVALUATOR}/{name}": value for name, value in outcome.scores().items()}
