"""What the diagnostic of copies finds, and what it does not."""

import numpy as np
from picture_tampering import DISGUISES

from anonymization.audit import copies, maps
from datasets.phantoms.dataset import make_dataset
from datasets.table import read_table
from utils.images import load_rgb

# What these maps do not find in each of the phantoms below.
UNSEEN = {
    'padded',
    'shifted by 1',
    'shifted by 3',
    'shifted by 5',
    'posterised',
    'solarised',
    'Ben Graham',
    'noise 20',
    'noise 40',
    'JPEG 10',
    'JPEG 3',
    'blurred by 2',
    'blurred by 4',
    'perspective',
}


def test_what_the_diagnostic_of_copies_finds(tmp_path):
    """Photographs of fundi (drawn), since what copies are told by depends on what is shown."""
    make_dataset(tmp_path, n_patients=12, size=64, seed=3)
    paths = read_table(tmp_path / 'labels.csv', tmp_path / 'images').paths
    sources = [load_rgb(p) for p in paths]
    people = np.arange(len(sources)) // 2
    features = np.stack([maps.features(np.asarray(s)) for s in sources])
    assert (features.astype(np.float16) == features).all()  # which is how they are kept
    detector = copies.Detector(features.astype(np.float16), people)

    def taken_for_a_copy(picture):
        return copies.is_copy(*detector.compare(maps.features(np.asarray(picture)))[:2])

    for name, disguise in DISGUISES.items():
        if name not in UNSEEN:
            assert taken_for_a_copy(disguise(sources[7])), name
    rng = np.random.default_rng(0)
    for _ in range(20):
        members = [np.asarray(sources[i], float) for i in rng.choice(24, 5, replace=False)]
        assert not taken_for_a_copy(np.mean(members, 0).astype(np.uint8))
    # Where not all are searched, those of the picture's own group are looked at all the same.
    some = copies.Detector(features, people, searched=6)
    assert 7 not in some.searched
    assert not copies.is_copy(*some.compare(features[7])[:2])
    left, other, source = some.compare(features[7], members=[7, 12])
    assert copies.is_copy(left, other) and source == 7
