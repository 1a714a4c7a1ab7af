"""What a masked autoencoder saves by encoding visible patches alone: FLOPs of compiled steps.

python -m tools.mae_flops
python -m tools.mae_flops --depth 3 --decoder-depth 2

A training step (forward, backward, AdamW) is compiled for CPU and never run, with `--mask-ratio` of
the patches hidden and with none: for the encoder alone, and for the whole autoencoder. The
objective has to hide something, so that the whole step "unmasked" hides one patch of all. Figures
are GFLOPs of an example: of the step's `cost_analysis()` over the batch, and 3 x the analytic
forward pass (a backward pass costs two), which counts matrix products alone.

The defaults are ViT-B/16 and the decoder of He et al. (2022), minutes on two cores. Compiling takes
as long as there are layers; with fewer the ratio of the encoder is nearly the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlp_jax import config as config_lib
from vlp_jax.errors import UserError
from vlp_jax.models.vit import VisionTransformer
from vlp_jax.objectives.base import (
    Batch,
    BatchSpec,
    Context,
    Field,
    LossOutput,
    Objective,
    Params,
)
from vlp_jax.objectives.flops import count_flops
from vlp_jax.objectives.masked_autoencoding import MaskedAutoencoding, make_masked_autoencoding
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.training.command import run_command
from vlp_jax.training.optimizer import make_optimizer, make_schedule
from vlp_jax.training.state import abstract_state
from vlp_jax.training.step import compile_step, make_step
from vlp_jax.training.when import Units

PATCH_SIZE = 16
HEAD_WIDTH = 32  # of the decoder, as published
GIGA = 1e9
ABOVE_ZERO = ("width", "depth", "mlp_dim", "heads", "decoder_depth", "image_size", "batch_size")


class Cost(NamedTuple):
    """FLOPs of a training step, of one example."""

    compiled: float
    analytic: float


class Row(NamedTuple):
    """What is trained, on few patches and on all."""

    name: str
    masked: Cost
    unmasked: Cost

    @property
    def ratios(self) -> Cost:
        """Masked over unmasked."""
        return Cost(*(few / all_ for few, all_ in zip(self.masked, self.unmasked, strict=True)))


@dataclasses.dataclass(frozen=True)
class EncoderAlone(Objective):
    """As much of an objective as a step needs, of an encoder that sees the first `kept` patches.

    The loss is the mean square of what comes out, which costs next to nothing.
    """

    image: VisionTransformer
    kept: int

    def init(self, rng: PRNGKeyArray, batch_spec: BatchSpec) -> Params:
        """Fresh parameters."""
        return self.image.init(rng, jnp.zeros((1, *batch_spec["image"].shape[1:])))["params"]

    @property
    def reads(self) -> dict[str, Field]:
        """Images."""
        return {"image": Field.pixels(self.image.image_size)}

    def loss(
        self, params: Params, batch: Batch, context: Context
    ) -> tuple[Float[Array, ""], LossOutput]:
        """Mean square of the encoder's tokens."""
        image = batch["image"].astype(self.image.compute.dtype)
        all_of_them = self.kept == self.image.patches
        keep = jnp.broadcast_to(jnp.arange(self.kept), (len(image), self.kept))
        x = self.image.apply({"params": params}, image, None if all_of_them else keep)
        return jnp.square(x.astype(jnp.float32)).mean(), LossOutput({})


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.mae_flops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--width", default=768, help="of the encoder (default: 768)", **number)
    parser.add_argument("--depth", default=12, help="its layers (default: 12)", **number)
    parser.add_argument("--mlp-dim", default=3072, help="its MLPs (default: 3072)", **number)
    parser.add_argument("--heads", default=12, help="its heads (default: 12)", **number)
    parser.add_argument(
        "--decoder-width",
        default=512,
        help=f"a multiple of {HEAD_WIDTH}, the width of its heads (default: 512)",
        **number,
    )
    parser.add_argument("--decoder-depth", default=8, help="layers (default: 8)", **number)
    parser.add_argument("--image-size", default=224, help="pixels (default: 224)", **number)
    parser.add_argument("--batch-size", default=64, help="examples (default: 64)", **number)
    parser.add_argument(
        "--mask-ratio",
        type=float,
        default=0.75,
        metavar="R",
        help="share of the patches that is hidden (default: 0.75)",
    )
    parser.add_argument("--markdown", action="store_true", help="print a table for the docs")
    return parser.parse_args(argv)


def make_objective(arguments: argparse.Namespace, mask_ratio: float) -> MaskedAutoencoding:
    """The autoencoder. Its layers stand one by one: the body of a scan would count once."""
    width = arguments.decoder_width
    image = {
        "variant": f"B/{PATCH_SIZE}",
        "image_size": arguments.image_size,
        "width": arguments.width,
        "depth": arguments.depth,
        "mlp_dim": arguments.mlp_dim,
        "heads": arguments.heads,
    }
    decoder = {
        "width": width,
        "depth": arguments.decoder_depth,
        "mlp_dim": 4 * width,
        "heads": width // HEAD_WIDTH,
    }
    try:
        return make_masked_autoencoding(
            image=image, decoder=decoder, mask_ratio=mask_ratio, scan_layers=False
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def cost(objective: Any, image_size: int, batch_size: int) -> Cost:
    """Of the compiled training step of `objective`, which is not run."""
    mesh = mesh_lib.make_mesh({"replica": 1}, jax.devices("cpu")[:1])
    settings = config_lib.base().optimizer
    units = Units(batch_size, None, total_steps=100)  # of the schedule, which costs nothing
    optimizer, schedule = make_optimizer(settings, units), make_schedule(settings, units)
    spec = {"image": jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.uint8)}
    state = abstract_state(objective, optimizer, spec, mesh)
    step = compile_step(make_step(objective, optimizer, schedule, seed=0), state, spec, mesh)
    flops = step.program.cost_analysis()["flops"]
    context = Context(jax.random.key(0))
    forward = count_flops(lambda p, b: objective.loss(p, b, context), state.params, spec).total
    return Cost(flops / batch_size, 3 * forward / batch_size)


def measure(arguments: argparse.Namespace) -> list[Row]:
    """A row for the encoder alone and one for the whole step."""
    sizes = arguments.image_size, arguments.batch_size
    masked = make_objective(arguments, arguments.mask_ratio)
    image = masked.model.image
    nearly_none = make_objective(arguments, 0.5 / image.patches)
    few, full = (EncoderAlone(image, kept) for kept in (masked.kept, image.patches))
    return [
        Row("encoder alone", cost(few, *sizes), cost(full, *sizes)),
        Row("whole step", cost(masked, *sizes), cost(nearly_none, *sizes)),
    ]


def table(rows: Sequence[Row], markdown: bool) -> str:
    """Two lines for each row: what the compiler counts, and the analytic figures."""
    cells = [["step", "figures", "masked", "unmasked", "ratio"]]
    for row in rows:
        for name in Cost._fields:
            few, full, ratio = (getattr(x, name) for x in (row.masked, row.unmasked, row.ratios))
            figures = [f"{few / GIGA:.2f}", f"{full / GIGA:.2f}", f"{ratio:.3f}"]
            cells.append([row.name, name, *figures])
    if markdown:
        cells.insert(1, ["---", "---", "---:", "---:", "---:"])
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return "\n".join(
        f"{step:<15}{kind:<10}{few:>10}{full:>10}{ratio:>8}"
        for step, kind, few, full, ratio in cells
    )


def expectation(objective: MaskedAutoencoding) -> str:
    """What the ratio of the encoder should be, in words."""
    image = objective.model.image
    few, full = image.prefix_tokens + objective.kept, image.tokens
    share = few / full
    return (
        f"The encoder sees {few} of {full} tokens, a share of {share:.3f}: so should be its ratio "
        f"in projections and MLPs, {share**2:.3f} in the two products of attention, and a little "
        "below the first over all. The decoder sees all tokens in both, so the whole step saves "
        "less."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        for name in ABOVE_ZERO:
            if getattr(arguments, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is at least 1")
        if arguments.decoder_width < 1 or arguments.decoder_width % HEAD_WIDTH:
            raise UserError(f"--decoder-width is a multiple of {HEAD_WIDTH}")
        jax.config.update("jax_platforms", "cpu")
        # A program from the cache may come without its figures.
        jax.config.update("jax_enable_compilation_cache", False)
        objective = make_objective(arguments, arguments.mask_ratio)
        print(
            f"GFLOPs of a training step, of one of {arguments.batch_size} examples, compiled for "
            f"CPU by jax {jax.__version__}: {arguments.depth} layers {arguments.width} wide, "
            f"{arguments.decoder_depth} of {arguments.decoder_width} in the decoder, images of "
            f"{arguments.image_size} px in patches of {PATCH_SIZE}\n"
        )
        print(table(measure(arguments), arguments.markdown))
        print(f"\n{expectation(objective)}")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
