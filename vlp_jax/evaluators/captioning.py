"""Captions that a model generates, and classification by the captions that it finds likely."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.data.source_reader import RAW_TEXT
from vlp_jax.data.wording import Wording, caption_wording, captions_of
from vlp_jax.errors import NoScores, UserError
from vlp_jax.evaluators import classification
from vlp_jax.evaluators.base import SHOWN, Evaluator, Outcome, Pairs, Resources
from vlp_jax.evaluators.caption_scores import SCORES, cider, tokens_of
from vlp_jax.evaluators.class_lists import check_class_names, check_templates, fill, lines
from vlp_jax.evaluators.outputs import check_field, check_labels, numbered, outputs_of
from vlp_jax.observe.samples import Sample
from vlp_jax.parallel import agreement
from vlp_jax.parallel.batch import put_batch

NUMBER = "number"  # of an example in its split


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionsOutcome(Outcome):
    """What a model says about every image of a split, in the order of the source.

    Attributes:
      captions: that it generated.
      references: all captions of each image.
      likelihood: the log-probability of each generated caption.
      index: int64 [n], the place of each example in its source.
      labels: the class of each image, int64 [n]; empty without classes.
      class_names: by label.
      pictures: of a few images, on process 0: place in the source -> uint8 [height, width, 3].
    """

    captions: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    likelihood: Float[np.ndarray, " n"]
    index: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    class_names: tuple[str, ...] = ()
    pictures: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def samples(self) -> list[Sample]:
        """The first images with the caption that was generated and one by a person."""
        rows = {int(place): row for row, place in enumerate(self.index)}
        return [
            Sample(
                picture,
                {
                    "the model": self.captions[rows[place]],
                    "a reference": self.references[rows[place]][0],
                },
            )
            for place, picture in sorted(self.pictures.items())
            if place in rows
        ]

    def named(self, captions: Sequence[str]) -> float:
        """The share of captions with all words of the name of their image's class, and no other
        word of any class's name."""
        names = [set(name.lower().split()) for name in self.class_names]
        known = set().union(*names)
        words = (set(re.findall(r"\w+", caption.lower())) for caption in captions)
        hits = [own & known == names[k] for own, k in zip(words, self.labels, strict=True)]
        return float(np.mean(hits))

    def scores(self) -> dict[str, float]:
        """`cider` (CIDEr-D, from 0 to 10), `bleu4`, `rouge_l` and `meteor` in [0, 1], of words as
        `tokens_of` cuts them; `words` of a caption and the share of `different` captions;
        `examples`. With classes `named` (see `CaptionsOutcome.named`), and `chance`, one over their
        number. What ends in `_shuffled` is the score of captions of other images.
        """
        candidates = tokens_of(self.captions)
        references = [tokens_of(own) for own in self.references]
        scores = {name: score(candidates, references) for name, score in SCORES.items()}
        # What is said of the image before: as good as a model can be that does not look.
        shuffled = cider([*candidates[-1:], *candidates[:-1]], references)
        scores["cider_shuffled"] = shuffled
        if self.class_names:
            scores |= {
                "named": self.named(self.captions),
                "named_shuffled": self.named([*self.captions[-1:], *self.captions[:-1]]),
                "chance": 1 / len(self.class_names),
            }
        lengths = [len(tokens) for tokens in candidates]
        different = len(set(self.captions))
        return {
            **scores,
            "words": float(np.mean(lengths)),
            "different": different / len(self.captions),
            "examples": float(len(self.captions)),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """What `save_embeddings` writes; the references of an image are one JSON list."""
        return {
            "captions": np.array(self.captions),
            "references": np.array([json.dumps(own) for own in self.references]),
            "likelihood": self.likelihood,
            "index": self.index,
        }


class Captions(Evaluator):
    """How close the captions that a model generates are to those that people gave.

    Args:
      data: of the images.
      references: the field with the captions of each image, one or several; "text_raw" is the text
        that the model would be trained on.
      prompt: what each caption begins with.
      length: tokens at most; default: as many as the context has room for.
      beams, length_penalty: of the search; with 1 beam the most likely word is taken each time.
      label_field: the field with the class of an image: then it is also told how often a caption
        names the class.
      class_names: by label; default: those that the dataset knows.

    Raises:
      UserError: a field that is not there, or a prompt that is too long.
    """

    needs = ("caption",)

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        resources: Resources,
        references: str = "captions",
        prompt: str = "",
        length: int | None = None,
        beams: int = 1,
        length_penalty: float = 0.0,
        label_field: str | None = None,
        class_names: Sequence[str] | str | None = None,
    ):
        self._resources, self._references, self._label_field = resources, references, label_field
        self._pipeline = resources.pipeline(data, extra_fields=(references,))
        worded = references == RAW_TEXT  # the operations on the data have done it
        self._wording = Wording() if worded else caption_wording(data.get("preprocess"))
        ids = resources.tokenizer.encode([prompt])[0] if prompt else []
        room = resources.tokenizer.context_length
        if len(ids) >= room:
            raise UserError(
                f"captions: a prompt of {len(ids)} tokens leaves no room in the context of {room}"
            )
        self._function = resources.functions["caption"].having(
            prompt=tuple(ids), length=length, beams=beams, length_penalty=length_penalty
        )
        self._class_names: tuple[str, ...] = ()
        if label_field is not None:
            self._class_names = _class_names(self._pipeline, label_field, class_names)

    def outcome(self, params: Any) -> CaptionsOutcome:
        """Captions and references of the whole split.

        Raises:
          NoScores: no example has a reference.
        """
        own: list[dict[str, Any]] = []
        pictures: dict[int, np.ndarray] = {}
        for batch in numbered(self._pipeline.batches(), NUMBER):
            for row in np.flatnonzero(batch["mask"])[: SHOWN - len(pictures)].tolist():
                pictures[int(batch[NUMBER][row])] = np.asarray(batch["image"][row])
            own += self._of_batch(params, batch)
        rows = [row for part in _of_all_processes(own) for row in part]
        if not rows:
            raise NoScores(f"captions: no example has a caption in {self._references!r}")
        rows.sort(key=lambda row: row["index"])
        return CaptionsOutcome(
            captions=tuple(row["caption"] for row in rows),
            references=tuple(tuple(row["references"]) for row in rows),
            likelihood=np.array([row["likelihood"] for row in rows], np.float32),
            index=np.array([row["index"] for row in rows], np.int64),
            labels=np.array([row["label"] for row in rows if self._class_names], np.int64),
            class_names=self._class_names,
            pictures=pictures,
        )

    def _of_batch(self, params: Any, batch: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """The examples of a batch that this process has read."""
        references, numbers = batch.pop(self._references), batch[NUMBER]
        keep = batch["mask"]
        fields = put_batch({"image": batch["image"]}, self._resources.mesh)
        made, _ = jax.device_get(self._function(params, fields["image"], {}))
        first = jax.process_index() * len(keep)
        here = slice(first, first + len(keep))
        texts = self._resources.tokenizer.decode(made.tokens[here])
        rows = []
        for row in np.flatnonzero(keep).tolist():
            own = [x.decode() for x in self._wording(captions_of(references[row]))]
            if not own:
                continue
            rows.append(
                {
                    "index": int(numbers[row]),
                    "caption": texts[row],
                    "references": own,
                    "likelihood": float(made.scores[first + row]),
                    "label": int(batch[self._label_field][row]) if self._class_names else 0,
                }
            )
        return rows


def _class_names(
    pipeline: EvalPipeline, label_field: str, given: Sequence[str] | str | None
) -> tuple[str, ...]:
    """The names of the classes that a field numbers: those given, or those of the data.

    Raises:
      UserError: there are none, one is there twice, or the field holds no whole numbers.
    """
    check_field(pipeline, label_field, "class_names")
    names = lines(given or pipeline.class_names(label_field) or (), "class_names")
    if not names:
        raise UserError(f"the data has no names of the classes in {label_field!r}: set class_names")
    return check_class_names(names)


def _of_all_processes(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of every process, which go from device to device: there may be megabytes."""
    if jax.process_count() == 1:
        return [rows]
    text = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    sizes = agreement.gather(len(text))
    padded = np.pad(text, (0, max(sizes) - len(text)))
    parts = multihost_utils.process_allgather(padded)
    return [json.loads(part[:size].tobytes()) for part, size in zip(parts, sizes, strict=True)]


class Likelihood(Evaluator):
    """How often the name of the right class is the likeliest caption of an image.

    The score of a class is the log-probability of its text given the image (Tschannen et al. 2023,
    "CapPa", 4.3).

    Args:
      data: of the images, with the class as a whole number in `label_field`.
      template: the text of a class, with `{}` where its name goes.
      class_names: by label, or the path of a file with one a line; default: those that the dataset
        knows.
    """

    needs = ("class_likelihood",)

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        resources: Resources,
        template: str = "{}",
        label_field: str = "label",
        class_names: Sequence[str] | str | None = None,
    ):
        self._resources, self._label_field = resources, label_field
        self._pipeline = resources.pipeline(data)
        names = _class_names(self._pipeline, label_field, class_names)
        (template,) = check_templates((template,))
        self._texts = [fill(template, name) for name in names]

    def pairs(self, params: Any) -> Pairs:
        """`top1` in [0, 1], `top5` with more than five classes, `examples`, `classes`, `chance`.

        Raises:
          NoScores: a label that is not the number of a class.
        """
        classes = self._resources.tokens(self._texts)
        scores, fields = outputs_of(
            self._resources,
            params,
            self._pipeline.batches(),
            "class_likelihood",
            ("image",),
            keep=(self._label_field,),
            more={"classes": classes},
        )
        labels = fields[self._label_field]
        check_labels(labels, len(classes), self._label_field)
        ranks = classification.label_ranks(scores, labels)
        yield "top1", classification.top_k(ranks, 1)
        if len(classes) > 5:
            yield "top5", classification.top_k(ranks, 5)
        yield "examples", float(len(labels))
        yield "classes", float(len(classes))
        yield "chance", 1 / len(classes)
