"""Style by group means: its formula, what it depends on, its unit, and its place in the engine."""

import pytest
import torch
from feature_engine import engine, group_for, pictures
from small_engine import small_engine

from anonymization.optimize import learning_rate
from criteria.gram_style import StyleTerm
from criteria.local_style import local_style_loss, patch_grams
from models.features.pretrained import load_feature_network
from models.features.style import FilterBank, VGGStyle
from models.stylegan2.sampling import latent_spread
from utils.errors import UserError


@pytest.fixture(scope='module')
def lite0():
    return load_feature_network('lite0')


def targets_of(term, members):
    """Targets of one group of equal members, pictures [K, 3, S, S]."""
    k = len(members)
    return term.targets([term.grams(term.maps(members))], [torch.full((k,), 1 / k)])


@pytest.mark.parametrize('mode, n', [('whole', 1), ('same_place', 2)])
def test_the_loss_is_the_formula(lite0, mode, n):
    y, members = pictures(1, seed=1), pictures(3)
    term = StyleTerm(lite0, mode=mode, n_crop=2, relative=True)
    got = term.loss(term.maps(y), targets_of(term, members))
    want = 0
    ours, theirs = lite0.maps(y), lite0.maps(members)
    for stride in (2, 4, 8):
        mean = patch_grams(theirs[stride], n).mean(0)
        distance = (patch_grams(ours[stride], n)[0] - mean).square().sum((1, 2)).mean()
        want = want + distance / mean.square().sum((1, 2)).mean()
    assert got.shape == (1,) and got.item() == pytest.approx(want.item(), rel=1e-4)


def test_means_hide_the_members():
    """Members change, their mean stays: so does the loss, but for the published rule."""
    grams = torch.rand(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    apart = torch.stack([grams[0] + 0.3, grams[1] - 0.3])
    y = {1: torch.rand(1, 5, 8, 8)}
    losses = {}
    for mode in ('same_place', 'best_match'):
        term = StyleTerm(FilterBank(), mode=mode, n_crop=2, relative=True)
        losses[mode] = [
            term.loss(y, term.targets([[g]], [torch.tensor([0.5, 0.5])])).item()
            for g in (grams, apart)
        ]
    assert losses['same_place'][0] == pytest.approx(losses['same_place'][1], rel=1e-5)
    assert losses['best_match'][0] != pytest.approx(losses['best_match'][1], rel=1e-2)


def test_published_rule_with_published_units_is_unchanged():
    net = FilterBank()
    y, members = pictures(1, 32, seed=1), pictures(3, 32)
    term = StyleTerm(net, mode='best_match', n_crop=4, relative=False)
    weights = torch.full((1, 3), 1 / 3)
    want = local_style_loss(
        patch_grams(net.features(y), 4), patch_grams(net.features(members), 4)[None], weights
    )
    assert torch.equal(term.loss(term.maps(y), targets_of(term, members)), want)


@pytest.mark.parametrize('mode', ['whole', 'same_place', 'best_match'])
def test_a_relative_loss_has_no_unit(mode):
    term = StyleTerm(FilterBank(), mode=mode, n_crop=2, relative=True)
    raw = StyleTerm(FilterBank(), mode=mode, n_crop=2, relative=False)
    y, members = {1: torch.rand(1, 4, 8, 8)}, torch.rand(3, 4, 8, 8)
    weights = [torch.full((3,), 1 / 3)]
    losses = {}
    for name, t in (('relative', term), ('raw', raw)):
        losses[name] = [
            t.loss({1: f * y[1]}, t.targets([t.grams({1: f * members})], weights)) for f in (1, 10)
        ]
    assert torch.allclose(*losses['relative'], rtol=1e-4)
    assert losses['raw'][1] > 1000 * losses['raw'][0]


def test_what_is_too_small_is_said_before_the_work(lite0):
    whole = StyleTerm(lite0, mode='whole', n_crop=4, relative=True)
    whole.check_side(64)
    with pytest.raises(UserError, match='32 px are too small'):
        whole.check_side(32)
    with pytest.raises(UserError, match='`num_crop` 17: more than the 16 px'):
        StyleTerm(lite0, mode='same_place', n_crop=17, relative=True).check_side(64)
    with pytest.raises(UserError, match='`num_crop` 40: more than the 32 px'):
        StyleTerm(FilterBank(), mode='best_match', n_crop=40, relative=True).check_side(32)


def test_one_network_for_both_losses_gives_the_same_numbers(lite0):
    shared = engine(lite0, lite0)
    apart = engine(lite0, load_feature_network('lite0'))
    group = group_for(shared)
    ws = group.ws.mean(0, keepdim=True)
    for a, b in zip(
        shared.losses(ws, shared.targets([group])), apart.losses(ws, apart.targets([group]))
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_automatic_weight_and_rate_lower_the_loss(lite0):
    made = engine(lite0, lite0, n_steps=8)
    result = made.run([group_for(made)])
    total = result.losses[:, 0].sum(1)
    assert total[-1] < total[0]


def test_automatic_rate_is_in_units_of_the_latents(lite0):
    made = engine(lite0, lite0)
    assert made.peak_rate() == pytest.approx(latent_spread(made.psp.decoder) / 40)
    assert small_engine().peak_rate() == 0.1


def he_vgg():
    """VGG19's layers with random weights of the usual size."""
    torch.manual_seed(0)
    net = VGGStyle()
    for layer in (net.features_0, net.features_2):
        torch.nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
        torch.nn.init.zeros_(layer.bias)
    return net


@pytest.mark.parametrize('side', [64, 128])
@pytest.mark.parametrize('network', ['lite0', 'filters', 'vgg'])
def test_automatic_weight_keeps_the_published_ratio(lite0, network, side):
    """Style against content gradient over the first steps: 0.05, within a factor of 3."""
    style = {'lite0': lambda: lite0, 'filters': FilterBank, 'vgg': he_vgg}[network]()
    made = engine(lite0, style, side)
    group = group_for(made)
    targets = made.targets([group])
    ws = group.ws.mean(0, keepdim=True)
    weight = made.style_weights(ws, targets)
    for step in range(4):
        gradients = []
        for part in (0, 1):
            leaf = ws.clone().requires_grad_(True)
            gradients += torch.autograd.grad(made.losses(leaf, targets)[part].sum(), leaf)
        content, style = 1e2 * gradients[0], weight * gradients[1]
        assert 0.05 / 3 < style.norm() / content.norm() < 0.05 * 3
        # Adam's first steps, in the schedule of a run of 60.
        ws = ws - learning_rate(step, 60, made.peak_rate()) * (content + style).sign()
