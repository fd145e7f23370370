"""Encoders and pSp: published key names, golden numbers, checkpoints, ImageNet start."""

import json
import re

import pytest
import torch
from conftest import GOLDEN, ROOT, relative_error
from golden_fill import fill_image, fill_state_dict, fill_tensor
from torchvision.models import resnet34

from models import encoders
from models.encoders import (
    ENCODERS,
    build_encoder,
    encoder_from_state,
    init_from_lite0,
    init_from_resnet34,
    load_resnet34,
)
from models.encoders.helpers import GradualStyleBlock, styles_together
from models.features.pretrained import load_feature_network
from models.psp import PSP, invert, load_psp, psp_checkpoint
from models.stylegan2 import Generator
from utils.errors import UserError
from utils.io import save_torch

SMALL = {4: 8, 8: 8, 16: 8, 32: 8}


def small_psp(name='LightEncoder', input_size=32, seed=0):
    torch.manual_seed(seed)
    decoder = Generator(32, style_dim=16, n_mlp=2, channels=SMALL)
    encoder = build_encoder(name, n_styles=decoder.n_latent, input_size=input_size, style_dim=16)
    return PSP(encoder, decoder, 0.1 * torch.randn(16), input_size)


@pytest.fixture(scope='module')
def golden_psp():
    decoder = Generator(64, n_mlp=2)
    decoder.load_state_dict(fill_state_dict(decoder.state_dict(), equalized=True))
    encoder = build_encoder('ResNetBackboneEncoder', n_styles=10)
    encoder.load_state_dict(fill_state_dict(encoder.state_dict(), equalized=False))
    return PSP(encoder, decoder, fill_tensor('latent_avg', (10, 512), 0.1)).eval()


def test_published_encoder_keys(golden_psp):
    listed = json.loads((GOLDEN / 'manifest.json').read_text())['encoder_keys_64']
    assert {k: list(v.shape) for k, v in golden_psp.encoder.state_dict().items()} == listed


def test_published_encoder_size_at_512():
    with torch.device('meta'):
        encoder = build_encoder('ResNetBackboneEncoder', n_styles=16)
    assert len(encoder.state_dict()) == 377
    assert sum(p.numel() for p in encoder.parameters()) == 176_524_352


def test_inversion_golden(golden_psp, golden):
    data = golden('inversion64')
    # Two of the five images: in eval mode each is inverted by itself.
    x = fill_image('psp/source', (5, 3, 256, 256))[:2]
    average = golden_psp.average_image()
    assert relative_error(average, data['average_image']) < 1e-4
    got = invert(golden_psp, x, n_iters=5, keep_iterations=True)
    offset = got.iterations[0] - golden_psp.latent_avg
    assert relative_error(offset, data['encoder_first'][:2]) < 1e-4
    assert relative_error(got.iterations, data['latents_per_iteration'][:, :2]) < 1e-4
    assert relative_error(got.recon, data['reconstruction'][:2]) < 1e-3
    assert torch.equal(got.ws, got.iterations[-1])


def test_irse50_keys():
    with torch.device('meta'):
        keys = dict(build_encoder('GradualStyleEncoder', n_styles=18).named_parameters())
    want = {
        'input_layer.0.weight': (64, 6, 3, 3),
        'input_layer.2.weight': (64,),
        'body.3.shortcut_layer.0.weight': (128, 64, 1, 1),
        'body.20.res_layer.3.weight': (256, 256, 3, 3),
        'body.23.res_layer.5.fc1.weight': (32, 512, 1, 1),
        'body.23.res_layer.5.fc2.weight': (512, 32, 1, 1),
        'styles.2.convs.6.weight': (512, 512, 3, 3),
        'styles.6.convs.8.weight': (512, 512, 3, 3),
        'styles.17.convs.10.weight': (512, 512, 3, 3),
        'latlayer1.weight': (512, 256, 1, 1),
        'latlayer2.weight': (512, 128, 1, 1),
    }
    assert {k: tuple(keys[k].shape) for k in want} == want
    assert 'body.0.shortcut_layer.0.weight' not in keys and 'body.24.res_layer.0.weight' not in keys
    assert 'styles.2.convs.8.weight' not in keys and 'styles.17.convs.12.weight' not in keys


@pytest.mark.parametrize('name', sorted(ENCODERS))
def test_any_encoder_survives_its_checkpoint(name, tmp_path):
    psp = small_psp(name).eval()
    checkpoint = psp_checkpoint(psp, {'batch_size': 8})
    assert checkpoint['opts']['encoder_type'] == name
    checkpoint['state_dict']['D.convs.0.0.weight'] = torch.zeros(1)  # dead part of old files
    del checkpoint['opts']['encoder_size']  # nor do they have this
    save_torch(tmp_path / 'psp.pt', checkpoint)
    loaded = load_psp(tmp_path / 'psp.pt')
    x = fill_image('small', (2, 3, 32, 32))
    want, got = invert(psp, x, n_iters=2), invert(loaded, x, n_iters=2)
    assert torch.equal(got.ws, want.ws) and torch.equal(got.recon, want.recon)
    assert not any(p.requires_grad for p in loaded.parameters()) and got.iterations is None


@pytest.mark.parametrize(
    'name,size',
    [
        ('ResNetBackboneEncoder', 72),
        ('GradualStyleEncoder', 50),
        ('ResNetGradualStyleEncoder', 130),
        ('BackboneEncoder', 16),
        ('LightEncoder', 96),
    ],
)
def test_input_size_is_free(name, size):
    encoder = build_encoder(name, n_styles=8, input_size=size, style_dim=16).eval()
    with torch.no_grad():
        assert encoder(torch.randn(1, 6, size, size)).shape == (1, 8, 16)


def test_light_encoder_is_small():
    encoder = build_encoder('LightEncoder', n_styles=12, input_size=128)
    assert 2e6 < sum(p.numel() for p in encoder.parameters()) < 4.5e6
    with pytest.raises(ValueError, match='multiples of 32'):
        build_encoder('LightEncoder', n_styles=12, input_size=100)
    narrow = build_encoder('LightEncoder', n_styles=8, input_size=64, style_dim=16, width=8)
    again, size = encoder_from_state(narrow.state_dict(), n_styles=8, style_dim=16)
    assert size == 64 and again.stem.weight.shape == narrow.stem.weight.shape


def test_imagenet_start_reaches_the_body(tmp_path):
    torch.manual_seed(1)
    net = resnet34(weights=None)
    save_torch(tmp_path / 'resnet34.pth', net.state_dict())
    encoder = build_encoder('ResNetBackboneEncoder', n_styles=8, input_size=32)
    init_from_resnet34(
        encoder,
        load_resnet34(tmp_path / 'resnet34.pth'),
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(encoder.conv1.weight[:, :3], net.conv1.weight)
    ratio = encoder.conv1.weight[:, 3:].std() / net.conv1.weight.std()
    assert 0.9 < ratio < 1.1
    assert torch.equal(encoder.body[7].downsample[0].weight, net.layer3[0].downsample[0].weight)
    assert torch.equal(encoder.body[15].conv2.weight, net.layer4[2].conv2.weight)
    with pytest.raises(UserError, match='LightEncoder'):
        init_from_resnet34(small_psp().encoder, net.state_dict())
    with pytest.raises(UserError, match=r'net.pth: the ResNet-34 weights do not fit'):
        init_from_resnet34(encoder, {'conv1.weight': torch.zeros(64, 3, 5, 5)}, source='net.pth')
    save_torch(tmp_path / 'other.pth', {'fc.weight': torch.zeros(1)})
    with pytest.raises(UserError, match='not a ResNet-34'):
        load_resnet34(tmp_path / 'other.pth')


def test_mismatched_checkpoints_are_user_errors(tmp_path):
    checkpoint = psp_checkpoint(small_psp('ResNetBackboneEncoder'), {})
    del checkpoint['state_dict']['encoder.styles.7.linear.weight']
    for name, content, message in (
        ('no_state', {'g_ema': {}}, 'no "state_dict"'),
        ('no_decoder', {'state_dict': {'encoder.x': torch.zeros(1)}}, 'no "decoder."'),
        ('cut', checkpoint, 'does not fit a generator with 8 styles'),
    ):
        save_torch(tmp_path / f'{name}.pt', content)
        with pytest.raises(UserError, match=message):
            load_psp(tmp_path / f'{name}.pt')
    with pytest.raises(UserError, match='unknown encoder'):
        build_encoder('Encoder4Editing', n_styles=8)


def test_inversion_refuses_wrong_use():
    psp = small_psp()
    with pytest.raises(ValueError, match='training mode'):
        invert(psp, torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match='want \\[N, 3, 32, 32\\]'):
        invert(psp.eval(), torch.zeros(1, 3, 64, 64))


def test_lite_encoder_starts_from_imagenet_and_keeps_its_statistics() -> None:
    encoder = build_encoder('LiteEncoder', n_styles=8, input_size=128, style_dim=16)
    init_from_lite0(encoder, generator=torch.Generator().manual_seed(0))
    features = load_feature_network('lite0')
    x = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    blank = torch.cat([x, torch.zeros_like(x)], 1)
    want = features.maps(x, (8, 16, 32))
    encoder.train()
    for got, maps in zip(encoder.body(blank), want.values(), strict=True):
        assert torch.allclose(got, maps, atol=1e-4 * float(maps.abs().max()))
    other = encoder.body(torch.cat([x, x], 1))[0]
    assert not torch.allclose(other, want[8], atol=0.1)  # the reconstruction is seen too
    trained = encoder(blank)
    assert torch.equal(encoder.eval()(blank), trained) and trained.shape == (2, 8, 16)
    again, size = encoder_from_state(encoder.state_dict(), n_styles=8, style_dim=16)
    assert size == 128 and torch.equal(again.eval()(blank), trained)
    with pytest.raises(ValueError, match='multiples of 32'):
        build_encoder('LiteEncoder', n_styles=8, input_size=16)


def test_all_styles_together_are_those_of_each():
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(GradualStyleBlock(6, 8, 5) for _ in range(3)).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    weighting = torch.randn(2, 3, 8, dtype=torch.float64)
    found = [torch.stack([block(x) for block in blocks], 1), styles_together(blocks, x)]
    assert torch.allclose(*found, atol=1e-12)
    leaves = [x, *blocks.parameters()]
    for one, other in zip(*(torch.autograd.grad((f * weighting).sum(), leaves) for f in found)):
        assert torch.allclose(one, other, atol=1e-12)


def test_the_toy_encoder_of_contributing(tmp_path, monkeypatch):
    """The documented class, as it stands there, from training's checkpoint to inversion."""
    page = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    (code,) = re.findall(r'```python\n(.*?class ToyEncoder.*?)```', page, re.S)
    assert code.count('\n') < 30
    space = {}
    exec(code, space)
    for known in (encoders.ENCODERS, encoders._CLASSES):
        monkeypatch.setitem(known, 'ToyEncoder', space['ToyEncoder'])
    psp = small_psp('ToyEncoder').eval()
    save_torch(tmp_path / 'toy.pt', psp_checkpoint(psp, {}))
    loaded = load_psp(tmp_path / 'toy.pt')
    assert type(loaded.encoder) is space['ToyEncoder'] and loaded.input_size == 32
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    found = invert(loaded, x, n_iters=2).ws
    assert found.shape == (2, psp.decoder.n_latent, 16)
    assert torch.equal(found, invert(psp, x, n_iters=2).ws)
