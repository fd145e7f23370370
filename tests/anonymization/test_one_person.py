"""Latents of single people are found among very many."""

import numpy as np

from anonymization.audit import recompute


def test_the_latent_of_one_person_is_found_among_many():
    """The same as by comparing all with all."""
    rng = np.random.default_rng(0)
    own = (rng.standard_normal((600, 90)) * np.geomspace(1, 0.01, 90)).astype(np.float32)
    candidates = [[i] for i in range(600)] + [[i, i + 1] for i in range(0, 600, 2)]
    means = np.stack([own[rows].astype(np.float64).mean(0) for rows in candidates])
    groups = (means[::4] + rng.normal(size=(225, 90)) * 0.01).astype(np.float32)
    reach = rng.uniform(0, 0.2, 225)
    nearest = np.array([np.linalg.norm(means - group, axis=1).min() for group in groups])
    near = nearest < reach
    assert 20 < near.sum() < 205
    assert (recompute._nearer(groups, reach, own, candidates) == near).all()
