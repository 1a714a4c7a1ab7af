"""Fits linear classifiers on frozen features: logistic regression, SGD, ridge regression.

Every process fits on the same whole arrays, so all processes compute the same numbers.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from vlp_jax.errors import UserError

# Radford et al. 2021, A.3: 1e-6 to 1e6 in 8 steps a decade; the first search goes two decades at a
# time.
STEPS_PER_DECADE, LAST_STEP, FIRST_STRIDE = 8, 48, 16
MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True, eq=False)
class LinearClassifier:
    """A linear classifier: logits = x @ kernel + bias; -inf for a class without examples."""

    kernel: Float[np.ndarray, "dim classes"]
    bias: Float[np.ndarray, " classes"]

    def __call__(self, x: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n classes"]:
        """Computes the logits, float64."""
        return x.astype(np.float64) @ self.kernel + self.bias


def accuracy(logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]) -> float:
    """Returns the share of right predictions; of equal logits the first class is predicted."""
    return float((logits.argmax(axis=1) == labels).mean())


def hold_out(
    count: int, share: float, seed: int
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " held_out"]]:
    """Splits the numbers below `count` at random; the second part has `share` of them.

    The result depends on the arguments alone. Raises UserError if a part would be empty.
    """
    held = round(count * share)
    if not 0 < held < count:
        raise UserError(f"holdout={share} of {count} training examples leaves none in one part")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


def search_l2(
    score: Callable[[float], float], grid: Sequence[float] | None = None
) -> tuple[float, dict[float, float]]:
    """Finds the strength of regularization with the highest score; of equal scores the strongest.

    Args:
      score: strength -> score.
      grid: strengths, all of which are tried. None searches 97 strengths from 1e-6 to 1e6 as
        Radford et al. 2021, A.3: first every two decades, then around the best one at half the
        distance, four times.

    Returns:
      The best strength, and the score of each strength that was tried.
    """
    if grid is not None:
        tried = {value: score(value) for value in sorted(grid, reverse=True)}
    else:
        todo, steps, stride = range(LAST_STEP, -LAST_STEP - 1, -FIRST_STRIDE), {}, FIRST_STRIDE
        while stride:
            for step in todo:
                if abs(step) <= LAST_STEP and step not in steps:
                    steps[step] = score(_strength(step))
            center = max(steps, key=lambda step: (steps[step], step))
            stride //= 2
            todo = (center + stride, center - stride)
        tried = {_strength(step): steps[step] for step in sorted(steps)}
    return max(tried, key=lambda value: (tried[value], value)), tried


def _strength(step: int) -> float:
    return 10.0 ** (step / STEPS_PER_DECADE)


def fit_logistic(
    x: Float[np.ndarray, "n dim"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    l2: float,
    max_iterations: int = 1000,
) -> LinearClassifier:
    """Minimizes sum(cross-entropy) + l2 / 2 |kernel|^2 by L-BFGS; the bias is not regularized.

    It is scikit-learn's `LogisticRegression` with C = 1 / l2, as in Radford et al. 2021, A.3.
    Raises UserError for fewer than two classes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    _check_two(labels)
    model = LogisticRegression(C=1 / l2, solver="lbfgs", max_iter=max_iterations)
    with warnings.catch_warnings():
        # Separable data with almost no regularization has no minimum, so L-BFGS never converges.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x.astype(np.float64), labels)
    return _classifier(model.coef_, model.intercept_, model.classes_, classes)


def _check_two(labels: Int[np.ndarray, " n"]) -> None:
    if len(np.unique(labels)) < 2:
        raise UserError("train_data holds fewer than two classes: raise its limit")


def _classifier(
    coefficients: np.ndarray, intercepts: np.ndarray, seen: np.ndarray, classes: int
) -> LinearClassifier:
    if len(seen) == 2:  # scikit-learn has one row then, the logit of the second class
        coefficients = np.stack([-coefficients.ravel(), coefficients.ravel()]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    kernel = np.zeros((coefficients.shape[1], classes))
    bias = np.full(classes, -np.inf)
    kernel[:, seen], bias[seen] = coefficients.T, intercepts
    return LinearClassifier(kernel, bias)


def fit_ridge(
    x: Float[np.ndarray, "n dim"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    grid: Sequence[float],
) -> tuple[LinearClassifier, float]:
    """Fits least squares on targets of +-1 with l2 |kernel|^2; returns it and the chosen `l2`.

    The value of `grid` with the least leave-one-out error is chosen, in closed form. This works
    with one example per class too. It is scikit-learn's `RidgeClassifierCV`. Raises UserError for
    fewer than two classes.
    """
    from sklearn.linear_model import RidgeClassifierCV

    _check_two(labels)
    model = RidgeClassifierCV(alphas=np.array(grid)).fit(x.astype(np.float64), labels)
    fitted = _classifier(model.coef_, np.atleast_1d(model.intercept_), model.classes_, classes)
    return fitted, float(model.alpha_)


def few_per_class(
    labels: Int[np.ndarray, " n"], shots: int, seed: int
) -> Int[np.ndarray, " chosen"]:
    """Draws `shots` examples of each class that occurs; returns their numbers, sorted.

    The draw depends on the arguments alone. Raises UserError if a class has fewer examples.
    """
    counts = np.bincount(labels)
    few = np.flatnonzero((counts > 0) & (counts < shots))
    if few.size:
        raise UserError(
            f"shots={shots}, but {len(few)} classes have fewer training images, such as class "
            f"{few[0]} with {counts[few[0]]}: raise the limit of train_data, or ask for fewer shots"
        )
    order = np.random.default_rng([seed, shots]).permutation(len(labels))
    # Stable: within a class the random order stays, and its first `shots` are the draw.
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.cumsum(counts)[counts > 0] - counts[counts > 0]
    return np.sort(by_class[(starts[:, None] + np.arange(shots)).ravel()])


def check_grid(grid: Sequence[float]) -> None:
    """Raises UserError unless a grid of strengths or rates has numbers, all above 0."""
    if not len(grid) or min(grid) <= 0:
        raise UserError(f"grid needs numbers above 0, got {tuple(grid)}")


def standardize(
    x: Float[np.ndarray, "n dim"], *others: Float[np.ndarray, "_ dim"]
) -> tuple[Float[np.ndarray, "_ dim"], ...]:
    """Subtracts the mean of `x` and divides by its standard deviation, for each dimension.

    A dimension that is constant in `x` is not divided. The same numbers standardize `others`.
    """
    mean = x.mean(axis=0, dtype=np.float64)
    std = x.std(axis=0, dtype=np.float64)
    std[std < 1e-7 * np.abs(x).max(axis=0)] = 1  # rounding errors of a constant, not a spread
    return tuple(((y - mean) / std).astype(np.float32) for y in (x, *others))


def fit_sgd(
    x: Float[np.ndarray, "n dim"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    learning_rates: Sequence[float],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
) -> list[LinearClassifier]:
    """Trains a classifier for each learning rate, side by side on the same batches.

    SGD with momentum 0.9 on the mean cross-entropy, from zeros, with a cosine schedule to 0 and
    without weight decay. An incomplete last batch of an epoch is dropped.
    """
    batch_size = min(batch_size, len(x))
    per_epoch = len(x) // batch_size
    random = np.random.default_rng(seed)
    orders = [random.permutation(len(x))[: per_epoch * batch_size] for _ in range(epochs)]
    batches = np.stack(orders).reshape(-1, batch_size).astype(np.int32)
    batches, x, labels, rates = jax.device_put(
        (batches, x, labels, np.asarray(learning_rates, np.float32))
    )

    def loss(params: dict[str, Array], rows: Array) -> Array:
        logits = x[rows] @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def fit(rate: Array) -> dict[str, Array]:
        schedule = optax.cosine_decay_schedule(1.0, len(batches))
        optimizer = optax.chain(
            optax.trace(decay=MOMENTUM),
            optax.scale_by_schedule(lambda step: -rate * schedule(step)),
        )
        params = {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}

        def step(carry: tuple, rows: Array) -> tuple:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, rows), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]

    # A TPU would otherwise round features and kernel to bfloat16.
    with jax.default_matmul_precision("float32"):
        fitted = jax.device_get(jax.jit(jax.vmap(fit))(rates))
    return [
        LinearClassifier(kernel.astype(np.float64), bias.astype(np.float64))
        for kernel, bias in zip(fitted["kernel"], fitted["bias"], strict=True)
    ]
