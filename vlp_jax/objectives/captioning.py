"""Captioning as pretraining: one word after the other, and all at once (CapPa)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlp_jax import config as config_lib
from vlp_jax.models.attention import HOLDS
from vlp_jax.models.attention_mask import AttentionMask
from vlp_jax.models.captioner import Captioner
from vlp_jax.models.coca import CoCa
from vlp_jax.models.decoder import CAUSAL, make_decoder
from vlp_jax.models.dual_encoder import l2_normalize
from vlp_jax.models.generation import Generated, Sampling, beam_search, generate
from vlp_jax.models.values import Pixels, keywords_of
from vlp_jax.models.vit import make_vit
from vlp_jax.objectives.base import (
    PIXELS,
    TOKENS,
    Batch,
    Context,
    Examples,
    Field,
    Function,
    Objective,
    Params,
    of_images,
)
from vlp_jax.objectives.compute import make_compute
from vlp_jax.objectives.token_loss import token_losses

MEANS = ("example", "token")


@dataclasses.dataclass(frozen=True)
class Captioning(Objective):
    """Says the caption of an image.

    Attributes:
      model: an image tower and a decoder that looks at its tokens. The id behind the vocabulary is
        the mask, which a `CoCa` does not have: its words are predicted one after the other.
      eos_id, pad_id: the tokenizer's. Tokens behind the first end of text have no loss.
      parallel_share: chance that the words of an example are predicted all at once, from masks that
        see each other, and not one after the other (Tschannen et al. 2023, "CapPa", 3.2). In
        evaluation none are.
      label_smoothing, z_loss: see `token_losses`; in training alone.
      mean: "example": the loss is the mean over the examples of the mean over their tokens (CapPa);
        "token": the mean over all tokens (Yu et al. 2022, "CoCa").
      bos_id: the token that each text begins with, which is given and has no loss; None for texts
        that begin with their first word, before which a padding token is put.
    """

    model: Captioner | CoCa
    eos_id: int
    pad_id: int
    parallel_share: float = 0.75
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    mean: str = "example"
    bos_id: int | None = None

    @property
    def reads(self) -> dict[str, Field]:
        """Images and their texts."""
        return {
            "image": Field.pixels(self.model.image.image_size),
            "text": Field.tokens(self.model.decoder.context_length),
        }

    @property
    def mask_id(self) -> int:
        """The token that stands for one that is not told."""
        return self.model.decoder.vocab_size

    def draw(self, batch: Batch, context: Context) -> Examples:
        """Images and texts, and which texts are predicted all at once."""
        key, count = jax.random.split(context.rng)[0], len(batch["text"])
        share = self.parallel_share if context.train else 0.0
        parallel = jax.random.bernoulli(key, share, (count,))
        return {"image": batch["image"], "text": batch["text"], "parallel": parallel}

    def forward(self, params: Params, batch: Examples, context: Context) -> Examples:
        """The cross-entropy of each text, and how many of its tokens have the highest score."""
        tokens, parallel = batch["text"], batch["parallel"]
        given = self.given(tokens)
        if self.parallel_share:
            given = jnp.where(parallel[:, None], self.mask_id, given)
        train = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        features = self.model.apply(
            {"params": params},
            batch["image"],
            given,
            self._mask(parallel, tokens.shape[1], context.train),
            context.train,
            method="features",
            rngs={"drop_path": jax.random.split(context.rng)[1]},
        )
        found = token_losses(
            lambda x: self.model.apply({"params": params}, x, method="score"),
            features,
            self.wanted(tokens),
            self.model.decoder.vocab_size,
            **(train if context.train else {}),
        )
        told = self.told(tokens).astype(jnp.float32)
        count = told.sum(axis=1)
        loss, hits = ((x * told).sum(axis=1) for x in (found.loss, found.hit))
        mean = loss / jnp.maximum(count, 1)
        of_examples = self.mean == "example"
        one = jnp.minimum(count, 1)  # 0 of an example without a text
        metrics = {
            "loss": (mean, one) if of_examples else (loss, count),
            "accuracy": (hits, count),
        }
        if context.train and 0 < self.parallel_share < 1:
            for name, own in (("parallel", parallel), ("causal", ~parallel)):
                metrics[f"{name}_loss"] = (jnp.where(own, mean, 0), jnp.where(own, one, 0))
        return metrics

    def given(self, tokens: Int[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
        """Returns the last token that is read before each of `wanted`.

        It is the text itself if that begins with `bos_id`, so that a tower that reads it for
        another loss does so once; otherwise padding, then the tokens but for the last.
        """
        if self.bos_id is not None:
            return tokens
        return jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=self.pad_id)

    def wanted(self, tokens: Int[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
        """Returns the tokens that are predicted, with padding in the place of a given first."""
        if self.bos_id is None:
            return tokens
        return jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=self.pad_id)

    def told(self, tokens: Int[Array, "batch tokens"]) -> Bool[Array, "batch tokens"]:
        """Tells which of `wanted` have a loss: the tokens up to the first end of text."""
        wanted = self.wanted(tokens)
        ends = wanted == self.eos_id
        before = jnp.cumsum(ends, axis=1) - ends
        told = (before == 0) & ((wanted != self.pad_id) | ends)
        # The padding that was put behind a text is no end of it, also where both have one id.
        return told if self.bos_id is None else told.at[:, -1].set(False)

    def _mask(self, parallel: Bool[Array, " batch"], length: int, train: bool) -> AttentionMask:
        if not train or not self.parallel_share:
            return CAUSAL
        if self.parallel_share == 1:
            return AttentionMask()
        return AttentionMask(causal=True, prefix=jnp.where(parallel, length, 0))

    def functions(self) -> dict[str, Function]:
        """What evaluators, export and users may ask for.

        `caption` of images: see `Captioning.caption`.
        `class_likelihood` of images and the texts of classes: see `Captioning.class_likelihood`.
        `embed_image` and `image_features`: the mean over the patches, as unit vectors or as it is.
        """

        def features(params: Params, image: Array) -> Array:
            return self.model.apply({"params": params}, image, method="image_features")

        return {
            "caption": of_images(self.caption, "tokens and scores of captions"),
            "class_likelihood": Function(
                self.class_likelihood, {"image": PIXELS, "classes": TOKENS}, "log-likelihoods"
            ),
            "embed_image": of_images(
                lambda params, x: l2_normalize(features(params, x)), "unit vectors"
            ),
            "image_features": of_images(features, "features"),
        }

    def caption(
        self,
        params: Params,
        image: Array,
        prompt: Sequence[int] = (),
        length: int | None = None,
        beams: int = 1,
        length_penalty: float = 0.0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Generated:
        """Texts about images with values in [0, 255].

        Args:
          prompt: ids that each text begins with, which are not in the result.
          length: tokens at most, the end of text included; None: as many as there is room for.
          beams: texts that are followed side by side; see `beam_search`, also for
            `length_penalty`. With 1 each token is chosen as `Sampling` says.
          temperature, top_k, top_p: see `Sampling`.
          seed: of what is drawn.

        Raises:
          ValueError: a prompt that leaves no room, or beams that are to be drawn.
        """
        first = self.pad_id if self.bos_id is None else self.bos_id
        # A bos is one of the tokens of a text; the padding before a text without one is not.
        room = self.model.decoder.context_length - len(prompt) - (self.bos_id is not None)
        if room < 1:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves no room in the context of "
                f"{self.model.decoder.context_length}"
            )
        sampling = Sampling(temperature, top_k, top_p)
        if beams > 1 and temperature:
            raise ValueError("texts are drawn by a temperature or followed by beams, not both")
        count, length = len(image), min(room, length or room)
        seen = self.model.apply({"params": params}, image, method="look")
        seen = jnp.repeat(seen, beams, axis=0)
        begin = jnp.asarray([first, *prompt], jnp.int32)
        begin = jnp.broadcast_to(begin, (count, len(begin)))
        cache = self.model.apply(
            {"params": params}, count * beams, len(prompt) + length, method="start"
        )

        def step(tokens: Array, cache: Any) -> tuple[Array, Any]:
            return self.model.apply({"params": params}, tokens, cache, seen, method="step")

        ids = {"eos_id": self.eos_id, "pad_id": self.pad_id}
        if beams > 1:
            more = {"width": beams, "length_penalty": length_penalty}
            return beam_search(step, cache, begin, length, **more, **ids)
        rng = jax.random.key(seed)
        return generate(step, cache, begin, length, rng=rng, sampling=sampling, **ids)

    def class_likelihood(
        self, params: Params, inputs: Mapping[str, Array]
    ) -> Float[Array, "batch classes"]:
        """The log-probability of the text of each class given each image, the end included.

        Args:
          inputs: "image", values in [0, 255], and "classes", token ids [classes, tokens].
        """
        seen = self.model.apply({"params": params}, inputs["image"], method="look")

        def of_class(text: Int[Array, " tokens"]) -> Float[Array, " batch"]:
            tokens = jnp.broadcast_to(text, (len(seen), len(text)))
            scores = self.model.apply(
                {"params": params}, self.given(tokens), seen, method="score_tokens"
            )
            wanted = self.wanted(tokens)
            log = jnp.take_along_axis(jax.nn.log_softmax(scores), wanted[..., None], axis=-1)
            return (log[..., 0] * self.told(tokens)).sum(axis=1)

        return jax.lax.map(of_class, inputs["classes"]).T


@keywords_of(make_compute)
def make_captioning(
    *,
    tokenizer: Any,
    image: Mapping[str, Any],
    decoder: Mapping[str, Any],
    parallel_share: float = 0.75,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    mean: str = "example",
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
    **compute: Any,
) -> Captioning:
    """`Captioning` from `config.objective`.

    Args:
      tokenizer: gives the decoder its vocabulary and context length.
      image: arguments of `make_vit`; the pooling is none.
      decoder: arguments of `make_decoder`, and `attention` if it is to be another than that of the
        image tower. By default there are no biases in its layers, and token embeddings begin with
        deviation 1, as published.
      parallel_share, label_smoothing, z_loss, mean: see `Captioning`.
      compute: see `make_compute`.

    Raises:
      ValueError: an unknown variant, mean or dtype, no tokenizer, a number out of range, or an
        attention that does not hold the decoder's mask.
    """
    if tokenizer is None:
        raise ValueError("captioning needs config.tokenizer")
    if not 0 <= parallel_share <= 1:
        raise ValueError(f"parallel_share is a chance from 0 to 1, not {parallel_share}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is at least 0 and below 1, not {label_smoothing}")
    if mean not in MEANS:
        raise ValueError(f"unknown mean {mean!r} (known: {', '.join(MEANS)})")
    how, published = make_compute(**compute), {"bias": False, "embedding_stddev": 1.0}
    own = {**published, **decoder}
    attention = own.pop("attention", how.attention)
    if 0 < parallel_share < 1:
        AttentionMask(causal=True, prefix=jnp.zeros(1)).check(attention, HOLDS.get(attention, ()))
    token = {"class_token": image.get("pooling", "none") == "cls"}
    model = Captioner(
        config_lib.build(
            make_vit, {**token, **image, "pooling": "none"}, "config.objective.image", compute=how
        ),
        config_lib.build(
            make_decoder,
            own,
            "config.objective.decoder",
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.context_length,
            extra_tokens=1,
            compute=dataclasses.replace(how, attention=attention),
        ),
        Pixels(tuple(image_mean), tuple(image_std)),
    )
    ids = (tokenizer.eos_id, tokenizer.pad_id)
    return Captioning(model, *ids, parallel_share, label_smoothing, z_loss, mean)
