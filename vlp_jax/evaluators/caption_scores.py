"""Scores of generated captions against references: CIDEr-D, BLEU-4, ROUGE-L and METEOR.

All scores take lists of words from `tokens_of`. They depend on how texts are split into words, so
compare only scores with the same tokenization.
"""

from __future__ import annotations

import collections
import math
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Tokens = Sequence[str]
NGRAMS = 4  # the longest n-gram that counts
CIDER_SIGMA = 6.0  # of the Gaussian length penalty: Vedantam et al. 2015, "CIDEr", 5
ROUGE_BETA = 1.2  # weight of recall against precision in COCO's evaluation
# Tokens that COCO's evaluation removes (tylin/coco-caption, ptbtokenizer.py).
PUNCTUATIONS = frozenset(
    (*"'`.?!,:-;(){}", "''", "``", "--", "...", "-LRB-", "-RRB-", "-LCB-", "-RCB-")
)


def tokens_of(texts: Iterable[str]) -> list[list[str]]:
    """Splits texts into words by Penn Treebank's rules, in lower case and without punctuation.

    COCO's evaluation uses a Java tokenizer that differs in details.
    """
    from nltk.tokenize import TreebankWordTokenizer

    cut = TreebankWordTokenizer().tokenize
    return [[word for word in cut(text.lower()) if word not in PUNCTUATIONS] for text in texts]


def bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Computes BLEU-4 of a corpus (Papineni et al. 2002), in [0, 1], without smoothing.

    The brevity penalty uses the reference that is closest in length.
    """
    hits, counts = [0] * NGRAMS, [0] * NGRAMS
    length = closest = 0
    for candidate, captions in zip(candidates, references, strict=True):
        length += len(candidate)
        closest += min((abs(len(r) - len(candidate)), len(r)) for r in captions)[1]
        for n in range(1, NGRAMS + 1):
            # `|` of counters takes the larger count: an n-gram counts at most as often as in the
            # reference that has it most often.
            most: collections.Counter[Tokens] = collections.Counter()
            for reference in captions:
                most |= _ngrams(reference, n)
            hits[n - 1] += sum((_ngrams(candidate, n) & most).values())
            counts[n - 1] += max(0, len(candidate) - n + 1)
    # pycocoevalcap adds these to every fraction, so that none is 0 / 0.
    tiny, small = 1e-15, 1e-9
    product = math.prod((hit + tiny) / (count + small) for hit, count in zip(hits, counts))
    ratio = (length + tiny) / (closest + small)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return product ** (1 / NGRAMS) * penalty


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Computes the mean of ROUGE-L (Lin 2004, 3.1), in [0, 1]: longest common subsequences.

    As in COCO's evaluation, precision and recall are each the maximum over the references.
    """
    total = 0.0
    for candidate, captions in zip(candidates, references, strict=True):
        common = [_longest_common(candidate, reference) for reference in captions]
        precision = max((c / len(candidate) for c in common), default=0.0) if candidate else 0.0
        recall = max((c / len(r) for c, r in zip(common, captions, strict=True) if r), default=0.0)
        if precision and recall:
            beta = ROUGE_BETA**2
            total += (1 + beta) * precision * recall / (recall + beta * precision)
    return total / len(candidates)


def cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Computes the mean of CIDEr-D (Vedantam et al. 2015, 5), from 0 to 10.

    Papers print 100 times this number. The rarity of an n-gram is counted over the given
    references. So the score of a single image is always 0.
    """
    # For each n-gram the number of images with a reference that contains it.
    frequency: collections.Counter[Tokens] = collections.Counter()
    for captions in references:
        frequency.update({gram for reference in captions for gram in _all_ngrams(reference)})
    log_images = math.log(len(references))

    def vector(tokens: Tokens) -> tuple[list[dict[Tokens, float]], list[float], int]:
        parts: list[dict[Tokens, float]] = [{} for _ in range(NGRAMS)]
        for gram, count in _all_ngrams(tokens).items():
            rarity = log_images - math.log(max(1, frequency[gram]))
            parts[len(gram) - 1][gram] = count * rarity
        norms = [math.sqrt(sum(x * x for x in part.values())) for part in parts]
        return parts, norms, max(0, len(tokens) - 1)  # pycocoevalcap counts bigrams as the length

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
    for candidate, captions in zip(candidates, references, strict=True):
        generated = vector(candidate)
        total += sum(similarity(generated, vector(r)) for r in captions) / len(captions)
    return 10 * total / len(candidates)


def meteor(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Computes the mean of METEOR (Banerjee and Lavie 2005) against the best reference, in [0, 1].

    Words match exactly or by their stems. Synonyms do not match, because they need WordNet's data.
    """
    from nltk.translate.meteor_score import meteor_score

    no_synonyms = types.SimpleNamespace(synsets=lambda word: [])  # in the place of WordNet
    values = [
        meteor_score([list(r) for r in captions], list(candidate), wordnet=no_synonyms)
        for candidate, captions in zip(candidates, references, strict=True)
    ]
    return sum(values) / len(values)


SCORES: dict[str, Callable[[Sequence[Tokens], Sequence[Sequence[Tokens]]], float]] = {
    "cider": cider,
    "bleu4": bleu,
    "rouge_l": rouge_l,
    "meteor": meteor,
}


def _ngrams(tokens: Tokens, n: int) -> collections.Counter[Tokens]:
    return collections.Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _all_ngrams(tokens: Tokens) -> collections.Counter[Tokens]:
    ngrams: collections.Counter[Tokens] = collections.Counter()
    for n in range(1, NGRAMS + 1):
        ngrams += _ngrams(tokens, n)
    return ngrams


def _longest_common(one: Tokens, other: Tokens) -> int:
    """Returns the length of the longest common subsequence."""
    # Dynamic programming over a table of prefixes, of which one row is kept. `diagonal` is the
    # entry of both prefixes without their last words.
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for place, theirs in enumerate(other, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == theirs else max(above, row[place - 1])
            diagonal = above
    return row[-1]
