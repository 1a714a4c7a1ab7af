"""SigLIP with the towers of SigLIP 2's g-opt/16 at 256 pixels (Tschannen et al. 2025, 2502.14786).

Aims at: the sigmoid loss of this model, without the rest of its recipe. With the whole recipe the
published weights reach 84.5 zero-shot on ImageNet (google-research/big_vision,
configs/proj/image_text/README_siglip2.md). There is no published number for the loss alone.

    python -m vlp_jax.train --config configs/siglip_g.py --workdir DIR \
        --config.tokenizer.name=sentencepiece --config.tokenizer.file=GEMMA_MODEL

1.87 billion parameters: 1.16 in the image tower, 0.71 in the text tower, of which 0.29 are the
embeddings of 256,000 tokens. Sources:

- Sizes: huggingface/transformers, convert_siglip_to_hf.py: "giant-opt" for images (width 1536, 40
  layers, 6144, 16 heads), "so400m" for texts, whose head maps to 1536; no head for images. The sum,
  1,871,393,906, equals the numbers in google/siglip2-giant-opt-patch16-256.
- 64 tokens, patches of 16, Gemma's tokenizer (padded with its own pad, texts in lower case): the
  same file. Without --config.tokenizer.file a byte-level BPE of the same size is trained.
- Batch of 32,768, cosine with 20,000 steps of warm-up, 40 billion examples: the paper, 2.1.

Differences: SigLIP 2 adds a captioning decoder (LocCa), self-distillation and masked prediction
(SILC, TIPS), and a curated, multilingual WebLI; this config has the sigmoid loss alone. The
published optimizer is uncertain; the settings are from `configs/siglip_b16.py`, see there. The
config takes no argument: the other published size, 384 pixels, was trained on from 256.

The state divides evenly over `fsdp` of 16 and 64. 1152 is no multiple of 256: on 256 devices set
--config.mesh.fsdp=64, or --config.mesh.preset=fsdp_tp and --config.mesh.tensor=4.
`python -m tools.show_sharding` lists what a device holds.
"""

from configs import _recipes, siglip_b16


def get_config(arg=None):
    config = _recipes.shard_parameters(siglip_b16.get_config(arg))
    config.objective.image.variant = "g-opt/16"
    config.objective.text.variant = "So400m"
    config.objective.embed_dim = 1536
    config.objective.remat = "full"
    config.tokenizer.vocab_size = 256_000
    config.image_size = 256
    config.tokenizer.context_length = 64
    return config
