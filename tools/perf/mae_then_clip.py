"""A masked autoencoder, then CLIP from its weights and CLIP from scratch, side by side.

python -m tools.perf.mae_then_clip --output DIR

Three runs on the embedded `shapes`, each in a folder of its own: DIR/mae, then DIR/from_mae, whose
image tower starts as the encoder of the first, and DIR/from_scratch, the same run without these
weights. A run that was stopped goes on where it was saved, and a finished run is not run again.
Results: DIR/painted.png (patches that the autoencoder paints), DIR/curves.png (zero-shot accuracy
of both CLIP runs) and DIR/summary.json.
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

from etils import epath
from ml_collections import ConfigDict

from tools.perf import harness
from vlp_jax import config as config_lib
from vlp_jax import evaluate
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.observe.pictures import draw_comparison, draw_reconstructions
from vlp_jax.observe.plots import Curve
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.report.material import hidden_share, paint
from vlp_jax.report.run_record import RunRecord
from vlp_jax.train import train
from vlp_jax.training import checkpoint
from vlp_jax.training import workdir as workdir_lib
from vlp_jax.training.setup import make_pipeline, make_units

CONFIG = "mae_then_clip"
MAE, FROM_MAE, FROM_SCRATCH = "mae", "from_mae", "from_scratch"
LABELS = {FROM_MAE: "from MAE", FROM_SCRATCH: "from scratch"}
SCORE, ERROR = "eval/zero_shot/top1", "eval/reconstruction/error"
STEP_SECONDS = "perf/step_seconds"
DEMO_TOP1 = 0.955  # zero-shot top-1 of the demo after its 400 steps: 0.9557, rounded down
EVALUATOR, SHOWN_IMAGES = "reconstruction", 24


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = harness.make_parser("mae_then_clip", __doc__)
    add = parser.add_argument
    told = "folder of the runs and the results (default: %(default)s)"
    add("--output", type=Path, metavar="DIR", default=Path("mae_then_clip"), help=told)
    told = "a config that takes :mae and :clip (default: %(default)s)"
    add("--config", metavar="FILE", default=CONFIG, help=told)
    told = "zero-shot accuracy to be reached, in [0, 1] (default: the demo's, %(default)s)"
    add("--target", type=float, metavar="TOP1", default=DEMO_TOP1, help=told)
    return parse_with_overrides(parser, argv)[0]


def is_finished(config: ConfigDict, workdir: epath.Path) -> bool:
    """Whether a checkpoint of the last step is there.

    Opens the training data if `config.duration` is in epochs, and if there is any checkpoint.
    """
    saved = checkpoint.saved_steps(checkpoint.absolute(workdir))
    if not saved:
        return False
    examples = None
    if config.duration.epochs is not None:
        examples = len(make_pipeline(config, workdir_lib.open_tokenizer(workdir, config)))
    return make_units(config, examples).total_steps in saved


def train_stage(config: ConfigDict, workdir: Path) -> None:
    """Runs the rest of a stage; nothing if it is finished.

    Raises:
      UserError, Preempted: see `vlp_jax.train.train`.
    """
    if is_finished(config, epath.Path(workdir)):
        print(f"{workdir} is finished: it is not run again")
        # A finished run may be of an older config: the figures are of that one.
        for change in workdir_lib.changes(epath.Path(workdir), config):
            print(f"note: {change}")
        return
    train(config, workdir, StartupClock())


def first_step(curve: Curve, target: float) -> int | None:
    """Returns the first step with a score of at least `target`; None if there is none."""
    return next((step for step, value in zip(*curve, strict=True) if value >= target), None)


def seconds_of(workdir: Path) -> float:
    """Returns the seconds of a run's steps, without start, evaluation and checkpoints."""
    steps, seconds = RunRecord.read(workdir).curve(STEP_SECONDS)
    # A value is the mean since the last logged step.
    return sum(s * (b - a) for s, a, b in zip(seconds, [-1, *steps], steps, strict=False))


def summarize(output: Path, target: float) -> dict[str, Any]:
    """Returns the scores, steps and seconds of the three runs."""
    steps, errors = RunRecord.read(output / MAE).curve(ERROR)
    summary: dict[str, Any] = {
        "target": target,
        MAE: {
            "steps": steps[-1],
            "reconstruction_error": errors[-1],
            "step_seconds": round(seconds_of(output / MAE), 1),
        },
    }
    for name in LABELS:
        steps, values = RunRecord.read(output / name).curve(SCORE)
        summary[name] = {
            "steps": steps,
            "zero_shot_top1": values,
            "reaches_target_at": first_step((steps, values), target),
            "step_seconds": round(seconds_of(output / name), 1),
        }
    return summary


def draw_painted(
    workdir: Path,
    output: Path,
    *,
    step: int | None = None,
    evaluator: str = EVALUATOR,
    count: int = SHOWN_IMAGES,
) -> None:
    """Draws test images of the evaluator: seen by the encoder, painted, and as they are.

    Raises:
      UserError: no run, checkpoint or evaluator, or a run of another kind.
    """
    subject, loaded = evaluate.load_run(workdir, step)
    views = paint(subject, loaded, evaluator, count)
    draw_reconstructions(
        output,
        views,
        title="Hidden patches, painted by a masked autoencoder",
        subtitle=(
            f"{loaded.step:,} steps; {hidden_share(subject):.0%} of the patches are hidden; images "
            "it was not trained on"
        ),
    )


def draw(output: Path, summary: Mapping[str, Any]) -> None:
    """Writes painted.png and curves.png."""
    draw_painted(output / MAE, output / "painted.png")
    draw_comparison(
        output / "curves.png",
        {
            label: (summary[name]["steps"], summary[name]["zero_shot_top1"])
            for name, label in LABELS.items()
        },
        title="CLIP from a masked autoencoder and from scratch",
        subtitle=(
            f"the same run; one begins with the image tower of {summary[MAE]['steps']:,} steps of "
            "masked autoencoding"
        ),
        ylabel="zero-shot top-1",
        target=summary["target"],
        target_label="the demo at its end" if summary["target"] == DEMO_TOP1 else "target",
    )


def run(output: Path, mae: ConfigDict, clip: ConfigDict, target: float) -> dict[str, Any]:
    """Runs what is not finished, draws, writes summary.json; returns the summary.

    Args:
      mae, clip: configs of the two stages; `clip.init_from.rules` say what is taken from the first.
    """
    train_stage(mae, output / MAE)
    # The same config but for its start: nothing else tells the runs apart.
    tuned = clip.copy_and_resolve_references()
    with tuned.unlocked():
        tuned.init_from.source = str(output / MAE)
    train_stage(tuned, output / FROM_MAE)
    train_stage(clip, output / FROM_SCRATCH)
    summary = summarize(output, target)
    draw(output, summary)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def report(summary: Mapping[str, Any]) -> str:
    """Returns both curves as a table, when each gets to the target, and the seconds of steps."""
    columns = {
        label: dict(zip(summary[name]["steps"], summary[name]["zero_shot_top1"], strict=True))
        for name, label in LABELS.items()
    }
    lines = ["zero-shot top-1", "steps".rjust(6) + "".join(f"{label:>14}" for label in columns)]
    for step in sorted(set().union(*columns.values())):
        cells = (f"{column[step]:.3f}" if step in column else "-" for column in columns.values())
        lines.append(f"{step:>6}" + "".join(f"{cell:>14}" for cell in cells))
    for name, label in LABELS.items():
        step = summary[name]["reaches_target_at"]
        when = "is never reached" if step is None else f"is reached at step {step}"
        lines.append(f"{label}: {summary['target']} {when}")
    seconds = ", ".join(f"{n} {summary[n]['step_seconds']:.0f} s" for n in (MAE, *LABELS))
    error = summary[MAE]["reconstruction_error"]
    lines.append(f"steps took: {seconds}; reconstruction error after {MAE}: {error:.4f}")
    return "\n".join(lines)


def command(argv: list[str]) -> None:
    """Trains, draws, prints and writes."""
    arguments = parse(argv)
    harness.start_run()
    mae, clip = (config_lib.load(f"{arguments.config}:{stage}") for stage in ("mae", "clip"))
    output = arguments.output
    summary = run(output, mae, clip, arguments.target)
    print(report(summary))
    print(f"see {output}/painted.png, {output}/curves.png and {output}/summary.json")
    harness.write_json(arguments.json, "mae_then_clip", argv, summary)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
