"""Trains one config with several settings and several seeds, and shows what the settings change.

python -m tools.perf.compare_settings --output DIR --variant bf16 objective.dtype=bfloat16 \\
    --variant fp8 objective.dtype=bfloat16 objective.quantization=fp8

The first variant, `baseline`, is the config itself with what `--set` gives. Every seed trains each
variant in a folder of its own, DIR/NAME/seed_N; a run that was stopped goes on where it was saved,
and a finished one is not run again, so that a variant or a seed can be added later. What comes out:

- a table: the training loss over the last tenth of the steps and the last scores, as means over
  the seeds, each with its difference from the baseline. Differences are of the same seed, thus of
  the same data in the same order and of the same first weights. The least and the most over the
  seeds stand beside it: a difference whose sign depends on the seed says nothing.
- DIR/curves.png: the loss, and its difference from the baseline, over the steps.
- DIR/settings.json: all of it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as in the demo: they keep two cores busy

import numpy as np
from ml_collections import ConfigDict

from tools.perf import harness
from tools.perf.mae_then_clip import train_stage
from vlp_jax.arguments import load_config, parse_with_overrides
from vlp_jax.errors import UserError
from vlp_jax.objectives import make_objective
from vlp_jax.observe.pictures import draw_differences
from vlp_jax.report.run_record import RunRecord
from vlp_jax.training.abstract_setup import tokenizer_sizes

BASELINE = "baseline"
LOSS = "train/loss"
END = 0.1  # the share of the steps, at the end, over which the loss is averaged
SMOOTHING = 5  # logged steps on either side that a point of a curve is averaged over


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = harness.make_parser("compare_settings", __doc__)
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]", default="demo", help="of all runs (default: demo)")
    add_run_arguments(parser, seeds=[0, 1])
    add(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="a name, and the keys that its runs change; can be given several times",
    )
    add(
        "--score",
        nargs="+",
        default=["zero_shot/top1", "retrieval/image_to_text_r1"],
        metavar="NAME",
        help="scores of the table (default: %(default)s)",
    )
    return parse_with_overrides(parser, argv)[0]


def add_run_arguments(parser: argparse.ArgumentParser, seeds: list[int]) -> None:
    """Adds the arguments of a comparison of runs: their folder, seeds and keys."""
    add = parser.add_argument
    add("--output", type=Path, metavar="DIR", required=True, help="folder of the runs and results")
    told = "default: %(default)s"
    add("--seeds", type=int, nargs="+", default=seeds, metavar="N", help=told)
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the config, in all runs")


def variants_of(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Returns name -> overrides, the baseline first.

    Raises:
      UserError: no variant, one without a setting, or two of a name.
    """
    variants = {BASELINE: list(arguments.set)}
    for name, *settings in arguments.variant:
        if name in variants:
            raise UserError(f"--variant {name}: there are two of that name")
        if not settings:
            raise UserError(f"--variant {name} changes nothing; give it KEY=VALUE")
        variants[name] = [*arguments.set, *settings]
    if len(variants) == 1:
        raise UserError("there is nothing to compare: give --variant NAME KEY=VALUE ...")
    return variants


def config_of(
    file: str, assignments: Sequence[str], seed: int, scores: Sequence[str]
) -> ConfigDict:
    """Loads the config of a run.

    Raises:
      UserError: a key or a value that does not exist, or no evaluator for one of the scores.
    """
    config = load_config(file, [*assignments, f"seed={seed}"])
    # A key that the model does not know is told before the first run, not after hours.
    make_objective(config.objective, tokenizer_sizes(config.tokenizer))
    for score in scores:
        if score.partition("/")[0] not in config.evaluators:
            known = ", ".join(config.evaluators)
            raise UserError(f"--score {score}: the config has no such evaluator (it has: {known})")
    return config


def loss_curve(record: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps, loss) of a run, each point the mean of the logged ones around it."""
    return smoothed(*record.curve(LOSS))


def smoothed(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the curve with each point the mean of the logged ones around it."""
    around = (values[max(at - SMOOTHING, 0) : at + SMOOTHING + 1] for at in range(len(values)))
    return np.asarray(steps), np.asarray([np.mean(window) for window in around])


def figures_of(record: RunRecord, scores: Sequence[str]) -> dict[str, float]:
    """Returns the loss at the end of a run, and its last scores.

    Raises:
      UserError: it has no such score.
    """
    steps, values = record.curve(LOSS)
    # One step's loss is mostly its batch: a tenth of them tells settings apart.
    last = [v for s, v in zip(steps, values, strict=True) if s >= (1 - END) * steps[-1]]
    found = {f"loss of the last {END:.0%}": float(np.mean(last))}
    known = record.last_scores()[0]
    for name in scores:
        if f"eval/{name}" not in known:
            names = ", ".join(key.removeprefix("eval/") for key in known)
            raise UserError(f"--score {name}: {record.path} has none (it has: {names})")
        found[name] = known[f"eval/{name}"]
    return found


def compare(
    records: Mapping[str, Sequence[RunRecord]], scores: Sequence[str]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns variant -> figure -> values by seed, their mean, differences from the baseline.

    Args:
      records: variant -> its runs, by seed in one order.
    """
    figures = {name: [figures_of(r, scores) for r in runs] for name, runs in records.items()}
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for name, runs in figures.items():
        summary[name] = {}
        for figure in runs[0]:
            values = [run[figure] for run in runs]
            base = [run[figure] for run in figures[BASELINE]]
            differences = [a - b for a, b in zip(values, base, strict=True)]
            summary[name][figure] = {
                "values": values,
                "mean": float(np.mean(values)),
                "differences": differences,
                "mean_difference": float(np.mean(differences)),
            }
    return summary


def table(summary: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Returns the figures as Markdown: a row for a variant."""
    rows = []
    for variant, figures in summary.items():
        cells = []
        for figure in figures.values():
            cell = f"{figure['mean']:.4f}"
            if variant != BASELINE:
                least, most = min(figure["differences"]), max(figure["differences"])
                cell += f" ({figure['mean_difference']:+.4f}; {least:+.4f} to {most:+.4f})"
            cells.append(cell)
        rows.append([variant, *cells])
    return harness.markdown(["", *summary[BASELINE]], rows)


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Trains what is not finished, draws, writes settings.json; returns its content."""
    variants, output = variants_of(arguments), arguments.output
    # All configs are checked before the first is trained.
    configs = {
        (name, seed): config_of(arguments.config, settings, seed, arguments.score)
        for seed in arguments.seeds
        for name, settings in variants.items()
    }
    for number, ((name, seed), config) in enumerate(configs.items(), 1):
        print(f"run {number} of {len(configs)}: {name}, seed {seed}", flush=True)
        train_stage(config, output / name / f"seed_{seed}")
    records = {
        name: [RunRecord.read(output / name / f"seed_{seed}") for seed in arguments.seeds]
        for name in variants
    }
    summary = compare(records, arguments.score)
    names = ("config", "seeds")
    content = {name: getattr(arguments, name) for name in names} | {"variants": variants}
    content["figures"] = summary
    for file in (output / "settings.json", arguments.json):
        harness.write_json(file, "compare_settings", argv, content)
    draw_differences(
        output / "curves.png",
        {name: [loss_curve(record) for record in runs] for name, runs in records.items()},
        baseline=BASELINE,
        title=f"{Path(arguments.config).stem} with other settings",
        subtitle=f"mean of {len(arguments.seeds)} seeds; the band is from the least to the most",
        ylabel="training loss",
    )
    return content


def command(argv: list[str]) -> None:
    """Trains, compares and prints."""
    arguments = parse(argv)
    harness.start_run()
    print(table(run(arguments, argv)["figures"]))
    print(f"see {arguments.output}/curves.png and {arguments.output}/settings.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
