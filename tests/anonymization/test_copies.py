"""What the diagnostic of copies finds, and what it does not."""

import itertools

import numpy as np
from picture_tampering import DISGUISES
from scipy.ndimage import gaussian_filter

from anonymization.audit import copies, maps
from anonymization.audit.rings import Rings
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
    # The rings find the same among all, where only some are compared in all views.
    some = copies.Detector(features.astype(np.float16), people, compared=4)
    for name, disguise in DISGUISES.items():
        if name not in UNSEEN:
            left, other, source = some.compare(maps.features(np.asarray(disguise(sources[7]))))
            assert copies.is_copy(left, other) and source == 7, name
    left, other, source = some.compare(features[7], other_than=people[7])
    assert people[source] != people[7] and not copies.is_copy(left, other)
    # Those of the picture's own group are looked at all the same.
    for rings in some.rings:
        rings.squares[7] = np.inf
    assert some.compare(features[7])[2] != 7
    left, other, source = some.compare(features[7], members=[7, 12])
    assert copies.is_copy(left, other) and source == 7


def test_rings_of_turned_mirrored_and_inverted_maps_are_the_same():
    rng = np.random.default_rng(0)
    eyes = [gaussian_filter(rng.normal(size=(32, 32)), 2).astype(np.float32) for _ in range(5)]
    found = Rings(eyes)
    for view in (np.rot90(eyes[3]), np.fliplr(eyes[3]), -3 * eyes[3] + 1):
        apart = found.distances(view.ravel())
        assert abs(apart[3]) < 1e-5 < np.delete(apart, 3).min()
    # Never further apart than the maps themselves are on the disc, of norm 1 there.
    y, x = np.indices((32, 32)) - 15.5
    disc = np.hypot(x, y) < 12.5
    for one, other in itertools.combinations(eyes, 2):
        c = np.corrcoef(one[disc], other[disc])[0, 1]
        assert Rings([one]).distances(other.ravel())[0] < 2 - 2 * abs(c) + 0.1
