"""One picture per group of members: the baselines, on the groups of k-SALSA."""

import numpy as np
from jaxtyping import UInt8

from evaluation.registry import Candidate, method
from evaluation.releases import Release
from evaluation.study import Study


@method('pixel_average', 'mean of the pixels of a group (k-Same)', grouped=True)
def pixel_average(study: Study, release: Release) -> Candidate:
    """The oldest baseline."""
    means = [
        np.rint(study.members[release.group_of == i].mean(0)).astype(np.uint8)
        for i in range(len(release.names))
    ]
    return of_groups(np.stack(means), release)


@method('centroid', 'picture of the mean latent of a group', grouped=True)
def centroid(study: Study, release: Release) -> Candidate:
    """The paper's baseline."""
    return of_groups(study.pictures(release.centroids()), release)


def of_groups(pictures: UInt8[np.ndarray, 'n 3 S S'], release: Release) -> Candidate:
    """Pictures [n], one per group, with what a release tells of the groups."""
    return Candidate(pictures, release.labels, release.shares, release.group_of)
