"""Neighbours and projections against scikit-learn and NumPy."""

import sys

import numpy as np
import pytest

from vlp_jax.errors import UserError
from vlp_jax.inspection import nearest, project

sklearn = pytest.importorskip("sklearn")


def unit(n, dim, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_neighbours_are_those_of_scikit_learn():
    from sklearn.neighbors import NearestNeighbors

    index, queries = unit(203, 12), unit(9, 12, seed=1)
    rows, products = nearest(queries, index, 11)
    theirs = NearestNeighbors(n_neighbors=11, metric="cosine", algorithm="brute").fit(index)
    distances, expected = theirs.kneighbors(queries)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(products, 1 - distances, atol=1e-5)
    assert rows.dtype == np.int64 and products.dtype == np.float32


def test_equals_come_by_their_number_and_all_rows_may_be_asked_for(tmp_path):
    index = np.tile(np.eye(2, dtype=np.float32), (5, 1))
    rows, products = nearest(index[:1], index, 10)
    assert rows[0].tolist() == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    assert products[0].tolist() == [1] * 5 + [0] * 5
    file = np.memmap(tmp_path / "index", np.float32, "w+", shape=index.shape)
    file[:] = index
    np.testing.assert_array_equal(nearest(index[:1], file, 3)[0], [[0, 2, 4]])
    for k in (0, 11):
        with pytest.raises(ValueError, match=f"k={k} is not between 1 and the 10 rows"):
            nearest(index[:1], index, k)
    with pytest.raises(ValueError, match="not rows of one width"):
        nearest(index[:1, :1], index, 1)


def test_pca_is_that_of_scikit_learn_up_to_the_sign():
    from sklearn.decomposition import PCA

    points = unit(40, 6) @ np.diag([5, 3, 2, 1, 1, 1]).astype(np.float32) + 7
    got, expected = project(points), PCA(2).fit_transform(points)
    np.testing.assert_allclose(got * np.sign((got * expected).sum(axis=0)), expected, atol=1e-4)
    np.testing.assert_allclose(project(points[::-1])[::-1], got, atol=1e-4)
    assert got.dtype == np.float32 and got.std(axis=0)[0] > got.std(axis=0)[1] > 1


def test_tsne_keeps_groups_apart_and_is_a_function_of_its_seed():
    groups = np.repeat(np.arange(3), 12)
    points = np.eye(8)[groups] * 4 + unit(36, 8)
    got = project(points, "tsne")
    np.testing.assert_allclose(got.mean(axis=0), 0, atol=1e-3)
    rows, _ = nearest(-got, -got, 1)
    distance = np.linalg.norm(got[:, None] - got[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert (groups[distance.argmin(axis=1)] == groups).all() and rows.shape == (36, 1)
    np.testing.assert_array_equal(project(points, "tsne"), got)


def test_mistakes_are_told(monkeypatch):
    with pytest.raises(UserError, match="unknown key 'tnse' .*did you mean 'tsne'"):
        project(unit(9, 4), "tnse")
    with pytest.raises(UserError, match=r"at least 3 embeddings, not \[2, 4\]"):
        project(unit(2, 4))
    with pytest.raises(UserError, match="embeddings of one number have no plane"):
        project(unit(5, 1))
    with pytest.raises(UserError, match="t-SNE of 20,001 points"):
        project(np.zeros((20_001, 2)), "tsne")
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        project(unit(9, 4), "tsne")
