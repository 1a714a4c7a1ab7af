"""Scores beside chance and a baseline."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from vlp_jax.report.wording import difference_text, is_share, score_text

PREFIX = "eval/"
# Values of an evaluator that are no scores: numbers of examples, and chance.
_ABOUT = re.compile(r"(examples|classes|pairs|images|texts|seeds)$|^chance|_shuffled$")
_TEXTS = {"cider": "CIDEr-D", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "meteor": "METEOR"}
# Of a spread, and of how varied captions are, neither more nor less is better.
_NEITHER = re.compile(r"_std$|^(different|words)$")
_LOWER_IS_BETTER = re.compile(r"(^|_)(error|loss|nll|median_rank|mse)$")
# The first of these that an evaluator has is shown large; of retrieval both ways.
_HEADLINES = (
    ("image_to_text_r1", "text_to_image_r1"),
    ("top1",),
    ("cider", "named"),
    ("cider",),
    ("accuracy",),
    ("error",),
)
BETTER, WORSE, SAME, OTHER = "better", "worse", "equal", "different"
_ARROWS = {BETTER: "\N{BLACK UP-POINTING TRIANGLE}", WORSE: "\N{BLACK DOWN-POINTING TRIANGLE}"}


@dataclasses.dataclass(frozen=True)
class Score:
    """A score of an evaluator, with the score of guessing and the baseline's, if they are known."""

    evaluator: str
    name: str
    value: float
    chance: float | None = None
    baseline: float | None = None

    @property
    def text(self) -> str:
        """The value as text."""
        return score_text(self.name, self.value)

    @property
    def verdict(self) -> str | None:
        """The value against the baseline, as one word; None without a baseline."""
        if self.baseline is None or not math.isfinite(self.baseline):
            return None
        if self.value == self.baseline:
            return SAME
        direction = better_direction(self.name)
        if not direction:
            return OTHER
        return BETTER if (self.value - self.baseline) * direction > 0 else WORSE

    @property
    def change(self) -> str:
        """The difference from the baseline with sign, arrow and word; "" without one.

        The triangle points up for better and down for worse, whatever the sign.
        """
        if self.verdict is None:
            return ""
        if self.verdict == SAME:
            return "equal"
        text = difference_text(self.name, self.value - self.baseline)
        if self.verdict == OTHER:
            return text
        return f"{_ARROWS[self.verdict]} {text}, {self.verdict}"


def better_direction(name: str) -> int:
    """Returns 1 if a higher score is better, -1 if a lower one is, 0 if neither."""
    if _NEITHER.search(name):
        return 0
    if _LOWER_IS_BETTER.search(name):
        return -1
    return 1 if is_share(name) or name.endswith("mrr") or name in _TEXTS else 0


def by_evaluator(scores: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Groups "eval/EVALUATOR/NAME" -> value by evaluator; other keys are left out."""
    found: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        if key.startswith(PREFIX) and key.count("/") >= 2:
            evaluator, _, name = key.removeprefix(PREFIX).partition("/")
            found.setdefault(evaluator, {})[name] = value
    return found


def scores_of(
    scores: Mapping[str, float], baseline: Mapping[str, float] | None = None
) -> Iterator[Score]:
    """Yields every score of {eval/EVALUATOR/NAME: value}, with its chance and its baseline."""
    for evaluator, named in by_evaluator(scores).items():
        for name, value in named.items():
            if not _ABOUT.search(name):
                chance = chance_of(name, named)
                key = f"{PREFIX}{evaluator}/{name}"
                yield Score(evaluator, name, value, chance, (baseline or {}).get(key))


def about(named: Mapping[str, float]) -> str:
    """Says how much data the scores of an evaluator cover: "1,015 examples, 48 classes"."""
    parts = [
        f"{int(value):,} {name.replace('_', ' ')}"
        for name, value in named.items()
        if _ABOUT.search(name) and not name.startswith("chance") and "shuffled" not in name
    ]
    return ", ".join(parts)


def chance_of(name: str, named: Mapping[str, float]) -> float | None:
    """Returns the score `name` of guessing, from other values of the evaluator; None if unknown."""
    # Captions of other images of the split are the guess that a captioner has to beat.
    if f"{name}_shuffled" in named:
        return named[f"{name}_shuffled"]
    if "chance_r1" in named and (match := re.search(r"_r(\d+)$", name)):
        return min(int(match[1]) * named["chance_r1"], 1.0)
    classes = named.get("classes") or (1 / named["chance"] if named.get("chance") else None)
    if classes is None or name.endswith("_std"):
        return None
    # One of k guesses among n classes is right with probability k / n.
    if match := re.match(r"top(\d+)", name):
        return min(int(match[1]) / classes, 1.0)
    return 1 / classes if "recall" in name or "accuracy" in name else None


def headlines(scores: Mapping[str, float], baseline: Mapping[str, float] | None) -> list[Score]:
    """Chooses the scores that are shown large: the main ones of each evaluator."""
    found: dict[str, dict[str, Score]] = {}
    for score in scores_of(scores, baseline):
        found.setdefault(score.evaluator, {})[score.name] = score
    chosen = []
    for named in found.values():
        for names in _HEADLINES:
            if all(name in named for name in names):
                chosen += [named[name] for name in names]
                break
        else:
            # An evaluator that is not known here still has a headline.
            shares = [s for s in named.values() if better_direction(s.name) > 0]
            chosen += shares[:1]
    return chosen


def title_of(name: str) -> str:
    """Writes a score's name in words: "image_to_text_r1" -> "image to text R@1"."""
    if name in _TEXTS:
        return _TEXTS[name]
    name = re.sub(r"_r(\d+)$", r" R@\1", name)
    name = re.sub(r"^top(\d+)", r"top-\1", name)
    return name.replace("_", " ").replace("mrr", "mean reciprocal rank")
