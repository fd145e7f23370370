"""Guides: what a probe leaves behind, what the optimisation makes of it, wrong files."""

import numpy as np
import pytest
import torch
from feature_engine import engine, group_for

from evaluation.probe import fit_probe
from models.features.guide import load_guide, save_guide
from models.features.pretrained import load_feature_network
from utils.errors import UserError
from utils.io import save_torch


@pytest.fixture(scope='module')
def lite0():
    return load_feature_network('lite0')


def saved(path, network, n=2):
    """A guide of n random directions."""
    directions = torch.randn(network.n_features, n, generator=torch.Generator().manual_seed(3))
    save_guide(path, 30 * directions, network=network.name, digest=network.digest)
    return load_guide(path, n_features=network.n_features, digest=network.digest)


def test_directions_are_what_the_probe_reads():
    rng = np.random.default_rng(0)
    grades = np.arange(60) % 5
    x = rng.normal(size=(60, 6)) * np.array([1, 5, 1, 1, 1, 1]) + grades[:, None]
    probe = fit_probe(x, np.eye(5)[grades], kind='ridge')
    read = x @ probe.directions(x)
    assert np.allclose(read.std(0), 1)
    assert np.corrcoef(read[:, 0], probe.score(x))[0, 1] == pytest.approx(1)


def test_a_guided_picture_keeps_what_the_guide_reads(lite0, tmp_path):
    guide = saved(tmp_path / 'guide.pt', lite0)
    group, distances = None, []
    for weight in (0.0, 10.0):
        made = engine(lite0, lite0, n_steps=12, lr=0.05, guide=guide, guide_weight=weight)
        group = group or group_for(made)
        result = made.run([group])
        features = lite0.pooled(made.psp.pool(result.image))
        distances.append(float(guide.distance(features, group.content.mean(0)[None])))
    assert distances[1] < 0.7 * distances[0]


def test_the_content_loss_has_a_part_of_the_guide(lite0, tmp_path):
    guide = saved(tmp_path / 'guide.pt', lite0)
    plain, guided = engine(lite0, None), engine(lite0, None, guide=guide, guide_weight=0.5)
    group = group_for(plain)
    ws, targets = group.ws.mean(0, keepdim=True), plain.targets([group])
    features = lite0.pooled(plain.psp.pool(plain.synthesis(ws)))
    apart = guided.losses(ws, targets)[0] - plain.losses(ws, targets)[0]
    want = ((features - targets.content) @ guide.directions).square().mean(1)
    assert torch.allclose(apart, 0.5 * want, rtol=1e-3)


def test_wrong_files(lite0, tmp_path):
    def load(path):
        return load_guide(path, n_features=lite0.n_features, digest=lite0.digest)

    with pytest.raises(UserError, match='guide not found(.|\n)*guide.yaml'):
        load(tmp_path / 'none.pt')
    save_torch(tmp_path / 'other.pt', {'state_dict': {}})
    with pytest.raises(UserError, match='is no guide'):
        load(tmp_path / 'other.pt')
    directions = torch.ones(lite0.n_features, 1)
    save_guide(tmp_path / 'lite1.pt', directions, network='lite1', digest='1' * 64)
    with pytest.raises(UserError, match='features of lite1, another network'):
        load(tmp_path / 'lite1.pt')
    for bad in (directions[:5], directions[:, 0], directions * float('nan')):
        save_guide(tmp_path / 'bad.pt', bad, network='lite0', digest=lite0.digest)
        with pytest.raises(UserError, match='holds no directions'):
            load(tmp_path / 'bad.pt')
