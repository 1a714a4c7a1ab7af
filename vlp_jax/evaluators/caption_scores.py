"""Scores of generated captions against references: CIDEr-D, BLEU-4, ROUGE-L and METEOR.

All of them take tokens, as `tokens_of` makes them: a score depends on how texts are cut into words.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Tokens = Sequence[str]
NGRAMS = 4  # the longest that count
CIDER_SIGMA = 6.0  # Vedantam et al. 2015, "CIDEr", 5: of the penalty for another length
ROUGE_BETA = 1.2  # weight of recall against precision in COCO's evaluation
# What COCO's evaluation takes out (tylin/coco-caption, ptbtokenizer.py).
PUNCTUATIONS = frozenset(
    (*"'`.?!,:-;(){}", "''", "``", "--", "...", "-LRB-", "-RRB-", "-LCB-", "-RCB-")
)


def tokens_of(texts: Iterable[str]) -> list[list[str]]:
    """The words of texts, in lower case and without punctuation, as Penn Treebank has them.

    Close to the tokenizer of COCO's evaluation, which is a program in Java and not the same.
    """
    from nltk.tokenize import TreebankWordTokenizer

    cut = TreebankWordTokenizer().tokenize
    return [[word for word in cut(text.lower()) if word not in PUNCTUATIONS] for text in texts]


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """BLEU-4 of a corpus (Papineni et al. 2002), in [0, 1], without smoothing.

    The length that candidates are compared with is that of the closest reference.
    """
    hits, counts = [0] * NGRAMS, [0] * NGRAMS
    length = closest = 0
    for candidate, own in zip(candidates, references, strict=True):
        length += len(candidate)
        closest += min((abs(len(r) - len(candidate)), len(r)) for r in own)[1]
        for n in range(1, NGRAMS + 1):
            found = _ngrams(candidate, n)
            most: collections.Counter[Tokens] = collections.Counter()
            for reference in own:
                most |= _ngrams(reference, n)
            hits[n - 1] += sum((found & most).values())
            counts[n - 1] += max(0, len(candidate) - n + 1)
    # pycocoevalcap adds these to every fraction, so that none is 0 / 0.
    tiny, small = 1e-15, 1e-9
    product = math.prod((hit + tiny) / (count + small) for hit, count in zip(hits, counts))
    ratio = (length + tiny) / (closest + small)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return product ** (1 / NGRAMS) * penalty


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """The mean of ROUGE-L (Lin 2004, 3.1), in [0, 1]: the longest words in order that are common.

    Precision and recall are each those of the best reference, as in COCO's evaluation.
    """
    total = 0.0
    for candidate, own in zip(candidates, references, strict=True):
        common = [_longest_common(candidate, reference) for reference in own]
        precision = max((c / len(candidate) for c in common), default=0.0) if candidate else 0.0
        recall = max((c / len(r) for c, r in zip(common, own, strict=True) if r), default=0.0)
        if precision and recall:
            beta = ROUGE_BETA**2
            total += (1 + beta) * precision * recall / (recall + beta * precision)
    return total / len(candidates)


def cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """The mean of CIDEr-D (Vedantam et al. 2015, 5), from 0 to 10 (papers give 100 times it).

    How rare an n-gram is, is counted over the references given: the score of one image is 0.
    """
    frequency: collections.Counter[Tokens] = collections.Counter()
    for own in references:
        frequency.update({gram for reference in own for gram in _all_ngrams(reference)})
    log_images = math.log(len(references))

    def vector(tokens: Tokens) -> tuple[list[dict[Tokens, float]], list[float], int]:
        parts: list[dict[Tokens, float]] = [{} for _ in range(NGRAMS)]
        for gram, count in _all_ngrams(tokens).items():
            rarity = log_images - math.log(max(1, frequency[gram]))
            parts[len(gram) - 1][gram] = count * rarity
        norms = [math.sqrt(sum(x * x for x in part.values())) for part in parts]
        return parts, norms, max(0, len(tokens) - 1)  # the length is that in pairs of words

    def similarity(one: Any, other: Any) -> float:
        penalty = math.exp(-((one[2] - other[2]) ** 2) / (2 * CIDER_SIGMA**2))
        values = []
        for n in range(NGRAMS):
            shared = sum(min(x, other[0][n].get(gram, 0.0)) * other[0][n].get(gram, 0.0)
                         for gram, x in one[0][n].items())  # fmt: skip
            norm = one[1][n] * other[1][n]
            values.append(shared / norm * penalty if norm else 0.0)
        return sum(values) / NGRAMS

    total = 0.0
    for candidate, own in zip(candidates, references, strict=True):
        found = vector(candidate)
        total += sum(similarity(found, vector(r)) for r in own) / len(own)
    return 10 * total / len(candidates)


def meteor(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """The mean of METEOR (Banerjee and Lavie 2005) against the best reference, in [0, 1].

    Words match exactly or by their stems: synonyms, which need WordNet, do not.
    """
    from nltk.translate.meteor_score import meteor_score

    values = [
        meteor_score([list(r) for r in own], list(candidate), wordnet=_NoSynonyms())
        for candidate, own in zip(candidates, references, strict=True)
    ]
    return sum(values) / len(values)


class _NoSynonyms:
    """A WordNet that knows no word."""

    def synsets(self, word: str) -> list[Any]:
        """None."""
        del word
        return []


SCORES: dict[str, Callable[[Sequence[Tokens], Sequence[Sequence[Tokens]]], float]] = {
    "cider": cider,
    "bleu4": bleu,
    "rouge_l": rouge_l,
    "meteor": meteor,
}


def _ngrams(tokens: Tokens, n: int) -> collections.Counter[Tokens]:
    return collections.Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _all_ngrams(tokens: Tokens) -> collections.Counter[Tokens]:
    found: collections.Counter[Tokens] = collections.Counter()
    for n in range(1, NGRAMS + 1):
        found += _ngrams(tokens, n)
    return found


def _longest_common(one: Tokens, other: Tokens) -> int:
    """The length of the longest sequence of words that both have, in order."""
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for place, theirs in enumerate(other, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == theirs else max(above, row[place - 1])
            diagonal = above
    return row[-1]
