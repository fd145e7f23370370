"""k-SALSA with more pictures: those on the way between two groups of one grade beside its own."""

import numpy as np
from PIL import Image

from anonymization.walk import plan, read_source, synthesise
from evaluation.registry import Candidate, method
from evaluation.releases import Release
from evaluation.study import Study
from utils.images import resize

PICTURES_PER_GROUP = 4


@method('walk', f'k-SALSA and the ways between, {PICTURES_PER_GROUP} a group', grouped=True)
def walk(study: Study, release: Release) -> Candidate:
    """Members stand behind their group's own picture; those on the way follow."""
    source = read_source(release.run)
    steps = plan(source.labels.tolist(), source.people, PICTURES_PER_GROUP, seed=study.seed)
    own = study.pictures(release.pictures())
    if not steps:
        return Candidate(own, release.labels, release.shares, release.group_of)
    side = study.grader.settings.image_size
    more = [
        np.asarray(resize(Image.fromarray(picture), side)).transpose(2, 0, 1)
        for picture in synthesise(source, steps)
    ]
    place = {name: i for i, name in enumerate(release.names)}
    ends = np.array([[place[source.names[i]] for i in (s.one, s.other)] for s in steps])
    return Candidate(
        np.concatenate([own, np.stack(more)]),
        np.concatenate([release.labels, release.labels[ends[:, 0]]]),
        np.concatenate([release.shares, release.shares[ends].mean(1)]),
        release.group_of,
    )
