"""All methods and measures, in the order in which tables show them. A new one is added here."""

from evaluation.appearance import detail, distances, spectra
from evaluation.attacks.nearest import pixel
from evaluation.attacks.on_features import content, pair, projection
from evaluation.attacks.recognition import identity, identity_trained, pair_trained
from evaluation.attacks.reidentification import reidentification
from evaluation.attacks.vessels import vessel
from evaluation.methods.groups import centroid, pixel_average
from evaluation.methods.k_salsa import k_salsa
from evaluation.methods.photographs import inverted, real, real_same_n
from evaluation.methods.samples import unconditional
from evaluation.methods.walk import walk
from evaluation.probing import probe, reading
from evaluation.registry import Registry
from evaluation.utility import utility

METHODS = Registry(
    'methods', [real, real_same_n, inverted, pixel_average, centroid, unconditional, k_salsa, walk]
)
MEASURES = Registry(
    'measures',
    [
        distances,
        detail,
        spectra,
        probe,
        reading,
        utility,
        projection,
        pixel,
        content,
        vessel,
        pair,
        identity,
        pair_trained,
        identity_trained,
        reidentification,
    ],
)
