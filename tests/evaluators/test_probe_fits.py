"""Linear classifiers, neighbours and geometry against scikit-learn, PyTorch and plain NumPy."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier

from vlp_jax.errors import UserError
from vlp_jax.evaluators import geometry, neighbours, probes


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 3, 4])[rng.integers(0, 4, 120)]  # class 2 and 5 do not occur
    return (rng.normal(size=(120, 7)) + 0.8 * np.eye(7)[labels]).astype(np.float32), labels


@pytest.mark.parametrize("l2", [0.1, 3.0])
@pytest.mark.parametrize("two", [False, True], ids=["four classes", "two classes"])
def test_logistic_regression_is_at_the_optimum(data, l2, two):
    x, labels = data
    x, labels = (x[labels < 2], labels[labels < 2]) if two else (x, labels)
    found = probes.fit_logistic(x, labels, 6, l2)
    seen = np.unique(labels)
    place = torch.tensor(np.searchsorted(seen, labels))
    kernel = torch.zeros(7, len(seen), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(seen), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [kernel, bias], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )
    # With two classes there is one column, w = w1 - w0, whose square is twice that of the two.
    penalty = l2 * (1 if two else 0.5)

    def closure():
        optimizer.zero_grad()
        logits = torch.tensor(x, dtype=torch.float64) @ kernel + bias
        loss = torch.nn.functional.cross_entropy(logits, place, reduction="sum")
        loss = loss + penalty * (kernel**2).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    logits = (torch.tensor(x, dtype=torch.float64) @ kernel + bias).detach()
    expected = torch.softmax(logits, 1).numpy()
    own = found(x)
    assert np.isneginf(own[:, [2, 5]]).all()
    p = np.exp(own[:, seen] - np.logaddexp.reduce(own[:, seen], axis=1, keepdims=True))
    np.testing.assert_allclose(p, expected, atol=5e-4)


def test_logistic_regression_is_scikit_learns(data):
    x, labels = data
    model = LogisticRegression(C=1 / 0.5, max_iter=1000).fit(x.astype(np.float64), labels)
    logits = probes.fit_logistic(x, labels, 6, 0.5)(x)
    np.testing.assert_allclose(logits[:, model.classes_], model.decision_function(x), atol=1e-6)
    assert probes.accuracy(logits, labels) == model.score(x, labels)
    with pytest.raises(UserError, match="fewer than two classes"):
        probes.fit_logistic(x[labels == 0], labels[labels == 0], 6, 1.0)


def test_ridge_leaves_one_out(data):
    x, labels = data
    grid = (0.01, 1.0, 30.0, 1000.0)
    found, l2 = probes.fit_ridge(x, labels, 6, grid)
    seen = np.unique(labels)
    targets = np.where(labels[:, None] == seen, 1.0, -1.0)

    def solve(x, y, l2):
        x = x.astype(np.float64)
        mean, offset = x.mean(0), y.mean(0)
        w = np.linalg.solve((x - mean).T @ (x - mean) + l2 * np.eye(7), (x - mean).T @ (y - offset))
        return w, offset - mean @ w

    def left_out(l2):
        total = 0.0
        for i in range(len(x)):
            keep = np.arange(len(x)) != i
            w, b = solve(x[keep], targets[keep], l2)
            total += ((x[i] @ w + b - targets[i]) ** 2).sum()
        return total

    assert l2 == min(grid, key=left_out)
    w, b = solve(x, targets, l2)
    np.testing.assert_allclose(found(x)[:, seen], x @ w + b, atol=1e-6)
    model = RidgeClassifierCV(alphas=grid).fit(x.astype(np.float64), labels)
    assert probes.accuracy(found(x), labels) == model.score(x, labels)


def test_ridge_of_two_classes(data):
    x, labels = data
    x, labels = x[labels < 2], labels[labels < 2]
    model = RidgeClassifierCV(alphas=[1.0]).fit(x.astype(np.float64), labels)
    logits = probes.fit_ridge(x, labels, 3, (1.0,))[0](x)
    assert (logits.argmax(1) == model.predict(x)).all() and np.isneginf(logits[:, 2]).all()


def test_the_search_finds_a_peak_as_clip_does():
    tried_at = []

    def score(l2):
        tried_at.append(l2)
        return -abs(np.log10(l2) - 2.3)

    best, tried = probes.search_l2(score)
    # Of 97 values 1/8 decade apart the nearest to 2.3 is 2.25; 7 + 2 * 4 at most are tried.
    assert np.log10(best) == pytest.approx(2.25) and len(tried_at) <= 15
    assert len(tried_at) == len(set(tried_at)) == len(tried)
    assert {1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6} <= {float(f"{v:.6g}") for v in tried}
    assert probes.search_l2(lambda l2: 1.0)[0] == pytest.approx(1e6)  # the strongest of equals
    assert probes.search_l2(lambda l2: -l2, (3.0, 1.0))[0] == 1.0


def test_sgd_comes_to_the_optimum_of_logistic_regression(data):
    x, labels = data
    (x,) = probes.standardize(x)
    fitted = probes.fit_sgd(x, labels, 6, (1e-6, 0.3), epochs=400, batch_size=60, seed=0)
    optimum = probes.fit_logistic(x, labels, 6, 1e-6)(x)
    p = [np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True)) for z in (fitted[1](x), optimum)]
    np.testing.assert_allclose(p[0], p[1], atol=0.05)
    assert np.abs(fitted[0].kernel).max() < 1e-3  # another learning rate, another classifier


def test_sgd_takes_the_steps_that_pytorch_takes(data):
    x, labels = data
    rate, epochs, size = 0.2, 3, 50
    (found,) = probes.fit_sgd(x, labels, 6, (rate,), epochs=epochs, batch_size=size, seed=4)
    random = np.random.default_rng(4)
    model = torch.nn.Linear(7, 6)
    torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    steps = epochs * (len(x) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(epochs):
            order = random.permutation(len(x))
            for start in range(0, len(x) // size * size, size):
                rows = order[start : start + size]
                loss = torch.nn.functional.cross_entropy(
                    model(torch.tensor(x[rows])), torch.tensor(labels[rows])
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    np.testing.assert_allclose(found.kernel, model.weight.detach().numpy().T, atol=2e-6)
    np.testing.assert_allclose(found.bias, model.bias.detach().numpy(), atol=2e-6)


def test_hold_out_and_shots_are_pure_functions():
    kept, held = probes.hold_out(100, 0.2, 5)
    assert len(held) == 20 and sorted([*kept, *held]) == list(range(100))
    assert (probes.hold_out(100, 0.2, 5)[1] == held).all()
    assert (probes.hold_out(100, 0.2, 6)[1] != held).any()
    with pytest.raises(UserError, match="leaves none"):
        probes.hold_out(3, 0.1, 0)
    labels = np.random.default_rng(0).integers(0, 5, 200) + (np.arange(200) % 2) * 7
    rows = probes.few_per_class(labels, 4, 1)
    assert np.unique(labels[rows], return_counts=True)[1].tolist() == [4] * 10
    assert len(set(rows.tolist())) == 40
    assert (probes.few_per_class(labels, 4, 1) == rows).all()
    assert (probes.few_per_class(labels, 4, 2) != rows).any()
    with pytest.raises(UserError, match="10 classes have fewer training images, such as class 0"):
        probes.few_per_class(labels, 100, 0)


@pytest.mark.parametrize("size", [30, 700, 9000])
def test_neighbours_equal_scikit_learn(size):
    rng = np.random.default_rng(size)
    bank, queries = unit(rng.normal(size=(size, 5))), unit(rng.normal(size=(600, 5)))
    labels = rng.integers(0, 6, size)
    ks, temperature = (1, 5, 20), 0.07
    found = neighbours.predictions(queries, bank, labels, ks, temperature)
    for row, k in zip(found, ks, strict=True):
        model = KNeighborsClassifier(
            n_neighbors=k, metric="cosine", algorithm="brute",
            weights=lambda distance: np.exp((1 - distance) / temperature),
        ).fit(bank.astype(np.float64), labels)  # fmt: skip
        expected = model.predict(queries.astype(np.float64))
        assert (row == expected).mean() > 0.998  # float32 may swap two neighbours
    similarity, number = neighbours.nearest(queries, bank, 20)
    whole = queries.astype(np.float64) @ bank.T.astype(np.float64)
    np.testing.assert_allclose(similarity, -np.sort(-whole, axis=1)[:, :20], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(whole, number, 1), similarity, atol=1e-6)


def test_of_equal_neighbours_the_first_counts():
    bank = np.tile(np.eye(3, dtype=np.float32), (1000, 1))
    similarity, number = neighbours.nearest(np.eye(3, dtype=np.float32), bank, 4)
    assert (similarity == 1).all()
    assert number.tolist() == [[i, i + 3, i + 6, i + 9] for i in range(3)]
    ascending = np.linspace(-1, 1, 5000, dtype=np.float32)[:, None]
    assert (
        neighbours.nearest(np.ones((2, 1), np.float32), ascending, 3)[1].tolist()
        == [[4999, 4998, 4997]] * 2
    )
    with pytest.raises(ValueError, match="k=4 is not between 1 and the 3"):
        neighbours.nearest(bank[:1], bank[:3], 4)


@pytest.mark.parametrize("n", [2, 40, 1030])
def test_geometry_equals_float64(n):
    rng = np.random.default_rng(n)
    x, y = unit(rng.normal(size=(n, 6)) + 1), unit(rng.normal(size=(n, 6)))
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    # The functions that Wang and Isola print in their paper, figure 5.
    assert geometry.alignment(x, y) == pytest.approx(
        float((a - b).norm(dim=1).pow(2).mean()), abs=1e-9
    )
    expected = float(torch.pdist(a).pow(2).mul(-2).exp().mean().log())
    assert geometry.uniformity(x) == pytest.approx(expected, abs=1e-6)
    gap = float((a.mean(0) - b.mean(0)).norm())
    assert geometry.modality_gap(x, y) == pytest.approx(gap, abs=1e-9)
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    share = values / values.sum()
    rank = np.exp(-np.sum(share * np.log(share)))
    assert geometry.effective_rank(x) == pytest.approx(rank, abs=1e-9)


def test_geometry_of_extremes():
    one = np.tile(unit(np.ones((1, 8))), (50, 1))
    assert geometry.uniformity(one) == pytest.approx(0, abs=1e-6)
    assert geometry.effective_rank(one) == pytest.approx(1, abs=1e-6)
    assert geometry.effective_rank(np.eye(8, dtype=np.float32)) == pytest.approx(8)
    assert geometry.modality_gap(one, -one) == pytest.approx(2, abs=1e-6)
    assert np.isnan(geometry.uniformity(one[:1]))
