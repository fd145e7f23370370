"""Vessel amount, power at high frequencies, and intervals over people."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from typed_calls import unchecked

from datasets.phantoms import render_phantom
from evaluation.bootstrap import draw_weights, ratio_of_means
from evaluation.spectra import high_frequency_power, high_frequency_ratio
from evaluation.vessel_amount import vessel_amount, vessel_ratios


@pytest.fixture(scope='module')
def phantoms():
    """(pictures [12, 3, 96, 96], their drawn vessels [12, 96, 96])."""
    drawn = [
        render_phantom(seed=5, patient=p, eye='left', visit=0, grade=0, size=96) for p in range(12)
    ]
    return (
        np.stack([np.asarray(d.image).transpose(2, 0, 1) for d in drawn]),
        np.stack([d.vessel_mask for d in drawn]),
    )


def blurred(pictures, sigma):
    return gaussian_filter(pictures, (0, 0, sigma, sigma))


def test_vessel_amount_follows_what_was_drawn(phantoms):
    pictures, vessels = phantoms
    found = vessel_amount(pictures)
    share = vessels.sum((1, 2)) / (pictures.max(1) > 12).sum((1, 2))
    assert np.all(found.area > share / 2) and np.all(found.area < 3 * share)
    assert np.corrcoef(found.area, share)[0, 1] > 0.4
    assert np.all((found.length > 1) & (found.length < 12))
    assert all(np.all(v == 0) for v in vessel_amount(np.zeros((2, 3, 64, 64), np.uint8)))


def test_a_line_has_its_length_and_area():
    picture = np.full((1, 3, 128, 128), 200, np.uint8)
    picture[:, :, 63:65, 20:108] = 150
    found = vessel_amount(picture)
    assert found.length[0] == pytest.approx(88 / 128, rel=0.08)
    assert found.area[0] == pytest.approx(2 * 88 / 128**2, rel=1)


def test_blur_takes_vessels_and_high_frequencies_away(phantoms):
    pictures, _ = phantoms
    ratios = vessel_ratios(pictures, blurred(pictures, 2))
    assert ratios['area']['high'] < 0.5 and ratios['length']['high'] < 0.5
    assert high_frequency_ratio(pictures, blurred(pictures, 2))['high'] < 0.2
    same = vessel_ratios(pictures, pictures)['area']
    assert same['value'] == 1 and same['low'] < 1 < same['high']
    with unchecked(), pytest.raises(ValueError, match='cannot be compared'):
        high_frequency_ratio(pictures, pictures[..., ::2, ::2])


@pytest.mark.parametrize('cycles, high', [(4, False), (28, True)])
def test_high_frequencies_are_those_above_four_tenths_of_nyquist(cycles, high):
    wave = 127 + 100 * np.sin(2 * np.pi * cycles * np.arange(128) / 128)
    green, red = np.zeros((2, 1, 3, 128, 128), np.uint8)
    green[:, 1], red[:, 0] = wave, wave
    assert (high_frequency_power(green)[0] > 1) == high
    assert high_frequency_power(red)[0] == 0


def test_people_are_the_unit_of_the_interval():
    rng = np.random.default_rng(0)
    person = rng.normal(5, 2, 40)
    photographs, people = np.repeat(person, 6), [f'p{i}' for i in range(40) for _ in range(6)]
    release = rng.normal(5, 0.1, 50)

    def width(people):
        found = ratio_of_means(release, photographs, people=people)
        return found['high'] - found['low']

    assert width(people) > 1.8 * width(None)  # six like photographs are one observation
    draws = next(draw_weights(people, 240, 20, rng)).reshape(20, 40, 6)
    assert np.all(draws == draws[..., :1])
    assert np.isnan(ratio_of_means(release, np.zeros(3))['value'])
