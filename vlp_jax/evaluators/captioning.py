"""Evaluates generated captions, and classification by the likelihood of captions."""

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

from vlp_jax.data.source_reader import RAW_TEXT
from vlp_jax.data.wording import Wording, caption_wording, captions_of
from vlp_jax.errors import NoScores, UserError
from vlp_jax.evaluators import classification
from vlp_jax.evaluators.base import NUMBER, SHOWN, Evaluator, Outcome, Pairs, Resources
from vlp_jax.evaluators.caption_scores import SCORES, cider, tokens_of
from vlp_jax.evaluators.class_lists import (
    check_field,
    check_labels,
    check_templates,
    fill,
    names_of_classes,
    numbered,
)
from vlp_jax.observe.samples import Sample
from vlp_jax.parallel import agreement
from vlp_jax.parallel.batch import put_batch


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionsOutcome(Outcome):
    """Generated captions of every image of a split, in the order of the source.

    Attributes:
      references: all captions by people of each image.
      likelihood: the log-probability of each generated caption.
      index: the position of each example in its source.
      labels: the class of each image; empty without `class_names`.
      pictures: a few images, on process 0: position -> uint8 [height, width, 3].
    """

    captions: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    likelihood: Float[np.ndarray, " n"]
    index: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " labels"]
    class_names: tuple[str, ...] = ()
    pictures: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def samples(self) -> list[Sample]:
        """Returns the first images, each with its generated caption and one reference."""
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
        """Computes the share of captions with all words of their class's name, and of no other."""
        names = [set(name.lower().split()) for name in self.class_names]
        known = set().union(*names)
        words = (set(re.findall(r"\w+", caption.lower())) for caption in captions)
        hits = [spoken & known == names[k] for spoken, k in zip(words, self.labels, strict=True)]
        return float(np.mean(hits))

    def scores(self) -> dict[str, float]:
        """Computes the scores:

        - `cider` (CIDEr-D, from 0 to 10), `bleu4`, `rouge_l` and `meteor` (in [0, 1]).
        - `words`: mean number of words. `different`: share of distinct captions. `examples`.
        - With classes: `named` (see `CaptionsOutcome.named`) and `chance`, 1 / classes.
        - `..._shuffled`: the score with the captions assigned to other images.
        """
        candidates = tokens_of(self.captions)
        references = [tokens_of(captions) for captions in self.references]
        scores = {name: score(candidates, references) for name, score in SCORES.items()}
        # Each image gets the caption of the image before: the level of a model that is blind.
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
        """Returns the arrays for `save_embeddings`; the references of an image are a JSON list."""
        return {
            "captions": np.array(self.captions),
            "references": np.array([json.dumps(captions) for captions in self.references]),
            "likelihood": self.likelihood,
            "index": self.index,
        }


class Captions(Evaluator):
    """Compares generated captions with captions by people.

    Args:
      data: the images.
      references: the field with one or several captions of an image; "text_raw" is the text that
        the model would be trained on.
      prompt: the beginning of each caption.
      length: largest number of tokens; None for as many as the context holds.
      beams, length_penalty: see `beam_search`; with 1 beam the most likely token is taken.
      label_field: the field with the class of an image, for the score `named`; None for no score.
      class_names: names of the classes by label; None for the dataset's names.

    Raises:
      UserError: a field is missing, or the prompt is too long.
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
        worded = references == RAW_TEXT  # the data's operations on texts were applied already
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
            check_field(self._pipeline, label_field, "class_names")
            known = self._pipeline.class_names(label_field)
            self._class_names = names_of_classes(class_names, known, label_field)

    def outcome(self, params: Any) -> CaptionsOutcome:
        """Generates captions for the whole split; raises NoScores if no example has a reference."""
        local: list[dict[str, Any]] = []  # rows that this process has read
        pictures: dict[int, np.ndarray] = {}
        for batch in numbered(self._pipeline.batches()):
            for row in np.flatnonzero(batch["mask"])[: SHOWN - len(pictures)].tolist():
                pictures[int(batch[NUMBER][row])] = np.asarray(batch["image"][row])
            local += self._of_batch(params, batch)
        rows = [row for part in _of_all_processes(local) for row in part]
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
        """Generates captions for a batch; returns a row for each example that this process read."""
        references, numbers = batch.pop(self._references), batch[NUMBER]
        keep = batch["mask"]
        fields = put_batch({"image": batch["image"]}, self._resources.mesh)
        generated, _ = jax.device_get(self._function(params, fields["image"], {}))
        # The result covers the global batch; only this process has the references of its rows.
        first = jax.process_index() * len(keep)
        here = slice(first, first + len(keep))
        texts = self._resources.tokenizer.decode(generated.tokens[here])
        rows = []
        for row in np.flatnonzero(keep).tolist():
            captions = [x.decode() for x in self._wording(captions_of(references[row]))]
            if not captions:
                continue
            rows.append(
                {
                    "index": int(numbers[row]),
                    "caption": texts[row],
                    "references": captions,
                    "likelihood": float(generated.scores[first + row]),
                    "label": int(batch[self._label_field][row]) if self._class_names else 0,
                }
            )
        return rows


def _of_all_processes(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Gathers the rows of every process, through the devices: there may be megabytes of text."""
    if jax.process_count() == 1:
        return [rows]
    text = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    sizes = agreement.gather(len(text))
    padded = np.pad(text, (0, max(sizes) - len(text)))
    parts = multihost_utils.process_allgather(padded)
    return [json.loads(part[:size].tobytes()) for part, size in zip(parts, sizes, strict=True)]


class Likelihood(Evaluator):
    """Classifies images by the likelihood of captions that name the classes.

    The score of a class is the log-probability of its text given the image (Tschannen et al. 2023,
    "CapPa", 4.3).

    Args:
      data: images, with the class as a whole number in `label_field`.
      template: the text of a class, with `{}` in place of its name.
      class_names: names of the classes by label, or the path of a file with one name a line; None
        for the dataset's names.
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
        check_field(self._pipeline, label_field, "class_names")
        known = self._pipeline.class_names(label_field)
        names = names_of_classes(class_names, known, label_field)
        (template,) = check_templates((template,))
        self._texts = [fill(template, name) for name in names]

    def pairs(self, params: Any) -> Pairs:
        """Yields `top1`, `top5` (with more than five classes), `examples`, `classes`, `chance`."""
        classes = self._resources.tokens(self._texts)
        batches, keep = self._pipeline.batches(), (self._label_field,)
        scores, fields = self._resources.outputs(
            params, batches, "class_likelihood", ("image",), keep, more={"classes": classes}
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
