"""The main job on pretrained networks: what stands in the manifest, and early errors."""

import json
import socket

import numpy as np
import pytest
import timm
import torch
from conftest import load_script
from release_fixture import arguments, save_networks, save_photographs

from anonymization.optimize import GUIDE_WEIGHT
from models.encoders import build_encoder
from models.features.guide import save_guide
from models.features.pretrained import WHEELS, load_feature_network
from models.psp import PSP, psp_checkpoint
from models.stylegan2 import Generator
from utils.errors import UserError
from utils.io import save_torch, sha256_file

k_salsa = load_script('k-SALSA')
LITE0 = f'lite0 {WHEELS["lite0"].sha256}'


@pytest.fixture(scope='module')
def setting(tmp_path_factory):
    """Untrained networks of 64 px, and ten photographs."""
    folder = tmp_path_factory.mktemp('lite')
    torch.manual_seed(0)
    decoder = Generator(64, style_dim=16, n_mlp=2, channels=dict.fromkeys((4, 8, 16, 32, 64), 8))
    encoder = build_encoder('LightEncoder', n_styles=10, input_size=64, style_dim=16, width=8)
    save_torch(folder / 'psp.pt', psp_checkpoint(PSP(encoder, decoder, torch.zeros(16), 64), {}))
    save_photographs(folder / 'data', 10)
    return folder


@pytest.mark.parametrize(
    'options, style',
    [
        ({'style_weights': 'lite0', 'style_weight': 'auto'}, LITE0),
        (
            {'style_weights': 'filters', 'style_weight': 'auto', 'style_mode': 'same_place'},
            'filters',
        ),
        ({'style_weights': None, 'style_weight': 0}, 'none'),
    ],
)
def test_networks_stand_in_the_manifest(setting, tmp_path, options, style):
    options = {'content_weights': 'lite0', 'lr': 'auto', 'num_steps': 2, **options}
    command = [
        a
        for a in arguments(setting, setting / 'data', tmp_path / 'run', **options)
        if not a.endswith('=None')
    ]
    assert k_salsa.main(command) == 0
    manifest = json.loads((tmp_path / 'run/release/manifest.json').read_text())
    assert manifest['networks']['content'] == LITE0
    assert manifest['networks']['style'] == style
    assert manifest['settings']['lr'] == 'auto'
    losses = np.load(tmp_path / 'run/private/losses.npy')
    assert np.isfinite(losses).all() and (losses[..., 1].max() == 0) == (style == 'none')


def test_a_guide_stands_in_the_manifest(setting, tmp_path, monkeypatch):
    net = load_feature_network('lite0')
    directions = torch.ones(net.n_features, 1)
    save_guide(tmp_path / 'guide.pt', directions, network=net.name, digest=net.digest)
    options = {'style_weight': 0, 'num_steps': 2, 'guide': tmp_path / 'guide.pt'}
    command = arguments(
        setting, setting / 'data', tmp_path / 'run', content_weights='lite0', **options
    )
    monkeypatch.setattr(socket, 'socket', _offline)  # nor does anything ask the network
    assert k_salsa.main(command) == 0
    manifest = json.loads((tmp_path / 'run/release/manifest.json').read_text())
    assert manifest['networks']['guide'] == f'k-salsa-guide {sha256_file(tmp_path / "guide.pt")}'
    assert manifest['settings']['guide_weight'] == GUIDE_WEIGHT


def test_a_network_of_the_users_own(setting, tmp_path):
    """A file of a timm architecture is both networks; the maps of other strides, another style."""
    torch.manual_seed(2)
    file = tmp_path / 'net.pt'
    save_torch(file, timm.create_model('test_resnet', num_classes=0).state_dict())
    networks = {'content_weights': file, 'content_arch': 'test_resnet'}
    networks |= {'style_weights': file, 'style_arch': 'test_resnet'}
    command = arguments(setting, setting / 'data', tmp_path, num_steps=1, **networks)
    styles = []
    for strides in ([2, 4], [8, 16]):
        run = tmp_path / str(strides[0])
        flags = [f'--exp_dir={run}', '--style_strides', *map(str, strides)]
        assert k_salsa.main([*command, *flags]) == 0
        manifest = json.loads((run / 'release/manifest.json').read_text())
        name = f'test_resnet {sha256_file(file)}'
        assert manifest['networks']['content'] == manifest['networks']['style'] == name
        assert manifest['settings']['style_strides'] == strides
        styles.append(np.load(run / 'private/losses.npy')[0, :, 1])
    assert not np.allclose(*styles)


def _offline(*_, **__):
    raise AssertionError('the main job opened a socket')


def test_a_guide_needs_a_pretrained_content_network(tmp_path):
    save_networks(tmp_path)
    save_photographs(tmp_path / 'data', 10)
    command = arguments(tmp_path, tmp_path / 'data', tmp_path / 'run', guide=tmp_path / 'psp.pt')
    with pytest.raises(UserError, match='goes with a pretrained content network'):
        k_salsa.main(command)
    assert not (tmp_path / 'run').exists()


def test_encoders_below_64_px_are_refused_before_the_work(setting, tmp_path):
    save_networks(tmp_path)
    command = arguments(tmp_path, setting / 'data', tmp_path / 'run', content_weights='lite0')
    with pytest.raises(UserError, match='32 px are too small(.|\n)*lite0'):
        k_salsa.main(command)
    assert not (tmp_path / 'run').exists()
