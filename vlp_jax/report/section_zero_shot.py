"""The section of zero-shot classification: confusions, recall, calibration, mistakes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from vlp_jax.evaluators.classification import calibration_bins
from vlp_jax.evaluators.zero_shot import ZeroShotOutcome
from vlp_jax.report.blocks import (
    Beside,
    Block,
    Card,
    Cards,
    Cell,
    Chart,
    Charts,
    Fold,
    Section,
    Table,
    Text,
)
from vlp_jax.report.charts import confusion_map, reliability
from vlp_jax.report.pictures import Album
from vlp_jax.report.wording import percent

MOST_CLASSES = 60  # of a confusion matrix; of more, those that are confused most are drawn
_MOST_PAIRS = 12
_MOST_WORST = 12
_MOST_ROWS = 200  # of the table of all classes
MISTAKES = 8

Images = Mapping[int, np.ndarray]


def predictions(outcome: ZeroShotOutcome) -> Int[np.ndarray, " n"]:
    """Returns the class that each image is most similar to."""
    return outcome.cosines.argmax(axis=1)


def confusion(outcome: ZeroShotOutcome) -> Int[np.ndarray, "classes classes"]:
    """Counts the images of each class (row) that were taken for each class (column)."""
    classes = len(outcome.class_names)
    # A pair of classes as one number, so that one pass counts all pairs.
    flat = np.bincount(outcome.labels * classes + predictions(outcome), minlength=classes**2)
    return flat.reshape(classes, classes)


def mistakes(outcome: ZeroShotOutcome, count: int = MISTAKES) -> Int[np.ndarray, " few"]:
    """Returns rows of images that were taken for another class, the largest margin first."""
    own = np.take_along_axis(outcome.cosines, outcome.labels[:, None], axis=1)[:, 0]
    margin = outcome.cosines.max(axis=1) - own
    wrong = np.flatnonzero(predictions(outcome) != outcome.labels)
    return wrong[np.argsort(-margin[wrong], kind="stable")][:count]


def zero_shot_section(name: str, outcome: ZeroShotOutcome, images: Images, album: Album) -> Section:
    """Builds the section of an evaluator; `images` has the pixels of `mistakes` by place."""
    counts = confusion(outcome)
    few = [_pairs(counts, outcome.class_names)]
    if outcome.logit_scale is not None:
        few.append(_calibration(outcome))
    worst, every = _recalls(counts, outcome.class_names)
    blocks = [_matrix(counts, outcome.class_names), Beside([*few, worst]), *every]
    if cards := _mistaken(outcome, images, album):
        text = "The mistakes of the largest margin. In brackets: cosine similarity."
        blocks.append(Cards("Mistakes", cards, text))
    title = "Zero-shot" if name == "zero_shot" else f"Zero-shot: {name}"
    return Section(f"zero-shot-{name}", title, blocks)


def _matrix(counts: np.ndarray, names: tuple[str, ...]) -> Block:
    total, right = counts.sum(), np.trace(counts)
    caption = "Rows: the true class. Columns: the class that was predicted. "
    rows = np.flatnonzero(counts.sum(axis=1))
    # A class without an image may be predicted all the same.
    columns = np.union1d(rows, np.flatnonzero(counts.sum(axis=0)))
    if len(columns) > MOST_CLASSES:  # names would be too small to read
        errors = counts - np.diag(np.diag(counts))
        confused = errors.sum(axis=0) + errors.sum(axis=1)
        columns = np.sort(np.argsort(-confused, kind="stable")[:MOST_CLASSES])
        rows = np.intersect1d(rows, columns)
        caption += f"Of all classes the {MOST_CLASSES} that are confused most. "
    elif len(columns) < len(names):
        caption += "Classes that have no image and were never predicted are left out. "
    caption += (
        "Blue is right, red is an error; a cell is stronger, the larger its share of the row."
    )
    label = f"Confusion matrix: {right:,} of {total:,} images are right"
    svg = confusion_map(counts, names, rows, columns, label)
    return Charts([Chart("Confusion matrix", svg, caption, natural=True)])


def _pairs(counts: np.ndarray, names: tuple[str, ...]) -> Block:
    errors = counts - np.diag(np.diag(counts))
    order = np.argsort(-errors, axis=None, kind="stable")[:_MOST_PAIRS]
    rows: list[list[str | Cell]] = []
    for row, column in zip(*np.unravel_index(order, errors.shape)):
        count, total = errors[row, column], counts[row].sum()
        if count:
            rows.append([names[row], names[column], f"{count:,} of {total:,}"])
    if not rows:
        return Text("No image was taken for another class.")
    return Table("Most frequent confusions", ["true class", "taken for", "images"], rows, (2,))


def _recalls(counts: np.ndarray, names: tuple[str, ...]) -> tuple[Block, list[Block]]:
    """Builds a table of the lowest recalls, and a folded one of all if there are more."""
    totals = counts.sum(axis=1)
    present = np.flatnonzero(totals)
    recall = np.diag(counts)[present] / totals[present]
    # Stable: classes of equal recall keep their order, so that two reports can be compared.
    order = np.argsort(recall, kind="stable")
    rows: list[list[str | Cell]] = [
        [
            names[present[n]],
            Cell(percent(recall[n]), share=float(recall[n])),
            f"{totals[present[n]]:,}",
        ]
        for n in order
    ]
    head = ["class", "recall", "images"]
    if len(rows) <= _MOST_WORST:
        return Table("Recall of each class, from the lowest", head, rows, (1, 2)), []
    shown = rows[:_MOST_ROWS]
    table = Table(f"Recall of {len(shown):,} classes, from the lowest", head, shown, (1, 2))
    worst = Table("Classes with the lowest recall", head, rows[:_MOST_WORST], (1, 2))
    return worst, [Fold(f"Recall of all {len(rows):,} classes", [table])]


def _calibration(outcome: ZeroShotOutcome) -> Block:
    confidences = outcome.probabilities.max(axis=1)
    bins = calibration_bins(confidences, outcome.ranks < 1)
    scores = outcome.scores()
    error = percent(scores["calibration_error"])
    label = f"Reliability diagram: expected calibration error {error}"
    mean, right = percent(float(confidences.mean())), percent(scores["top1"])
    side = "overconfident" if confidences.mean() > scores["top1"] else "underconfident"
    caption = (
        "How often the model is right, for images of which it is so sure; on the dotted line the "
        f"two would agree. On average it is {mean} sure and {right} right: {side}. Expected "
        f"calibration error {error}."
    )
    return Charts([Chart("Calibration", reliability(*bins, label), caption)])


def _mistaken(outcome: ZeroShotOutcome, images: Images, album: Album) -> list[Card]:
    cards, taken = [], predictions(outcome)
    for row in mistakes(outcome):
        right, wrong = outcome.labels[row], taken[row]
        true_name, wrong_name = outcome.class_names[right], outcome.class_names[wrong]
        cosines = outcome.cosines[row]
        lines = [
            ("taken for", f"{wrong_name} ({cosines[wrong]:.2f})"),
            ("but is", f"{true_name} ({cosines[right]:.2f})"),
        ]
        pixels = images.get(int(outcome.index[row]))
        cards.append(album.card([(pixels, f"{true_name}, taken for {wrong_name}", "")], lines))
    return [card for card in cards if card]
