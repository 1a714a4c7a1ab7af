"""open_clip: open_clip_config.json and open_clip_model.safetensors.

Source: open_clip_torch 3.3, model.py, transformer.py, timm_model.py and factory.py. The folder is
loaded by `open_clip.create_model_and_transforms("local-dir:PATH")`.

There are two kinds of image tower:
- native: always with a class token, and without a bias of the patches.
- timm: sizes are known by the name of timm's model alone. So only the SigLIP family can be written.
The text tower is native in both cases. With a timm tower its keys begin with "text.".

The default activation is the erf GELU. `act_kwargs` gives a native tower the tanh approximation,
and `quick_gelu` gives both towers the quick GELU. A timm tower's activation follows from its name.
Without a config, a model to compare with must supply what does not follow from shapes: heads,
activations, epsilons, poolings, and whether the text is causal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.interop import base, files, hf_tokenizer, open_clip_coca, timm
from vlp_jax.interop import open_clip_common as common
from vlp_jax.interop.base import PLAIN_TOWER, Extras, Format, Imported
from vlp_jax.interop.files import Tensors
from vlp_jax.interop.open_clip_common import DECODER, MULTIMODAL, TRUNK, Source
from vlp_jax.interop.tables import Entry, Table, modules, to_theirs
from vlp_jax.interop.timm_config import fields_of, siglip_name
from vlp_jax.interop.trees import Module, Params
from vlp_jax.models.coca import CoCa
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.text import TextTransformer
from vlp_jax.models.vit import VisionTransformer

MODEL = "open_clip"
KINDS = (DualEncoder, CoCa)
TOKENIZER_GIVES = ("input_ids", "attention_mask")

# Values in the two sections of a config that a model must have to be expressed here.
HAS_KEYS = {
    "vision_cfg": {"attentional_pool": (False,), "timm_proj": ("none", "linear", "")},
    "text_cfg": {"hf_model_name": (None,), "embed_cls": (False,), "scaled_cosine_attn": (False,)},
}
# Values of our fields that the two kinds of towers can express.
NATIVE_HAS = {
    "pooling": ("cls", "mean"),
    "class_token": (True,),
    "registers": (0,),
    "patch_bias": (False,),
}
TRUNK_HAS = {
    "patch_bias": (True,),
    "pre_norm": (False,),
    "norm_after_pool": (False,),
    **PLAIN_TOWER,
}
TEXT_POOLINGS = {name: name for name in ("eos", "argmax", "last")}
TEXT_HAS = {"pooling": tuple(TEXT_POOLINGS), "padding_mask": (False,)}


def table(trunk: bool, text_bias: bool) -> Table:
    """Returns the mapping, with a tower of timm or ours, and a text head with or without bias."""
    text = "text." if trunk else ""
    if trunk:
        image = [*timm.table(TRUNK), *modules({"image_projection": "visual.head.proj"})]
    else:
        image = [*common.NATIVE_TOWER, Entry("image_projection/kernel", "visual.proj")]
    # Without a bias the text head is a bare matrix, with our order of axes.
    head = [Entry("text_projection/kernel", f"{text}text_projection")]
    if text_bias:
        head = modules({"text_projection": f"{text}text_projection"})
    return [
        Entry("logit_scale", "logit_scale"),
        Entry("logit_bias", "logit_bias"),
        *image,
        Entry("text/token_embedding/embedding", f"{text}token_embedding.weight"),
        Entry("text/position_embedding", f"{text}positional_embedding"),
        *common.layers("text/encoder/layers", f"{text}transformer.resblocks.{{i}}"),
        *modules({"text/encoder/norm": f"{text}ln_final"}),
        *head,
    ]


def _read(path: Path, like: Module | None = None) -> Imported:
    source = Source.open(path, like, KINDS)
    if any(key.startswith(DECODER) for key in source.tensors) or MULTIMODAL in source.model:
        return open_clip_coca.read(source)
    source.refuse_unless(HAS_KEYS)
    trunk = any(key.startswith(TRUNK) for key in source.tensors)
    image = _trunk(source) if trunk else source.native_image()
    keys = source.tensors.keys()
    text_bias = any(key.endswith("text_projection.bias") for key in keys)
    text_head = any(key.endswith("text_projection") for key in keys)
    image_head = bool({"visual.proj", "visual.head.proj.weight"} & keys)
    module = DualEncoder(
        image=image,
        text=_text(source, "text." if trunk else ""),
        embed_dim=_embed_dim(source, image),
        logit_scale_init=float(source.model.get("init_logit_scale", np.log(1 / 0.07))),
        logit_bias_init=-10.0 if "logit_bias" in keys else None,
        image_head=_head(image_head, "visual.head.proj.bias" in keys),
        text_head=_head(text_head, text_bias),
        pixels=source.pixels(),
    )
    return source.imported(module, table(trunk, text_bias))


def _trunk(source: Source) -> VisionTransformer:
    """Makes a timm tower; gives its tensors in `source` our convention of positions."""
    known: dict[str, Any] = {}
    if source.config:
        config = source.model["vision_cfg"]
        name = config.get("timm_model_name")
        fields = fields_of(str(name))
        if fields is None:
            raise UserError(
                f"{source.where}: timm_model_name {name!r} is not one that we know (the plain, "
                f"CLIP and SigLIP families)"
            )
        pooling = config.get("timm_pool", "avg")
        told = (
            {"pooling": base.one_of(timm.POOLINGS, pooling, "timm_pool", source.where)}
            if pooling
            else {}
        )
        known = {**fields, **told}
    prefixed = {key for key in source.tensors if key.startswith(TRUNK)}
    tensors: Tensors = {key.removeprefix(TRUNK): source.tensors[key] for key in prefixed}
    vit, tensors = timm.tower(tensors, known, source.like, source.weights, source.notes)
    source.tensors |= {TRUNK + key: x for key, x in tensors.items()}
    return vit


def _text(source: Source, prefix: str) -> TextTransformer:
    vocab_size, _ = source.shape(f"{prefix}token_embedding.weight", 2)
    context_length, _ = source.shape(f"{prefix}positional_embedding", 2)
    if not source.config:
        told = source.told_by_like("text", "pooling", "causal", "eos_id", "pad_id")
    else:
        config = source.model["text_cfg"]
        pooling = config.get("pool_type", "argmax")
        told = {
            "pooling": base.one_of(TEXT_POOLINGS, pooling, "pool_type", source.where),
            "causal": not config.get("no_causal_mask", False),
            # 2 is open_clip's default. The other poolings do not read the id: CLIP's last one is a
            # guess.
            "eos_id": config.get("eos_id", 2 if pooling == "eos" else vocab_size - 1),
            "pad_id": config.get("pad_id", 0),
        }
    return base.tower(
        TextTransformer,
        source.where,
        vocab_size=vocab_size,
        context_length=context_length,
        **source.layers("text_cfg", f"{prefix}transformer.resblocks."),
        **told,
    )


def _embed_dim(source: Source, image: VisionTransformer) -> int:
    # A bare matrix is [inputs, outputs]; the weight of a torch Linear is [outputs, inputs].
    if "visual.proj" in source.tensors:
        return source.shape("visual.proj", 2)[1]
    if "visual.head.proj.weight" in source.tensors:
        return source.shape("visual.head.proj.weight", 2)[0]
    return image.width


def _head(weight: bool, bias: bool) -> str:
    return "linear_bias" if bias else "linear" if weight else "none"


def _check(module: Module, extras: Extras) -> list[str]:
    if isinstance(module, CoCa):
        return open_clip_coca.check(module, extras)
    image, text = module.image, module.text
    problems = [
        *base.requirements(MODEL, "text", text, TEXT_HAS),
        *common.resize_problems(image, extras),
        *base.eos_problems(text, extras),
    ]
    if image.class_token:  # a native tower
        tower = f"{MODEL}'s own image tower"
        problems += base.requirements(tower, "image", image, NATIVE_HAS)
        problems += base.requirements(tower, "", module, {"image_head": ("linear",)})
        seen, read = (part.transformer.activation for part in (image, text))
        # One key of the config switches both towers.
        if "quick_gelu" in (seen, read) and seen != read:
            problems.append(
                f"{MODEL} has quick_gelu in both towers or in none, not {seen!r} (image) and "
                f"{read!r} (text)"
            )
        return problems
    problems += base.requirements(f"{MODEL}'s timm towers", "image", image, TRUNK_HAS)
    if siglip_name(image) is None:
        layers = image.transformer
        problems.append(
            f"{MODEL} takes a tower without class token by timm's name alone, and timm has none "
            f"of width {layers.width}, depth {layers.depth}, {layers.heads} heads, mlp_dim "
            f"{layers.mlp_dim}, patch {image.patch_size}, {image.image_size[0]} x "
            f"{image.image_size[1]} pixels, pooling {image.pooling!r}, activation "
            f"{layers.activation!r} and norm_eps {layers.norm_eps} (its names are "
            f"vit_SIZE_patchN_siglip_PIXELS)"
        )
    return problems


def _write(module: Module, params: Params, directory: Path, extras: Extras) -> list[Path]:
    image, params = base.with_position_table(module.image, params)
    module, name = module.clone(image=image), directory.resolve().name
    model: dict[str, Any] = {
        "embed_dim": module.embed_dim,
        "init_logit_scale": module.logit_scale_init,
    }
    if module.logit_bias_init is not None:
        model["init_logit_bias"] = module.logit_bias_init
    if isinstance(module, CoCa):
        model |= open_clip_coca.config_of(module, extras, name)
        mapping = open_clip_coca.table_of(module)
    else:
        trunk = not image.class_token
        model["vision_cfg"] = _trunk_config(module) if trunk else common.native_config(image)
        model["text_cfg"] = text_config(module, extras, name)
        # It selects open_clip's CustomTextCLIP, the class whose keys begin with "text.".
        model |= {"custom_text": True} if trunk else {}
        mapping = table(trunk, module.text_head == "linear_bias")
    if module.text.transformer.activation == "quick_gelu":
        model["quick_gelu"] = True
    config = {
        "model_cfg": model,
        "preprocess_cfg": {
            "size": list(module.image.image_size),
            "mean": list(module.pixels.mean),
            "std": list(module.pixels.std),
            "interpolation": extras.interpolation,
            "resize_mode": "squash" if extras.resize == "squash" else "shortest",
        },
    }
    tensors = to_theirs(mapping, params)
    return [
        files.save_json(config, directory / common.CONFIG),
        files.save_safetensors(tensors, directory / common.WEIGHTS[0], extras.narrow),
        *hf_tokenizer.write(extras.tokenizer, directory, TOKENIZER_GIVES),
    ]


def _trunk_config(module: DualEncoder) -> dict[str, Any]:
    config = {
        "image_size": base.one_or_two(module.image.image_size),
        "timm_model_name": siglip_name(module.image),
        "timm_model_pretrained": False,
        "timm_pool": timm.POOLINGS[module.image.pooling],
        "timm_proj": module.image_head.removesuffix("_bias"),
    }
    return config | ({"timm_proj_bias": True} if module.image_head == "linear_bias" else {})


def text_config(module: DualEncoder, extras: Extras, name: str) -> dict[str, Any]:
    """Makes `text_cfg`; for `name` see `open_clip_common.text_sizes`."""
    text = module.text
    return {
        **common.text_sizes(text, extras, name),
        "no_causal_mask": not text.causal,
        "pool_type": text.pooling,
        "proj_type": module.text_head.removesuffix("_bias"),
        "proj_bias": module.text_head == "linear_bias",
        **common.layers_config(text),
    }


FORMAT = Format(
    KINDS,
    'open_clip.create_model_and_transforms("local-dir:{}")',
    ("float32", "bfloat16"),
    *(_read, _check, _write),
)
