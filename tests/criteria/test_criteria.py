"""Losses: golden content loss, the literal form of local style alignment, file layouts, errors."""

import warnings

import lpips
import pytest
import torch
import torchvision
from conftest import relative_error
from golden_fill import fill_image, fill_state_dict

from criteria.content import content_loss
from criteria.local_style import local_style_loss, patch_grams
from criteria.lpips_loss import LPIPSLoss
from criteria.w_norm import latent_norm
from models.features.content import content_checkpoint, load_content_network
from models.features.style import FILTERS, load_style_network
from models.resnet import build_resnet
from utils.errors import UserError


@pytest.fixture(scope='module')
def moco_file(tmp_path_factory):
    """The original checkpoint layout: query and key encoder, MLP head, optimiser, epoch."""
    state = torchvision.models.resnet50(weights=None).state_dict()
    state = fill_state_dict(state, equalized=False)
    body = {k: v for k, v in state.items() if not k.startswith('fc.')}
    named = {f'module.encoder_q.{k}': v for k, v in body.items()}
    named |= {
        'module.encoder_q.fc.0.weight': torch.zeros(2, 2),
        'module.encoder_k.conv1.weight': torch.zeros(64, 3, 7, 7),
        'module.queue': torch.zeros(4, 4),
    }
    path = tmp_path_factory.mktemp('moco') / 'moco.pth.tar'
    torch.save({'epoch': 800, 'arch': 'resnet50', 'state_dict': named, 'optimizer': {}}, path)
    return path


def test_content_loss_golden(moco_file, golden):
    data = golden('moco_loss')

    def run(net):
        y = fill_image('lsa/centroid', (1, 3, 256, 256)).requires_grad_(True)
        targets = net.features(fill_image('psp/source', (5, 3, 256, 256)))
        loss = content_loss(net.features(y), targets.mean(0, keepdim=True)).sum()
        # The reference rounds 1 - cosine to whole units of 2^-24.
        assert abs(loss.item() - data['loss'].item()) < 1e-4 * data['loss'].item() + 2**-24
        return torch.autograd.grad(loss, y)[0]

    net = load_content_network(moco_file)
    # In float32 rounding decides which side of zero some rectified units are on, and each of them
    # moves the gradient: by per cents, otherwise on every processor.
    assert relative_error(run(net), data['grad']) < 5e-2
    # In float64 it does not. The reference, float32 itself, is 1.2e-3 away from that.
    assert relative_error(run(net.double()), data['grad']) < 2e-3


def test_content_encoder_file_round_trip(tmp_path):
    net = build_resnet('resnet18', small_stem=True)
    torch.save(
        content_checkpoint(net.half(), arch='resnet18', input_size=32, small_stem=True),
        tmp_path / 'content.pt',
    )
    loaded = load_content_network(tmp_path / 'content.pt')
    features = loaded.features(torch.rand(2, 3, 64, 64))
    assert features.shape == (2, 512) and features.dtype == torch.float32
    assert torch.allclose(features.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize('content', [{'a': torch.zeros(1)}, [1, 2], {'state_dict': {}}])
def test_foreign_content_files_are_refused(tmp_path, content):
    torch.save(content, tmp_path / 'x.pt')
    with pytest.raises(UserError, match='no content network'):
        load_content_network(tmp_path / 'x.pt')


def test_missing_files_say_where_to_get_them(tmp_path):
    with pytest.raises(UserError, match='moco_v2_800ep(.|\n)*`content_weights'):
        load_content_network(tmp_path / 'none.pt')
    with pytest.raises(UserError, match='vgg19-dcbb9e9d(.|\n)*`style_weights'):
        load_style_network(tmp_path / 'none.pth')
    with pytest.raises(UserError, match='alexnet-owt(.|\n)*`lpips_weights'):
        LPIPSLoss(tmp_path / 'none.pth')


def test_vgg_uses_the_second_convolution_after_its_relu(tmp_path):
    vgg = torchvision.models.vgg19(weights=None)
    torch.save(
        {k: v for k, v in vgg.state_dict().items() if k.startswith('features.')},
        tmp_path / 'vgg.pth',
    )
    x = torch.rand(1, 3, 16, 16)
    want = vgg.features[:4](x)
    assert torch.allclose(load_style_network(tmp_path / 'vgg.pth').features(x), want, atol=1e-5)


def test_filter_bank_answers_edges_and_ignores_flat_colour():
    net = load_style_network(FILTERS)
    flat = net.features(torch.full((1, 3, 24, 24), 0.2))
    assert flat.shape == (1, 102, 24, 24)
    smooth = flat.unflatten(1, (3, 34))
    assert torch.allclose(smooth[:, :, :2], torch.tensor(0.6), atol=1e-5)
    assert smooth[:, :, 2:].abs().max() < 1e-5
    edge = torch.full((1, 3, 24, 24), -1.0)
    edge[..., 12:] = 1
    assert net.features(edge).unflatten(1, (3, 34))[:, :, 2:].max() > 0.2


def literal_local_style(y, sources, n_crop):
    """The published double loop, written plainly."""

    def grams(features):
        side = features.shape[-1] // n_crop
        found = []
        for row in range(n_crop):
            for col in range(n_crop):
                patch = features[:, row * side : (row + 1) * side, col * side : (col + 1) * side]
                flat = patch.reshape(len(patch), -1)
                found.append(flat @ flat.T)
        return found

    mine, total = grams(y), 0
    for source in sources:
        for gram in grams(source):
            cosines = [torch.cosine_similarity(g.flatten(), gram.flatten(), dim=0) for g in mine]
            q = max(range(len(mine)), key=lambda i: float(cosines[i].detach()))
            total = total + (mine[q] - gram).square().sum() / n_crop**2 / len(sources)
    return total


def test_local_style_equals_the_literal_loops():
    torch.manual_seed(0)
    y = torch.rand(2, 5, 17, 17, requires_grad=True)  # 17 = 4 * 4 + 1: a row is dropped
    sources = [torch.rand(3, 5, 17, 17), torch.rand(2, 5, 17, 17)]
    members = torch.zeros(2, 3, 16, 5, 5)
    weights = torch.zeros(2, 3)
    for i, s in enumerate(sources):
        members[i, : len(s)], weights[i, : len(s)] = patch_grams(s, 4), 1 / len(s)
    got = local_style_loss(patch_grams(y, 4), members, weights)
    want = torch.stack([literal_local_style(y[i], sources[i], 4) for i in range(2)])
    assert torch.allclose(got, want, rtol=1e-5)
    grads = [torch.autograd.grad(v.sum(), y)[0] for v in (got, want)]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


def test_too_many_patches():
    with pytest.raises(ValueError, match='n_crop=9'):
        patch_grams(torch.rand(1, 2, 8, 8), 9)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_gradients_of_patch_grams(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 10, 13).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(2, 9, 5, 5)  # not symmetric
    rows = [x[:, :, 3 * i : 3 * i + 3, 4 * j : 4 * j + 4] for i in range(3) for j in range(3)]
    patches = torch.stack([row.flatten(2) for row in rows], 1)
    (want,) = torch.autograd.grad((patches @ patches.mT * weight).sum(), x)
    got = patch_grams(x, 3)
    assert torch.equal(got, patches @ patches.mT)
    (gradient,) = torch.autograd.grad((got * weight).sum(), x)
    assert relative_error(gradient, want) < 1e-6 and gradient.stride() == x.stride()
    assert not gradient[:, :, 9:].any() and not gradient[..., 12:].any()


def test_lpips_equals_the_library(tmp_path):
    torch.manual_seed(0)
    alex = torchvision.models.alexnet(weights=None)
    torch.save(alex.state_dict(), tmp_path / 'alexnet.pth')
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # a user is told nothing he cannot act on
        ours = LPIPSLoss(tmp_path / 'alexnet.pth')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # the library's use of torchvision
        library = lpips.LPIPS(net='alex', pnet_rand=True, verbose=False)
    for name, value in library.net.named_parameters():
        _, index, part = name.split('.')
        value.data.copy_(alex.state_dict()[f'features.{index}.{part}'])
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    want = library(a, b).flatten()
    assert torch.allclose(ours.distance(ours.features(a), ours.features(b)), want, rtol=1e-5)


def test_latent_norm():
    ws = torch.ones(2, 4, 9)
    assert torch.allclose(latent_norm()(ws), torch.full((2,), 6.0))
    assert torch.allclose(latent_norm(torch.ones(4, 9))(ws), torch.zeros(2))
