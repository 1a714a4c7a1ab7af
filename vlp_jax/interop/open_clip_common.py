"""Shared by open_clip's two kinds of models: tables, open_clip_config.json, tokenizer and pixels.

Source: open_clip_torch 3.3, `CLIPVisionCfg`, `CLIPTextCfg` and `_build_vision_tower` in model.py,
`PreprocessCfg` in transform.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError
from vlp_jax.interop import base, files
from vlp_jax.interop.base import Extras, Imported
from vlp_jax.interop.files import Tensors
from vlp_jax.interop.hf_tokenizer import TokenizerFiles
from vlp_jax.interop.tables import SQUEEZED, Entry, Table, from_theirs, fused, modules
from vlp_jax.interop.trees import Module, expected_shapes, image_of
from vlp_jax.models.coca import CoCaText
from vlp_jax.models.text import TextTransformer
from vlp_jax.models.values import Pixels, tower_fields
from vlp_jax.models.vit import VisionTransformer

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
)
IGNORED = r"(text\.)?attn_mask|text\.transformer\.embeddings\.position_ids"
TRUNK, DECODER = "visual.trunk.", "text_decoder."  # prefixes: a timm tower, a CoCa's decoder
MULTIMODAL = "multimodal_cfg"  # the section of a CoCa's decoder
TOWERS = {"vision_cfg": "image", "text_cfg": "text", MULTIMODAL: "decoder"}

POOLINGS = {"cls": "tok", "mean": "avg"}
EPS = 1e-5  # default of torch.nn.LayerNorm
HEAD_WIDTH, TEXT_HEADS = 64, 8  # defaults of CLIPVisionCfg and CLIPTextCfg
TOKENIZER_KEYS = ("tokenizer_kwargs", "tokenizer_mode")
RESIZE_MODES = ("shortest", "longest", "squash")


NATIVE_TOWER: Table = [
    Entry("image/class_token", "visual.class_embedding", SQUEEZED),
    Entry("image/position_embedding", "visual.positional_embedding"),
    *modules(
        {
            "patch_embedding/projection": "conv1",
            "pre_norm": "ln_pre",
            "encoder/norm": "ln_post",
            "norm": "ln_post",  # with norm_after_pool
        },
        "image",
        "visual",
    ),
]


def layers(ours: str, theirs: str) -> Table:
    """Maps the layers of a tower."""
    return [
        *fused(f"{ours}/attention", f"{theirs}.attn.in_proj_weight", f"{theirs}.attn.in_proj_bias"),
        *modules(
            {
                "norm_attention": "ln_1",
                "attention/query_norm": "attn.ln_q",
                "attention/key_norm": "attn.ln_k",
                "attention/out": "attn.out_proj",
                "norm_mlp": "ln_2",
                "mlp/up": "mlp.c_fc",
                "mlp/down": "mlp.c_proj",
            },
            ours,
            theirs,
        ),
        Entry(f"{ours}/layer_scale_attention/scale", f"{theirs}.ls_1.gamma"),
        Entry(f"{ours}/layer_scale_mlp/scale", f"{theirs}.ls_2.gamma"),
    ]


NATIVE_TOWER += layers("image/encoder/layers", "visual.transformer.resblocks.{i}")


@dataclasses.dataclass
class Source:
    """The files of a model that is read.

    Attributes:
      weights: the file of weights.
      config: the content of open_clip_config.json beside it; {} without one.
      like: without a config, a model that supplies what does not follow from shapes.
      tensors: key -> array, without the prefixes of distributed training and of CustomTextCLIP.
      notes: lines for the user.
    """

    weights: Path
    config: Mapping[str, Any]
    like: Module | None
    tensors: Tensors
    notes: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def open(cls, path: Path, like: Module | None, kinds: tuple[type, ...]) -> Source:
        """Finds and loads the files.

        Raises:
          UserError: there are none, or no config and no `like` of one of `kinds`.
        """
        weights = files.find_weights(path, WEIGHTS)
        config = files.load_json_if_there(weights.parent / CONFIG)
        if not config and not isinstance(like, kinds):
            raise UserError(
                f"{weights} needs its {CONFIG} beside it, or an image and text model that it goes "
                f"into"
            )
        return cls(weights, config, like, _plain_keys(files.load_tensors(weights)))

    @property
    def where(self) -> Path:
        """The file of the config, for errors."""
        return self.weights.parent / CONFIG

    @property
    def model(self) -> dict[str, Any]:
        """The part of the config that describes the model; {} without a config."""
        model = self.config.get("model_cfg", self.config)
        for section in ("vision_cfg", "text_cfg"):
            if self.config and not isinstance(model.get(section), dict):
                raise UserError(f"{self.where} has no {section}")
        return model

    def refuse_unless(self, keys: Mapping[str, Mapping[str, tuple[Any, ...]]]) -> None:
        """Raises UserError if a key of a section has a value other than the allowed ones."""
        for section, allowed in keys.items():
            for key, value in self.model.get(section, {}).items():
                if key in allowed and value not in allowed[key]:
                    raise UserError(
                        f"{self.where}: {section}.{key} {value!r} cannot be expressed here "
                        f"(supported: {' or '.join(map(repr, allowed[key]))})"
                    )

    def shape(self, key: str, ndim: int) -> tuple[int, ...]:
        """Returns the shape of a tensor; raises UserError if it is missing or has other dims."""
        return base.shape_of(self.tensors, key, ndim, self.weights)

    def told_by_like(self, tower: str, *fields: str) -> dict[str, Any]:
        """Selects some fields of a tower of `like`, by name."""
        there = tower_fields(self.like.towers()[tower])
        return {field: value for field, value in there.items() if field in fields}

    def layers(self, section: str, blocks: str) -> dict[str, Any]:
        """Reads the fields of layers, whose keys begin with `blocks`, from shapes and a section."""
        mlp_dim, width = self.shape(f"{blocks}0.mlp.c_fc.weight", 2)
        numbers = {
            key[len(blocks) :].split(".")[0] for key in self.tensors if key.startswith(blocks)
        }
        sizes = {
            "width": width,
            "depth": len(numbers),
            "mlp_dim": mlp_dim,
            "qk_norm": f"{blocks}0.attn.ln_q.weight" in self.tensors,
            "layer_scale": 1e-5 if f"{blocks}0.ls_1.gamma" in self.tensors else None,
        }
        if not self.config:
            return sizes | self.told_by_like(TOWERS[section], "heads", "activation", "norm_eps")
        config = {"head_width": HEAD_WIDTH, "heads": TEXT_HEADS, **self.model[section]}
        if section == "vision_cfg":
            heads = width // base.integer(config, "head_width", self.where)
        else:
            heads = base.integer(config, "heads", self.where)
        # open_clip does not hand the layers of a CoCa's decoder these keys.
        kwargs = config if section != MULTIMODAL else {}
        tanh = (kwargs.get("act_kwargs") or {}).get("approximate") == "tanh"
        quick = self.model.get("quick_gelu")
        norms = {"eps": EPS, **(kwargs.get("norm_kwargs") or {})}
        return {
            **sizes,
            "heads": heads,
            "activation": "quick_gelu" if quick else "gelu_tanh" if tanh else "gelu",
            "norm_eps": base.number(norms, "eps", self.where),
        }

    def native_image(self) -> VisionTransformer:
        """Makes the native image tower; raises UserError for an unknown pooling or grid."""
        _, _, patch, _ = self.shape("visual.conv1.weight", 4)
        rows, _ = self.shape("visual.positional_embedding", 2)
        if not self.config:
            told = self.told_by_like("image", "pooling", "norm_after_pool")
            grid = base.grid_of(rows - 1, self.like, self.weights)
            size = (grid[0] * patch, grid[1] * patch)
        else:
            config = self.model["vision_cfg"]
            pooling = base.one_of(POOLINGS, config.get("pool_type", "tok"), "pool_type", self.where)
            after = bool(config.get("final_ln_after_pool", False))
            # Both orders compute the same; `like` says which paths the parameters should have.
            after = base.norm_after_pool_of(self.like) if pooling == "cls" else after
            told = {"pooling": pooling, "norm_after_pool": after}
            size = base.pair(config.get("image_size", 224), "image_size", self.where)
        return base.tower(
            VisionTransformer,
            self.where,
            image_size=base.tiled(size, patch, self.notes),
            patch_size=patch,
            patch_bias=False,
            pre_norm="visual.ln_pre.weight" in self.tensors,
            **self.layers("vision_cfg", "visual.transformer.resblocks."),
            **told,
        )

    def pixels(self) -> Pixels:
        """Returns the normalization of pixels, by default open_clip's."""
        section = self.config.get("preprocess_cfg") or {}
        if not self.config:
            return self.like.pixels
        if not {"mean", "std"} <= section.keys():
            self.notes.append(
                f"{self.where} does not say how pixels are normalized: as OpenAI's CLIP"
            )
        defaults = {"mean": base.OPENAI_MEAN, "std": base.OPENAI_STD}
        return Pixels(
            **{
                name: base.three_numbers(
                    section.get(name) or default, f"preprocess_cfg.{name}", self.where
                )
                for name, default in defaults.items()
            }
        )

    @functools.cached_property
    def tokenizer(self) -> TokenizerFiles | None:
        """The files that `open_clip.get_tokenizer` reads: none unless the config names some."""
        text = self.model["text_cfg"]
        settings = {name: text[name] for name in TOKENIZER_KEYS if text.get(name)}
        name, folder = text.get("hf_tokenizer_name"), self.weights.parent
        tokenizer = TokenizerFiles.from_folder(folder, open_clip=settings) if name else None
        if tokenizer is not None:
            return tokenizer
        if name:
            self.notes.append(f"its tokenizer is {name}, whose files are not in {folder}")
        return TokenizerFiles({}, open_clip=settings) if settings else None

    def extras(self, size: tuple[int, int]) -> dict[str, Any]:
        """Reads the preprocessing as fields of `Extras`, for a model that takes `size`."""
        if not self.config:
            return {}
        section = self.config.get("preprocess_cfg") or {}
        mode = section.get("resize_mode") or "shortest"
        interpolation = section.get("interpolation") or "bicubic"
        if mode == "longest":
            self.notes.append(
                "its images are fitted in whole and padded, here their middle is cut out"
            )
        if mode not in RESIZE_MODES or interpolation not in (*base.INTERPOLATIONS, "random"):
            self.notes.append(
                f"open_clip does not know resize_mode {mode!r} with interpolation {interpolation!r}"
            )
        extras: dict[str, Any] = {"resize": "squash" if mode == "squash" else "crop"}
        if mode != "squash" and size[0] != size[1]:
            # For sides that differ, open_clip uses ResizeKeepRatio and does not pass the
            # interpolation.
            extras |= {"scale": size, "interpolation": "bicubic"}
        else:
            extras["interpolation"] = "bilinear" if interpolation == "bilinear" else "bicubic"
        return {**extras, "tokenizer": self.tokenizer}

    def imported(self, module: Module, table: Table) -> Imported:
        """Converts the tensors to the parameters of `module`."""
        expected = expected_shapes(module)
        params = from_theirs(table, self.tensors, expected, self.weights, IGNORED)
        return Imported(module, params, self.notes, self.extras(image_of(module).image_size))


def _plain_keys(tensors: Tensors) -> Tensors:
    """Unifies keys: no prefix of distributed training, "text." only with a timm tower."""
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): x for key, x in tensors.items()}
    named = any(key.startswith((TRUNK, DECODER)) for key in tensors)
    plain = {}
    for key, x in tensors.items():
        if not named:
            key = key.removeprefix("text.")  # CustomTextCLIP adds it to native towers as well
        if key.startswith(f"{TRUNK}head."):  # with timm_proj "", timm's classifier projects
            key = key.replace(f"{TRUNK}head.", "visual.head.proj.")
        # A model with `nonscalar_logit_scale` stores both as arrays of one number.
        plain[key] = x.reshape(()) if key in ("logit_scale", "logit_bias") and x.size == 1 else x
    return plain


def native_config(vit: VisionTransformer) -> dict[str, Any]:
    """Makes `vision_cfg` for a native tower."""
    return {
        "image_size": base.one_or_two(vit.image_size),
        "patch_size": vit.patch_size,
        "width": vit.width,
        "layers": vit.transformer.depth,
        "head_width": vit.width // vit.transformer.heads,
        "mlp_ratio": base.mlp_ratio(vit.width, vit.transformer.mlp_dim),
        "pool_type": POOLINGS[vit.pooling],
        "no_ln_pre": not vit.pre_norm,
        "final_ln_after_pool": vit.norm_after_pool,
        **layers_config(vit),
    }


def text_sizes(text: TextTransformer | CoCaText, extras: Extras, name: str) -> dict[str, Any]:
    """Makes the part of `text_cfg` with the sizes of a text tower and its tokenizer.

    `name` is the repository of the tokenizer, which open_clip ignores for "local-dir:".
    """
    tokenizer: dict[str, Any] = {}
    if extras.tokenizer is not None:
        tokenizer |= {"hf_tokenizer_name": name} if extras.tokenizer.contents else {}
        tokenizer |= extras.tokenizer.open_clip or {}
    ids = base.special_ids(text, extras)
    return {
        **tokenizer,
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.transformer.heads,
        "layers": text.transformer.depth,
        "mlp_ratio": base.mlp_ratio(text.width, text.transformer.mlp_dim),
        "eos_id": ids["eos_id"],
        "pad_id": ids["pad_id"],
    }


def layers_config(tower: VisionTransformer | TextTransformer | CoCaText) -> dict[str, Any]:
    """Makes the keys of a tower's section that describe its layers."""
    layers = tower.transformer
    config: dict[str, Any] = {"norm_kwargs": {"eps": layers.norm_eps}}
    if layers.activation == "gelu_tanh":
        config["act_kwargs"] = {"approximate": "tanh"}
    if layers.layer_scale is not None:
        config["ls_init_value"] = layers.layer_scale
    if layers.qk_norm:
        config["qk_norm"] = True
    return config


def resize_problems(image: VisionTransformer, extras: Extras) -> list[str]:
    """Returns a line for each setting of the resize that `preprocess_cfg` cannot express."""
    lines = []
    height, width = image.image_size
    keeps = {None, image.image_size, *([height] if height == width else [])}
    if extras.scale not in keeps:
        lines.append(
            f"open_clip scales images to cover {height} x {width} pixels, not to {extras.scale} "
            f"before it cuts: give --resize"
        )
    if extras.interpolation not in base.INTERPOLATIONS:
        lines.append(f"open_clip does not resize by {extras.interpolation!r}: give --interpolation")
    return lines
