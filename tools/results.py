"""Runs the small experiments that docs quote, with several seeds, and writes their figures.

    python -m tools.results --only demo --seeds 3
    python -m tools.results --config demo --variant bf16 objective.dtype=bfloat16 \\
        --variant fp8 objective.dtype=bfloat16 objective.quantization=fp8

The first form runs experiments of a table (--list) and writes docs/results/NAME.json: command,
date, commit, versions, and for each figure its mean, standard deviation and seeds, beside chance
and a baseline that must lose. The second form compares settings of one config: the variant
`baseline` is the config itself, differences are between runs of one seed, thus of the same data in
the same order and of the same first weights, and DIR/settings.json and DIR/curves.png (the loss and
its differences) are written.

Each run has a folder, DIR/STAGE/seed_N. A run that was stopped goes on where it was saved. A
finished run is not run again, so that seeds and variants can be added later.

Exit status: 0; 1 if a figure is not better than chance and its baseline; 2 a mistake of the user.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # as in the demo: they keep two cores busy

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from tools.experiments import END_LOSS, EXPERIMENTS, Experiment, Figure, Record, Stage, read_record
from tools.perf import harness
from vlp_jax import smoke as smoke_lib
from vlp_jax.arguments import load_config, parse_with_overrides
from vlp_jax.errors import UserError
from vlp_jax.files import write_whole
from vlp_jax.objectives import make_objective
from vlp_jax.observe.pictures import draw_differences
from vlp_jax.training import workdir as workdir_lib
from vlp_jax.training.abstract_setup import tokenizer_sizes

BASELINE, SETTINGS = "baseline", "settings"
SMOOTHING = 5  # logged steps on either side that a point of a curve is averaged over
NOT_BETTER = 1
Records = dict[str, list[Record]]  # stage -> by seed


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = harness.make_parser("tools.results", __doc__)
    add, told = parser.add_argument, "default: %(default)s"
    add("--only", nargs="+", default=[], metavar="NAME", help="experiments (default: all)")
    add("--list", action="store_true", help="print the experiments, and end")
    add("--seeds", type=int, default=3, metavar="N", help=f"seeds 0 to N - 1; {told}")
    where = "of runs (default: runs/results, or runs/settings_CONFIG with --config)"
    add("--output", type=Path, metavar="DIR", help=where)
    add("--results", type=Path, default="docs/results", metavar="DIR", help=f"of figures; {told}")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the config, in all runs")
    add("--smoke", action="store_true", help="two steps on tiny shapes, to try: no score counts")
    add("--config", metavar="FILE[:ARG]", help="compare settings of this config")
    names = ("NAME", "KEY=VALUE")
    told = "a name, and the keys that its runs change; can be given several times"
    add("--variant", nargs="+", action="append", default=[], metavar=names, help=told)
    scores, told = (
        ["zero_shot/top1", "retrieval/image_to_text_r1"],
        "compared; default: %(default)s",
    )
    add("--score", nargs="+", default=scores, metavar="NAME", help=told)
    arguments, _ = parse_with_overrides(parser, argv, "seeds")
    if arguments.output is None:
        stem = Path((arguments.config or "").partition(":")[0]).stem
        arguments.output = Path(f"runs/settings_{stem}" if arguments.config else "runs/results")
    return arguments


def settings_experiment(arguments: argparse.Namespace) -> Experiment:
    """Makes the experiment that compares settings.

    Raises:
      UserError: no variant, one without a setting, or two of a name.
    """
    stages = {BASELINE: Stage(arguments.config)}
    for name, *settings in arguments.variant:
        if name in stages:
            raise UserError(f"--variant {name}: there are two of that name")
        if not settings:
            raise UserError(f"--variant {name} changes nothing; give it KEY=VALUE")
        stages[name] = Stage(arguments.config, tuple(settings))
    if len(stages) == 1:
        raise UserError("there is nothing to compare: give --variant NAME KEY=VALUE ...")
    scores = (END_LOSS, *arguments.score)
    figures = {
        f"{name}: {score}": Figure(name, score, None, BASELINE)
        for name in stages
        for score in scores
    }
    return Experiment(stages, figures)


def chosen(arguments: argparse.Namespace) -> dict[str, Experiment]:
    """Returns the experiments by name.

    Raises:
      UserError: a name that is not known, or a mistake in the variants.
    """
    if arguments.config or arguments.variant:
        if arguments.only or not arguments.config:
            raise UserError("give --only NAME, or --config FILE with --variant NAME KEY=VALUE")
        return {SETTINGS: settings_experiment(arguments)}
    harness.check_names(arguments.only, EXPERIMENTS, "--only")
    return {name: EXPERIMENTS[name] for name in arguments.only or EXPERIMENTS}


def config_of(stage: Stage, more: Sequence[str], seed: int, smoke: bool) -> ConfigDict:
    """Loads the config of a run.

    Raises:
      UserError: a key or a value that does not exist.
    """
    config = load_config(stage.config, [*stage.overrides, *more, f"seed={seed}"])
    # A key that the model does not know is told before the first run, not after hours.
    make_objective(config.objective, tokenizer_sizes(config.tokenizer))
    return smoke_lib.smoke(config) if smoke else config


def check_scores(experiment: Experiment, configs: Mapping[str, ConfigDict]) -> None:
    """Raises UserError if a config has no evaluator for a score of it."""
    for figure in experiment.figures.values():
        name, slash, _ = figure.score.partition("/")
        known = configs[figure.stage].evaluators
        if slash and name not in known:
            raise UserError(
                f"--score {figure.score}: the config has no such evaluator (it has: "
                f"{', '.join(known)})"
            )


def run_stages(
    stages: Mapping[str, Stage], configs: Mapping[tuple[str, int], ConfigDict], output: Path
) -> Records:
    """Runs what is not finished, and tells how far it is; returns the records of all by stage.

    Args:
      configs: by stage and seed, in the order in which they run.
    """
    records: Records = {name: [] for name in stages}
    seconds: list[float] = []
    for number, ((name, seed), config) in enumerate(configs.items(), 1):
        told = f"run {number} of {len(configs)}: {name}, seed {seed}"
        if seconds:
            left = statistics.mean(seconds) * (len(configs) - number + 1)
            told += f"; about {left / 60:.0f} min left"
        print(told, flush=True)
        stage, folder = stages[name], output / name / f"seed_{seed}"
        found = read_record(folder)
        if found:
            print(f"{folder} is finished: it is not run again")
            # A finished run may be of an older config: the figures are of that one.
            for change in workdir_lib.changes(epath.Path(folder), config):
                if not change.startswith(("config.init_from.source", "config.tokenizer.file")):
                    print(f"note: {change}")
        else:
            begin = time.perf_counter()
            source = output / stage.start / f"seed_{seed}" if stage.start else None
            found = stage.run(config, folder, source)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "result.json", json.dumps(found))
            seconds.append(time.perf_counter() - begin)
        records[name].append(found)
    return records


def score_of(records: Records, stage: str, name: str) -> list[float]:
    """Returns a score of a stage by seed.

    Raises:
      UserError: its runs have no such score.
    """
    for record in records[stage]:
        if name not in record["scores"]:
            known = ", ".join(record["scores"])
            raise UserError(f"the runs of {stage} have no score {name} (they have: {known})")
    return [record["scores"][name] for record in records[stage]]


def figure_of(figure: Figure, records: Records) -> dict[str, Any]:
    """Returns mean, standard deviation and values over the seeds, beside chance and baseline."""
    values = score_of(records, figure.stage, figure.score)
    chance, base = figure.chance, None
    if isinstance(chance, str):
        chance = float(np.mean(score_of(records, figure.stage, chance)))
    if figure.baseline or figure.baseline_score:
        stage, score = figure.baseline or figure.stage, figure.baseline_score or figure.score
        base = score_of(records, stage, score)
    found = {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "seeds": len(values),
        "values": values,
        "chance": chance,
        "baseline": None if base is None else float(np.mean(base)),
    }
    if base is not None:
        # Of the same seed: the rest of the variance is not the baseline's.
        found["differences"] = [a - b for a, b in zip(values, base, strict=True)]
    return found


def faults(experiment: Experiment, figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a line for each figure that is not better than chance or its baseline."""
    lines = []
    for name, found in figures.items():
        sign = -1 if experiment.figures[name].smaller else 1
        for against in ("chance", "baseline"):
            other = found[against]
            if other is not None and not sign * found["mean"] > sign * other:
                lines.append(f"{name}: {found['mean']:.4f} is no better than {against} {other:.4f}")
    return lines


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the figures as Markdown."""

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    rows = []
    for name, found in figures.items():
        differences = found.get("differences")
        ends = ""
        if differences:
            least, most = min(differences), max(differences)
            ends = f"{np.mean(differences):+.4f} ({least:+.4f} to {most:+.4f})"
        value = f"{found['mean']:.4f} ± {found['std']:.4f}"
        rows.append([name, value, cell(found["chance"]), cell(found["baseline"]), ends])
    return harness.markdown(("figure", "mean ± std", "chance", "baseline", "difference"), rows)


def smoothed(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the curve with each point the mean of the logged ones around it."""
    around = (values[max(at - SMOOTHING, 0) : at + SMOOTHING + 1] for at in range(len(values)))
    return np.asarray(steps), np.asarray([np.mean(window) for window in around])


def draw_curves(file: Path, records: Records, config: str) -> None:
    """Draws the loss of each variant, and its difference from the baseline."""
    draw_differences(
        file,
        {name: [smoothed(*run["loss"]) for run in runs] for name, runs in records.items()},
        baseline=BASELINE,
        title=f"{Path(config).stem} with other settings",
        subtitle=f"mean of {len(records[BASELINE])} seeds; the band is from the least to the most",
        ylabel="training loss",
    )


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> list[str]:
    """Runs what is not finished, prints and writes; returns a line for each figure that fails."""
    found = chosen(arguments)
    stages = {name: stage for one in found.values() for name, stage in one.stages.items()}
    # All configs are checked before the first is trained.
    configs = {
        (name, seed): config_of(stage, arguments.set, seed, arguments.smoke)
        for seed in range(arguments.seeds)
        for name, stage in stages.items()
    }
    compared = found.get(SETTINGS)
    if compared:
        check_scores(compared, {name: configs[name, 0] for name in stages})
    records = run_stages(stages, configs, arguments.output)
    wrong = []
    for name, experiment in found.items():
        figures = {key: figure_of(one, records) for key, one in experiment.figures.items()}
        print(f"\n{name}\n{table(figures)}")
        told = {key: [s.config, *s.overrides, *arguments.set] for key, s in stages.items()}
        content = {"stages": {key: told[key] for key in experiment.stages}, "figures": figures}
        folder = arguments.output if compared else arguments.results
        folder.mkdir(parents=True, exist_ok=True)
        for file in (folder / f"{name}.json", arguments.json):
            harness.write_json(file, "tools.results", argv, content)
        if compared:
            draw_curves(folder / "curves.png", records, arguments.config)
        else:
            wrong += [f"{name}: {line}" for line in faults(experiment, figures)]
    return wrong


def command(argv: list[str]) -> int:
    """Runs the experiments; returns the exit status."""
    arguments = parse(argv)
    if arguments.list:
        print("\n".join(f"{name:<16} {one.about}" for name, one in EXPERIMENTS.items()))
        return 0
    harness.start_run()
    wrong = run(arguments, argv)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return NOT_BETTER if wrong and not arguments.smoke else 0


main = harness.main_of(command)

if __name__ == "__main__":
    sys.exit(main())
