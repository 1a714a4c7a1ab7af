"""Captioning as pretraining: token by token, and all tokens in parallel (CapPa)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlp_jax import config as config_lib
from vlp_jax.models.attention import AttentionMask
from vlp_jax.models.coca import CoCa
from vlp_jax.models.decoder import CAUSAL, Captioner, make_decoder
from vlp_jax.models.dual_encoder import l2_normalize
from vlp_jax.models.generation import Generated, Sampling, beam_search, generate
from vlp_jax.models.values import Pixels, check_choice, keywords_of
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
from vlp_jax.objectives.compute import from_tokenizer, make_compute, with_attention

CHUNK_BYTES = 2**27  # largest size of the float32 scores in memory at once


class TokenLosses(NamedTuple):
    """The cross-entropy of each target token, and whether no token scores higher."""

    loss: Float[Array, "batch tokens"]
    hit: Bool[Array, "batch tokens"]


def token_losses(
    score: Callable[[Float[Array, "batch some width"]], Float[Array, "batch some vocab"]],
    features: Float[Array, "batch tokens width"],
    labels: Int[Array, "batch tokens"],
    vocab_size: int,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenLosses:
    """Computes the cross-entropy of each token.

    A chunk is a few token positions of all examples. Its scores are computed again in the backward
    pass, so that they need not be kept.

    Args:
      score: features -> scores. Parameters that it closes over get their gradients.
      labels: the target tokens.
      label_smoothing: part of a label that is spread evenly over all tokens.
      z_loss: factor on the squared logarithm of the softmax's denominator, which is added to the
        loss. It keeps scores from drifting (Chowdhery et al. 2022, "PaLM", 5, with 1e-4).
      chunk_bytes: largest size of the scores in memory at once.
    """
    batch, tokens = labels.shape
    # 4 bytes for each float32 score of a place: [batch, vocab].
    places = max(1, min(tokens, chunk_bytes // (4 * batch * vocab_size)))
    one = functools.partial(_losses, score, label_smoothing=label_smoothing, z_loss=z_loss)
    if places == tokens:
        return one(features, labels)
    padding = -tokens % places

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(batch, -1, places, *x.shape[2:]), 1, 0)

    # Within a scan the compiler cannot merge the two passes, so nothing has to prevent it.
    again = jax.checkpoint(one, prevent_cse=False)
    _, losses = jax.lax.scan(
        lambda _, chunk: (None, again(*chunk)), None, (split(features), split(labels))
    )
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, tokens + padding)[:, :tokens], losses
    )


def _losses(
    score: Callable[[Array], Array],
    features: Array,
    labels: Array,
    label_smoothing: float,
    z_loss: float,
) -> TokenLosses:
    scores = score(features).astype(jnp.float32)
    denominator = jax.nn.logsumexp(scores, axis=-1)
    target = jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
    loss = denominator - target
    if label_smoothing:
        spread = denominator - scores.mean(axis=-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * spread
    if z_loss:
        loss += z_loss * jnp.square(denominator)
    return TokenLosses(loss, target >= scores.max(axis=-1))


MEANS = ("example", "token")


@dataclasses.dataclass(frozen=True)
class Captioning(Objective):
    """Predicts the caption of an image.

    Attributes:
      model: an image tower, and a decoder that attends to its tokens. A `Captioner` has one id more
        than the vocabulary: the mask token. A `CoCa` has none and predicts token by token only.
      eos_id, pad_id: ids of the tokenizer. Tokens after the first end of text have no loss.
      parallel_share: chance that an example is predicted in parallel: its decoder gets mask tokens
        that see each other instead of the caption (Tschannen et al. 2023, "CapPa", 3.2). 0 in
        evaluation.
      label_smoothing, z_loss: see `token_losses`; in training alone.
      mean: "example": the loss is the mean over the examples of the mean over their tokens (CapPa);
        "token": the mean over all tokens (Yu et al. 2022, "CoCa").
      bos_id: the token that each text begins with; it is given and has no loss. None for texts
        without such a token: the decoder then begins with a padding token.
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
        """The fields of the loss: an image and its text."""
        return {
            "image": Field.pixels(self.model.image.image_size),
            "text": Field.tokens(self.model.decoder.context_length),
        }

    @property
    def mask_id(self) -> int:
        """The id of the mask token, which stands for an unknown token in parallel prediction."""
        return self.model.decoder.vocab_size

    def draw(self, batch: Batch, context: Context) -> Examples:
        """Returns images, texts, and for each text whether it is predicted in parallel."""
        # `forward` takes the second half of the key, for stochastic depth.
        key, count = jax.random.split(context.rng)[0], len(batch["text"])
        share = self.parallel_share if context.train else 0.0
        parallel = jax.random.bernoulli(key, share, (count,))
        return {"image": batch["image"], "text": batch["text"], "parallel": parallel}

    def forward(self, params: Params, batch: Examples, context: Context) -> Examples:
        """Computes the cross-entropy of each text, and how many tokens have the highest score."""
        tokens, parallel = batch["text"], batch["parallel"]
        inputs = self.decoder_inputs(tokens)
        # A model that never predicts in parallel may have no mask token (a `CoCa`).
        if self.parallel_share:
            inputs = jnp.where(parallel[:, None], self.mask_id, inputs)
        train = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        features = self.model.apply(
            {"params": params},
            batch["image"],
            inputs,
            self._mask(parallel, tokens.shape[1], context.train),
            context.train,
            method="features",
            rngs={"drop_path": jax.random.split(context.rng)[1]},
        )
        losses = token_losses(
            lambda x: self.model.apply({"params": params}, x, method="score"),
            features,
            self.targets(tokens),
            self.model.decoder.vocab_size,
            **(train if context.train else {}),
        )
        in_loss = self.target_mask(tokens).astype(jnp.float32)
        count = in_loss.sum(axis=1)
        loss, hits = ((x * in_loss).sum(axis=1) for x in (losses.loss, losses.hit))
        # An empty text has no targets; its mean is 0 and counts 0 times.
        mean = loss / jnp.maximum(count, 1)
        of_examples = self.mean == "example"
        one = jnp.minimum(count, 1)  # 0 for an example with an empty text
        metrics = {"loss": (mean, one) if of_examples else (loss, count), "accuracy": (hits, count)}
        if context.train and 0 < self.parallel_share < 1:
            for name, chosen in (("parallel", parallel), ("causal", ~parallel)):
                metrics[f"{name}_loss"] = (jnp.where(chosen, mean, 0), jnp.where(chosen, one, 0))
        return metrics

    # For a caption "a red cat" and the context length 5:
    #
    #                   without bos                      with bos
    #   tokens          a    red  cat  eos  pad          bos  a    red  cat  eos
    #   decoder_inputs  pad  a    red  cat  eos          bos  a    red  cat  eos
    #   targets         a    red  cat  eos  pad          a    red  cat  eos  pad
    #   target_mask     1    1    1    1    0            1    1    1    1    0

    def decoder_inputs(self, tokens: Int[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
        """Returns the decoder's inputs: at each place the token before the one it predicts.

        A text with a bos is its own input, so a tower that reads it for another loss too runs once.
        """
        if self.bos_id is not None:
            return tokens
        return jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=self.pad_id)

    def targets(self, tokens: Int[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
        """Returns the token to predict at each place."""
        if self.bos_id is None:
            return tokens
        return jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=self.pad_id)

    def target_mask(self, tokens: Int[Array, "batch tokens"]) -> Bool[Array, "batch tokens"]:
        """Selects the targets that have a loss: all up to the first end of text."""
        targets = self.targets(tokens)
        ends = targets == self.eos_id
        before = jnp.cumsum(ends, axis=1) - ends
        in_loss = (before == 0) & ((targets != self.pad_id) | ends)
        # Where padding and end of text share an id, appended padding looks like an end of text.
        return in_loss if self.bos_id is None else in_loss.at[:, -1].set(False)

    def _mask(self, parallel: Bool[Array, " batch"], length: int, train: bool) -> AttentionMask:
        if not train or not self.parallel_share:
            return CAUSAL
        if self.parallel_share == 1:
            return AttentionMask()
        # One program for both kinds: a prefix as long as the text undoes the causal rule.
        return AttentionMask(causal=True, prefix=jnp.where(parallel, length, 0))

    def functions(self) -> dict[str, Function]:
        """Returns the functions of a captioner.

        - `caption`: images to texts, see `Captioning.caption`.
        - `class_likelihood`: images and texts of classes to log-likelihoods, see the method.
        - `image_features`: the mean over the patches; `embed_image` normalizes it to unit length.
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
        """Generates texts about images with values in [0, 255].

        Args:
          prompt: ids that each text begins with; they are not part of the result.
          length: largest number of tokens, the end of text included; None fills the context.
          beams: width of the beam search; see `beam_search`, also for `length_penalty`. With 1,
            tokens are chosen as `Sampling` describes.
          temperature, top_k, top_p: see `Sampling`.
          seed: seed of the sampling.

        Raises:
          ValueError: the prompt fills the context, or both beams and a temperature are given.
        """
        first = self.pad_id if self.bos_id is None else self.bos_id
        # A bos takes one place of the context. The padding before a text without a bos does not.
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
        # The beams of an image are adjacent, as `beam_search` wants them.
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
        """Computes the log-probability of each class text, end included, given each image."""
        seen = self.model.apply({"params": params}, inputs["image"], method="look")

        def of_class(text: Int[Array, " tokens"]) -> Float[Array, " batch"]:
            tokens = jnp.broadcast_to(text, (len(seen), len(text)))
            scores = self.model.apply(
                {"params": params}, self.decoder_inputs(tokens), seen, method="score_tokens"
            )
            targets = self.targets(tokens)
            log = jnp.take_along_axis(jax.nn.log_softmax(scores), targets[..., None], axis=-1)
            return (log[..., 0] * self.target_mask(tokens)).sum(axis=1)

        # One class at a time: all scores at once would be [classes, batch, tokens, vocab].
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
    """Makes the `Captioning` that `config.objective` describes.

    Args:
      tokenizer: gives the decoder its vocabulary and context length.
      image: arguments of `make_vit`; the pooling is always "none".
      decoder: arguments of `make_decoder`, and `attention` to differ from the image tower. As in
        CapPa, its layers have no biases and token embeddings begin with standard deviation 1.
      parallel_share, label_smoothing, z_loss, mean: see `Captioning`.
      compute: see `make_compute`.

    Raises:
      ValueError: an unknown name, no tokenizer, a number out of range, or an attention backend that
        does not support the decoder's mask.
    """
    sizes = from_tokenizer(tokenizer, "captioning", ())
    if not 0 <= parallel_share <= 1:
        raise ValueError(f"parallel_share must be in [0, 1], not {parallel_share}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    check_choice("mean", mean, MEANS)
    how, published = make_compute(**compute), {"bias": False, "embedding_stddev": 1.0}
    prefix = jnp.zeros(1, jnp.int32) if 0 < parallel_share < 1 else None
    mask = AttentionMask(causal=True, prefix=prefix)
    decoder, scoring = with_attention({**published, **decoder}, how, mask)
    token = {"class_token": image.get("pooling", "none") == "cls"}
    model = Captioner(
        config_lib.build(
            make_vit, {**token, **image, "pooling": "none"}, "config.objective.image", compute=how
        ),
        config_lib.build(
            make_decoder,
            decoder,
            "config.objective.decoder",
            extra_tokens=1,  # the mask token
            compute=scoring,
            **sizes,
        ),
        Pixels(tuple(image_mean), tuple(image_std)),
    )
    ids = (tokenizer.eos_id, tokenizer.pad_id)
    return Captioning(model, *ids, parallel_share, label_smoothing, z_loss, mean)
