"""Parts of the mapping that several of open_clip's models share."""

from __future__ import annotations

from vlp_jax.interop.tables import CONV, SQUEEZED, Entry, Table, fused, heads_out, linear, norm


def native_tower() -> Table:
    """Maps open_clip's native image tower."""
    return [
        Entry("image/class_token", "visual.class_embedding", SQUEEZED),
        Entry("image/position_embedding", "visual.positional_embedding"),
        Entry("image/patch_embedding/projection/kernel", "visual.conv1.weight", CONV),
        *norm("image/pre_norm", "visual.ln_pre"),
        *layers("image/encoder/layers", "visual.transformer.resblocks.{i}"),
        *norm("image/encoder/norm", "visual.ln_post"),
        *norm("image/norm", "visual.ln_post"),  # with norm_after_pool
    ]


def layers(ours: str, theirs: str) -> Table:
    """Maps the layers of a tower, or a single layer if `theirs` has no `{i}`."""
    return [
        *norm(f"{ours}/norm_attention", f"{theirs}.ln_1"),
        *fused(
            f"{ours}/attention",
            ("query", "key", "value"),
            f"{theirs}.attn.in_proj_weight",
            f"{theirs}.attn.in_proj_bias",
        ),
        *norm(f"{ours}/attention/query_norm", f"{theirs}.attn.ln_q"),
        *norm(f"{ours}/attention/key_norm", f"{theirs}.attn.ln_k"),
        *heads_out(f"{ours}/attention/out", f"{theirs}.attn.out_proj"),
        Entry(f"{ours}/layer_scale_attention/scale", f"{theirs}.ls_1.gamma"),
        *norm(f"{ours}/norm_mlp", f"{theirs}.ln_2"),
        *linear(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc"),
        *linear(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj"),
        Entry(f"{ours}/layer_scale_mlp/scale", f"{theirs}.ls_2.gamma"),
    ]
