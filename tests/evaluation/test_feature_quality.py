"""What features carry: neighbours, disease, patients, probes."""

import numpy as np
import pytest
from unit_vectors import people, units

from evaluation.feature_quality import (
    chance_to_share,
    describe_quality,
    feature_quality,
    linear_probe,
    nearest_neighbours,
    neighbour_quality,
)


def test_neighbours_by_hand():
    x = np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 2]]
    x[1] = [0.9, 0.1, 0]
    assert nearest_neighbours(x, block=2)[:4].tolist() == [1, 0, 3, 2]
    groups = np.array([0, 0, 1, 1, 1])
    assert nearest_neighbours(x, groups=groups)[[0, 1]].tolist() == [2, 2]
    assert nearest_neighbours(x, groups=np.zeros(5)).tolist() == [-1] * 5
    assert chance_to_share(np.array(['a', 'a', 'b'])) == pytest.approx(1 / 3)


def test_features_of_identity_and_of_disease_are_told_apart():
    patients, labels, eyes = people()
    rng = np.random.default_rng(0)
    person = units(30, 16).numpy()[np.arange(60) // 2]
    disease = units(3, 16).numpy()[labels]
    noise = 0.1 * rng.standard_normal((60, 16)) / 4
    of_person = neighbour_quality(person + noise, labels=labels, patients=patients, eyes=eyes)
    assert of_person['patient']['share'] == 1 and of_person['patient']['chance'] < 0.02
    assert of_person['grade']['share'] == 1  # which says nothing: the same patient
    assert of_person['grade_other_patients']['share'] < 0.7
    assert of_person['eye_of_patient']['share'] == 0
    of_disease = feature_quality(disease + noise, labels=labels, patients=patients)
    assert of_disease['neighbours']['grade_other_patients']['share'] == 1
    assert of_disease['neighbours']['patient']['share'] < 0.3
    assert of_disease['linear_probe']['accuracy'] == 1
    assert of_disease['linear_probe']['auc'] == of_disease['linear_probe']['referable_auc'] == 1
    text = '\n'.join(describe_quality(of_disease))
    assert 'kappa 1.000' in text and 'among other patients has the same grade: 100.0%' in text


def test_chance_among_other_patients_is_the_plain_count():
    patients, labels, _ = people(20)
    labels[3] = 2  # a patient with two grades
    pairs = [
        (labels[i] == labels[j]) for i in range(20) for j in range(20) if patients[i] != patients[j]
    ]
    got = neighbour_quality(np.eye(20), labels=labels, patients=patients)
    assert got['grade_other_patients']['chance'] == pytest.approx(np.mean(pairs))


def test_probe_does_not_know_the_patient():
    """Features that name the patient predict nothing about patients never seen."""
    patients, labels, _ = people(120)
    person = np.random.default_rng(1).standard_normal((60, 64))[np.arange(120) // 2]
    probe = linear_probe(person.astype(np.float32), labels, patients=patients)
    assert probe['accuracy'] < 0.6 and probe['kappa'] < 0.4
    assert linear_probe(person, np.zeros(120, int), patients=patients) == {}
    rare = labels.copy()
    rare[:2] = 4  # a single patient of grade 4 cannot be in every fold
    assert linear_probe(person, rare, patients=patients)['images'] == 118
