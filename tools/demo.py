"""The demo: pretrain CLIP on the embedded `shapes`, evaluate it, and draw the result.

make demo, or: python -m tools.demo --output demo
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# XLA runs one program on one thread of the host more than on several cores: two devices that share
# the batch keep two cores busy, and the sharding of a real run is at work in its smallest form.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")

import numpy as np

from vlp_jax import config as config_lib
from vlp_jax import evaluate
from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.encoders.subject import Subject
from vlp_jax.observe.plots import report_sheet
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.parallel import startup
from vlp_jax.report.run_record import RunRecord
from vlp_jax.train import train
from vlp_jax.training.command import run_command
from vlp_jax.training.restore import LoadedParameters

ROOT = Path(__file__).resolve().parent.parent
SHOWN_IMAGES = 12
SHOWN_PAIRS = 48  # of the similarity matrix
CURVES = {
    "loss": "train/loss",
    "zero-shot top-1": "eval/zero_shot/top1",
    "zero-shot top-1, unseen": "eval/zero_shot_unseen/top1",
    "image-to-text R@1": "eval/retrieval/image_to_text_r1",
}

# name in summary.json -> (score, type)
SUMMARY: dict[str, tuple[str, type]] = {
    "zero_shot_top1": ("zero_shot/top1", float),
    "zero_shot_classes": ("zero_shot/classes", int),
    "zero_shot_top1_unseen": ("zero_shot_unseen/top1", float),
    "image_to_text_r1": ("retrieval/image_to_text_r1", float),
    "text_to_image_r1": ("retrieval/text_to_image_r1", float),
    "zero_shot_examples": ("zero_shot/examples", int),
    "zero_shot_unseen_examples": ("zero_shot_unseen/examples", int),
    "retrieval_pairs": ("retrieval/pairs", int),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of the results")
    parser.add_argument("--config", default=str(ROOT / "configs" / "demo.py"), help="what to train")
    parser.add_argument(
        "--setup-seconds", type=float, default=0.0, help="what the installation took, to report"
    )
    return parser.parse_args(argv)


def test_pairs(subject: Subject, loaded: LoadedParameters) -> dict[str, Any]:
    """Returns images and captions of the retrieval evaluator, and their similarity matrix."""
    retrieval = subject.evaluators["retrieval"]
    pipeline: EvalPipeline = subject.open_evaluation_data("retrieval", ("text_raw",))
    images, captions = [], []
    for batch in pipeline.batches():
        images.append(batch["image"][batch["mask"]])
        captions.extend(text.decode() for text in batch["text_raw"][batch["mask"]])
    return {
        "images": np.concatenate(images),
        "captions": captions,
        "similarity": retrieval.similarity(loaded.params),
    }


def draw(path: Path, record: RunRecord, pairs: dict[str, Any], summary: dict[str, Any]) -> None:
    """Writes report.png."""
    captions, similarity = pairs["captions"], pairs["similarity"]
    best = similarity.argmax(axis=1)
    sheet = report_sheet(
        title="A CLIP model, pretrained from nothing on two CPU cores",
        subtitle=(
            f"{summary['train_seconds']:.0f} s on the embedded shapes: zero-shot top-1 "
            f"{summary['zero_shot_top1']:.2f} over {summary['zero_shot_classes']} classes, "
            f"{summary['zero_shot_top1_unseen']:.2f} on combinations never seen, "
            f"image-to-text R@1 {summary['image_to_text_r1']:.2f} over {len(captions):,} test pairs"
        ),
        images=pairs["images"][:SHOWN_IMAGES],
        true_captions=captions[:SHOWN_IMAGES],
        retrieved_captions=[captions[i] for i in best[:SHOWN_IMAGES]],
        # By text, not by number: several scenes may have the same caption.
        correct=[captions[i] == captions[n] for n, i in enumerate(best[:SHOWN_IMAGES])],
        similarity=similarity[:SHOWN_PAIRS, :SHOWN_PAIRS],
        curves={name: record.curve(key) for name, key in CURVES.items()},
        chance={
            "zero-shot top-1": 1 / summary["zero_shot_classes"],
            "image-to-text R@1": 1 / len(captions),
        },
    )
    sheet.save(path)


def run(output: Path, config_file: str, setup_seconds: float) -> dict[str, Any]:
    """Trains into `output/run`, evaluates, draws `output/report.png`; returns the summary."""
    begin, workdir = time.time(), output / "run"
    train(config_lib.load(config_file), workdir, StartupClock.from_process_start())
    train_seconds = time.time() - begin
    record = RunRecord.read(workdir)
    scores, _ = record.last_scores()
    summary = {name: kind(scores[f"eval/{score}"]) for name, (score, kind) in SUMMARY.items()}
    summary["train_seconds"] = round(train_seconds, 1)
    summary["setup_seconds"] = round(setup_seconds, 1)
    pairs = test_pairs(*evaluate.load_run(workdir))
    draw(output / "report.png", record, pairs, summary)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def report(summary: dict[str, Any], output: Path) -> str:
    """Returns the last lines: each score with its chance."""
    classes, pairs = summary["zero_shot_classes"], summary["retrieval_pairs"]
    rows = [
        (f"zero-shot top-1, {classes} classes", summary["zero_shot_top1"], 1 / classes),
        ("zero-shot top-1, unseen combinations", summary["zero_shot_top1_unseen"], 1 / classes),
        (f"image-to-text R@1, {pairs:,} test pairs", summary["image_to_text_r1"], 1 / pairs),
    ]
    lines = [
        f"trained and evaluated in {summary['train_seconds']:.0f} s "
        f"(installation {summary['setup_seconds']:.0f} s)",
        f"see {output}/report.png and {output}/summary.json",
    ]
    lines += [f"{name:<40} {value:.3f}   (chance {chance:.3f})" for name, value, chance in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        startup.initialize()
        startup.use_compilation_cache()
        summary = run(arguments.output, arguments.config, arguments.setup_seconds)
        print(report(summary, arguments.output))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
