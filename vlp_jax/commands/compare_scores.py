"""Computes the scores of an evaluation again, from its embeddings and by other people's code.

    vlp-jax compare-scores --embeddings DIR [--scores FILE]

DIR holds what `save_embeddings` wrote, one .npz an evaluator. NumPy in float64, scikit-learn, SciPy
and, if it is installed, CLIP_benchmark compute the scores; nothing of vlp_jax's evaluators is
imported. FILE is what `python -m vlp_jax.evaluate --output FILE` wrote; without it the scores in
the .npz are compared. The exit status is 1 if any differs by more than 1e-6.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vlp_jax.arguments import make_parser
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.files import read_text

Arrays = Mapping[str, np.ndarray]
Scores = dict[str, tuple[float, str]]  # value, and who computed it
EQUAL = 1e-9  # float64 similarities this close are of the same texts or images


def _counts(**values: float) -> Scores:
    return {name: (float(value), "the arrays") for name, value in values.items()}


def zero_shot(a: Arrays) -> Scores:
    """Scores a `ZeroShotOutcome`."""
    labels, classes = a["labels"], len(a["class_names"])
    cosines = a["image"].astype(np.float64) @ a["class_embeddings"].astype(np.float64).T
    scores = {
        **_top(cosines, labels, classes),
        **_counts(examples=len(labels), classes=classes, chance=1 / classes),
    }
    from sklearn.metrics import log_loss, recall_score

    recall = recall_score(labels, cosines.argmax(1), average="macro", labels=np.unique(labels))
    scores["mean_per_class_recall"] = recall, "scikit-learn"
    if "logit_scale" in a:
        logits = float(a["logit_scale"]) * cosines
        # exp of 100 times a cosine overflows nothing in float64 once the largest is 0.
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        scores["nll"] = log_loss(labels, p, labels=np.arange(classes)), "scikit-learn"
        scores["calibration_error"] = _calibration(p, labels), "a loop in float64"
    return scores


def _top(scores: np.ndarray, labels: np.ndarray, classes: int) -> Scores:
    """top1 and top5 by CLIP_benchmark, or by scikit-learn if it is not there."""
    try:
        import torch
        from clip_benchmark.metrics.zeroshot_classification import accuracy

        ks = (1, min(5, classes))
        found = accuracy(torch.tensor(scores), torch.tensor(labels), topk=ks)
        return {
            f"top{k}": (value, "CLIP_benchmark") for k, value in zip((1, 5), found, strict=True)
        }
    except (ImportError, TypeError):  # its `accuracy` does not run with NumPy 2.4
        from sklearn.metrics import top_k_accuracy_score

        if classes <= 5:
            top5 = 1.0
        else:
            top5 = top_k_accuracy_score(labels, scores, k=5, labels=np.arange(classes))
        return {
            "top1": (float((scores.argmax(1) == labels).mean()), "NumPy"),
            "top5": (float(top5), "scikit-learn"),
        }


def _calibration(p: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    confidence, hit = p.max(1), p.argmax(1) == labels
    error = 0.0
    for m in range(bins):
        # Bins are open to the left, as in Guo et al. 2017, so that a confidence of 1 is in the
        # last.
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return float(error)


def retrieval(a: Arrays) -> Scores:
    """Scores a `RetrievalOutcome`."""
    image, text, owners = a["image"].astype(np.float64), a["text"].astype(np.float64), a["owners"]
    scores = _counts(pairs=len(text), images=len(image), chance_r1=1 / len(image))
    matrix = image @ text.T
    own = owners == np.arange(len(image))[:, None]
    for name, similarity, mine in (
        ("image_to_text", matrix, own),
        ("text_to_image", matrix.T, own.T),
    ):
        # Of several captions the nearest one counts.
        best = np.where(mine, similarity, -np.inf).max(1, keepdims=True)
        above = (similarity > best + EQUAL).sum(1)
        equal = abs(similarity - best) <= EQUAL
        several, right = equal.sum(1), (equal & mine).sum(1)
        ties = bool((several > right).any())
        for k in a["ks"].tolist():
            value, by = _found(above, several, right, k), "NumPy, equals in random order"
            if not ties:
                value, by = _clip_benchmark_recall(similarity, mine, k) or (value, "NumPy")
            scores[f"{name}_r{k}"] = value, by
        rank = above + (several + 1) / (right + 1)
        scores[f"{name}_median_rank"] = float(np.median(rank)), "NumPy"
        scores[f"{name}_mrr"] = _reciprocal(above, several, right), "NumPy"
    return scores


def _found(above: np.ndarray, several: np.ndarray, right: np.ndarray, k: int) -> float:
    """Mean probability that a right one is among the first k: hypergeometric."""
    from scipy.stats import hypergeom

    room = np.clip(k - above, 0, several)
    return float((1 - hypergeom.pmf(0, several, right, room)).mean())


def _reciprocal(above: np.ndarray, several: np.ndarray, right: np.ndarray) -> float:
    """Mean of E[1 / (above + first)], P(first > t) being hypergeometric too."""
    from scipy.stats import hypergeom

    total = 0.0
    for a, n, r in zip(above.tolist(), several.tolist(), right.tolist(), strict=True):
        if n == r:
            total += 1 / (a + 1)
            continue
        beyond = hypergeom.pmf(0, n, r, np.arange(n + 1))
        total += float(((beyond[:-1] - beyond[1:]) / (a + np.arange(1, n + 1))).sum())
    return total / len(above)


def _clip_benchmark_recall(
    similarity: np.ndarray, mine: np.ndarray, k: int
) -> tuple[float, str] | None:
    """Recall by CLIP_benchmark's `zeroshot_retrieval.evaluate`; None if it is not installed."""
    try:
        import torch
        from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
    except ImportError:
        return None
    if k > similarity.shape[1]:
        return None
    rows, positives = torch.tensor(similarity), torch.tensor(mine)
    found = batchify(recall_at_k, rows, positives, 64, "cpu", k=k)
    return float((found > 0).double().mean()), "CLIP_benchmark"


def geometry(a: Arrays) -> Scores:
    """Scores a `GeometryOutcome`."""
    from scipy.spatial.distance import pdist

    image, text = a["image"].astype(np.float64), a["text"].astype(np.float64)
    gap = np.linalg.norm(image.mean(0) - text.mean(0))
    scores = _counts(pairs=len(image))
    scores["alignment"] = float((np.linalg.norm(image - text, axis=1) ** 2).mean()), "NumPy"
    scores["modality_gap"] = float(gap), "NumPy"
    for name, x in (("image", image), ("text", text)):
        values = np.linalg.svd(x, compute_uv=False)
        share = values[values > 0] / values.sum()
        entropy = -(share * np.log(share)).sum()
        scores[f"{name}_effective_rank"] = float(np.exp(entropy)), "NumPy"
        uniformity = np.log(np.exp(-2 * pdist(x, "sqeuclidean")).mean())
        scores[f"{name}_uniformity"] = float(uniformity), "SciPy"
    return scores


def _features(a: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Scores]:
    counts = _counts(
        examples=len(a["test"]), train_examples=len(a["train"]), classes=float(a["classes"])
    )
    parts = (a[name] for name in ("train", "train_labels", "test", "test_labels"))
    train, train_labels, test, test_labels = parts
    return train.astype(np.float64), train_labels, test.astype(np.float64), test_labels, counts


def linear_probe(a: Arrays) -> Scores:
    """Scores a `LinearProbeOutcome`: fits L-BFGS again, and takes the saved logits of SGD."""
    train, labels, test, test_labels, scores = _features(a)
    method, chosen = str(a["method"]), float(a["chosen"])
    if method == "sgd":
        scores |= _top(a["logits"], test_labels, int(a["classes"]))
        tried = {rate: accuracy for rate, accuracy in a["tried"].tolist()}
        scores["learning_rate"] = max(tried, key=lambda r: (tried[r], -r)), "the arrays"
        scores["holdout_top1"] = max(tried.values()), "the arrays"
        return scores
    from sklearn.linear_model import LogisticRegression

    def fit(x: np.ndarray, y: np.ndarray) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LogisticRegression(C=1 / chosen, max_iter=int(a["max_iterations"])).fit(x, y)

    model = fit(train, labels)
    predicted = model.predict_proba(test)
    full = np.zeros((len(test), int(a["classes"])))
    full[:, model.classes_] = predicted
    scores |= {
        k: (v, f"scikit-learn, {by}")
        for k, (v, by) in _top(full, test_labels, full.shape[1]).items()
    }
    order = np.random.default_rng(int(a["seed"])).permutation(len(train))
    # The split is drawn again from its seed: the held-out score is checked on the same rows.
    held, kept = np.split(order, [round(len(train) * float(a["holdout"]))])
    part = fit(train[np.sort(kept)], labels[np.sort(kept)])
    scores["holdout_top1"] = part.score(train[held], labels[held]), "scikit-learn"
    tried = dict(a["tried"].tolist())
    scores["l2"] = max(tried, key=lambda value: (tried[value], value)), "the arrays"
    return scores


def knn(a: Arrays) -> Scores:
    """Scores a `KnnOutcome`."""
    from sklearn.neighbors import KNeighborsClassifier

    train, labels, test, test_labels, scores = _features(a)
    temperature = float(a["temperature"])
    for k in a["ks"].tolist():
        model = KNeighborsClassifier(
            n_neighbors=k,
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: np.exp(-distance / temperature),
        )
        scores[f"top1_k{k}"] = model.fit(train, labels).score(test, test_labels), "scikit-learn"
    return scores


def few_shot(a: Arrays) -> Scores:
    """Scores a `FewShotOutcome`."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, labels, test, test_labels, scores = _features(a)
    for shots in a["shots"].tolist():
        found = []
        for seed in a["seeds"].tolist():
            order = np.random.default_rng([seed, shots]).permutation(len(labels))
            rows = [order[labels[order] == c][:shots] for c in np.unique(labels)]
            rows = np.sort(np.concatenate(rows))
            model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=a["grid"]))
            found.append(model.fit(train[rows], labels[rows]).score(test, test_labels))
        scores[f"top1_{shots}shot"] = float(np.mean(found)), "scikit-learn"
        scores[f"top1_{shots}shot_std"] = float(np.std(found)), "scikit-learn"
    return {**scores, **_counts(seeds=len(a["seeds"]))}


KINDS = {
    "FewShotOutcome": few_shot,
    "GeometryOutcome": geometry,
    "KnnOutcome": knn,
    "LinearProbeOutcome": linear_probe,
    "RetrievalOutcome": retrieval,
    "ZeroShotOutcome": zero_shot,
}


TOLERANCE = 1e-6


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = make_parser("vlp-jax compare-scores", __doc__)
    parser.add_argument("--embeddings", type=Path, metavar="DIR", required=True)
    parser.add_argument("--scores", type=Path, metavar="FILE", help="eval/NAME/SCORE -> value")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, metavar="D", help="default: %(default)g"
    )
    return parser.parse_args(argv)


def load(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Loads the arrays of each evaluator, by its name.

    Raises:
      UserError: there are no files, or one was not written by `save_embeddings`.
    """
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise UserError(f"--embeddings {folder}: there is no .npz in this folder")
    found = {}
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            found[file.stem] = dict(arrays)
        if "kind" not in found[file.stem]:
            raise UserError(f"{file} has no 'kind': it was not written by save_embeddings")
    return found


def own_scores(
    name: str, arrays: Mapping[str, np.ndarray], scores: Mapping[str, float] | None
) -> dict[str, float]:
    """Returns the scores of vlp_jax, from a file of scores or else from the .npz itself.

    Raises:
      UserError: the file has no scores of the evaluator `name`.
    """
    if scores is None:
        return dict(
            zip(arrays["score_names"].tolist(), arrays["score_values"].tolist(), strict=True)
        )
    # Names as in metrics.jsonl, which is where FILE comes from.
    prefix = f"eval/{name}/"
    own = {k.removeprefix(prefix): v for k, v in scores.items() if k.startswith(prefix)}
    if not own:
        known = {key.split("/")[1] for key in scores if key.startswith("eval/")}
        raise UserError(f"--scores: {unknown_key_message(name, known, 'its evaluators')}")
    return own


def compare(
    name: str, arrays: Mapping[str, np.ndarray], own: Mapping[str, float]
) -> Iterator[tuple[str, float, float, str]]:
    """Yields (score, ours, independent, who computed it) of every score.

    Raises:
      UserError: an unknown kind of outcome.
    """
    kind = str(arrays["kind"])
    if kind not in KINDS:
        raise UserError(f"{name}.npz: {unknown_key_message(kind, KINDS, 'kind')}")
    independent: Callable = KINDS[kind]
    others = independent(arrays)
    for score in own:
        value, by = others.get(score, (float("nan"), "nobody"))
        yield f"{name}/{score}", own[score], float(value), by


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    table = Table("score", "ours", "independent", "difference", "by")
    worst = 0.0
    try:
        scores = json.loads(read_text(arguments.scores, "--scores")) if arguments.scores else None
        for name, arrays in load(arguments.embeddings).items():
            for row in compare(name, arrays, own_scores(name, arrays, scores)):
                score, ours, other, by = row
                # Both NaN is agreement; one of them is not.
                difference = abs(ours - other) if ours == ours or other == other else 0.0
                # What nobody computed is not equal.
                worst = max(worst, difference if difference == difference else np.inf)
                table.add_row(score, f"{ours:.8g}", f"{other:.8g}", f"{difference:.1e}", by)
    except (UserError, OSError, json.JSONDecodeError) as error:
        print(error, file=sys.stderr)
        return 2
    Console(width=132).print(table)
    print(f"largest difference {worst:.1e}, allowed {arguments.tolerance:g}")
    return int(worst > arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())
