"""CLIP_benchmark's own command on our models.

    vlp-jax clip-benchmark eval --model_type vlp_jax --model runs/clip --pretrained "" \\
        --dataset wds/mine --dataset_root DIR --task zeroshot_classification --output scores.json

`--model` is a workdir or FORMAT:PATH, `--pretrained` a step or "". All other arguments are
CLIP_benchmark's, whose `eval --help` lists them. Give `--output`: its default is made of the
model's name, which is a path here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vlp_jax.parallel import startup
from vlp_jax.training.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(__doc__)
        return 2

    def command() -> None:
        from vlp_jax.encoders.clip_benchmark import mend_accuracy, register

        # CLIP_benchmark starts anew for each dataset, with the same programs.
        startup.use_compilation_cache()
        register()
        if mend_accuracy():
            print("note: CLIP_benchmark's accuracy() does not run with this NumPy; ours counts")
        from clip_benchmark import cli

        if "--model_type" not in arguments and arguments[0] == "eval":
            arguments.extend(["--model_type", "vlp_jax"])
        sys.argv = ["clip_benchmark", *arguments]  # it parses these alone
        cli.main()

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
