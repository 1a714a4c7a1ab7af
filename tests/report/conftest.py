"""A run of two steps to report on, and outcomes that no model was needed for."""

import numpy as np
import pytest

from vlp_jax.evaluators.ranking import rank_both_ways
from vlp_jax.evaluators.retrieval import RetrievalOutcome
from vlp_jax.evaluators.zero_shot import ZeroShotOutcome

HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=http://example.org/x.png>"


@pytest.fixture(scope="session")
def workdir(finished_run):
    """A finished run of the demo's config; not to be written to."""
    return finished_run


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def zero_shot():
    """300 images of 12 classes, of which two have none; the names are hostile."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 300)
    classes = unit(rng.normal(size=(12, 8)))
    return ZeroShotOutcome(
        image=unit(classes[labels] + 0.6 * rng.normal(size=(300, 8))),
        class_embeddings=classes,
        labels=labels,
        class_names=(HOSTILE, *(f"class {n}" for n in range(1, 12))),
        index=np.arange(300) * 2,
        logit_scale=20.0,
    )


@pytest.fixture
def retrieval():
    """40 images with one to three texts each."""
    rng = np.random.default_rng(1)
    owners = np.repeat(np.arange(40), rng.integers(1, 4, 40))
    image = unit(rng.normal(size=(40, 6)))
    text = unit(image[owners] + 0.5 * rng.normal(size=(len(owners), 6)))
    ranks = rank_both_ways(image, text, owners)
    return RetrievalOutcome(image, text, owners, np.arange(40) + 5, *ranks, (1, 5))
