"""Named lists of variants of a training step, for `tools.bench_compile --set`."""

from __future__ import annotations

from vlp_jax.planning.variants import Variant

# The first of each is what the ratios refer to.
SETS: dict[str, tuple[Variant, ...]] = {
    "attention": (
        Variant("xla", ("objective.attention=xla",)),
        Variant("xla_bf16", ("objective.attention=xla_bf16",)),
        Variant("xla_padded", ("objective.attention=xla_padded",)),
        Variant("pallas", ("objective.attention=pallas",)),
    ),
    "remat": (
        Variant("none", ("objective.remat=none",)),
        Variant("dots", ("objective.remat=dots",)),
        Variant("names", ("objective.remat=names",)),
        Variant("names_lean", ("objective.remat=names_lean",)),
        Variant("offload", ("objective.remat=offload",)),
        Variant("full", ("objective.remat=full",)),
    ),
    "memory": (
        Variant("as it is"),
        Variant("microbatches 2", ("microbatches=2",)),
        Variant("microbatches 4", ("microbatches=4",)),
        Variant("state sharded", ("mesh.preset=fsdp",)),
        Variant("Adam", ("optimizer.name=adamw",)),
        Variant("full remat", ("objective.remat=full",)),
    ),
    "loss": (
        Variant("plain", ("objective.loss_form=plain",)),
        Variant("blocked", ("objective.loss_form=blocked",)),
        Variant(
            "blocks of 1024", ("objective.loss_form=blocked", "objective.loss_block_size=1024")
        ),
    ),
    "precision": (
        Variant("bfloat16", ("objective.dtype=bfloat16",)),
        Variant("float32", ("objective.dtype=float32",)),
    ),
    "layers": (
        Variant("scanned", ("objective.scan_layers=True",)),
        Variant("unrolled", ("objective.scan_layers=False",)),
    ),
    "tokens": (
        Variant("196 tokens", ("objective.image.image_size=224",)),
        Variant("256 tokens", ("objective.image.image_size=256",)),
    ),
}
