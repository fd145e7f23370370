"""Settings of the generator training by themselves: strength, freezing, presets."""

import pytest
import torch
from tiny_generator import Discs, tiny_config, tiny_trainer

from training.adversarial import freeze_discriminator
from training.augment import MAX_STRENGTH, PIPES, AdaptiveStrength, AugmentPipe
from training.stylegan2_config import make_config
from utils.seeds import torch_generator


def test_adaptive_strength_rises_when_the_discriminator_overfits():
    # 20 images: the discriminator soon tells every real one.
    trainer = tiny_trainer(
        dataset=Discs(20),
        augment='ada',
        ada_kimg=0.5,
        config=tiny_config(batch=8, gamma=0.0, pl_weight=0.0),
    )
    strengths, overfitting = [], []
    for _ in range(60):
        trainer.step()
        strengths.append(trainer.ada.p)
        overfitting.append(trainer.ada.overfitting)
    assert strengths[2] == 0.0
    assert max(overfitting) > 0.6
    assert strengths[-1] > 0.2


def test_training_without_noise_adds_none_even_to_a_transferred_network():
    noisy = tiny_trainer()
    for net in (noisy.g, noisy.g_ema):
        for layer in [net.conv1, *net.convs]:
            layer.noise.weight.data.fill_(0.5)
    quiet = tiny_trainer(config=tiny_config(use_noise=False))
    quiet.transfer(noisy.state())
    for _ in range(3):
        quiet.step()
    z = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    for net in (quiet.g, quiet.g_ema):
        assert torch.equal(net(z, noise='random'), net(z, noise='none'))
    assert not torch.equal(noisy.g_ema(z, noise='random'), noisy.g_ema(z, noise='none'))


def test_strength_heuristic():
    ada = AdaptiveStrength(target=0.6, adjust_kimg=500)
    assert ada.update(0.2, 64) == 0.0  # floor
    assert ada.update(0.9, 64) == pytest.approx(64 / 500_000)
    for _ in range(10_000):
        ada.update(1.0, 64)
    assert ada.p == MAX_STRENGTH  # cap
    assert ada.update(0.1, 64) < MAX_STRENGTH


def test_augmentations_hit_in_proportion_and_differentiate_twice():
    pipe = AugmentPipe(PIPES['bgc'], 'cpu')
    x = torch.rand(400, 3, 16, 16)
    assert pipe(x, 0.0) is x
    colour = AugmentPipe(('brightness',), 'cpu')
    changed = (colour(x, 0.25, generator=torch_generator(0)) != x).flatten(1).any(1)
    assert 0.15 < changed.float().mean() < 0.35
    small = torch.rand(1, 3, 8, 8, dtype=torch.float32, requires_grad=True)
    y = pipe(small, 1.0, generator=torch_generator(5))
    (grad,) = torch.autograd.grad(y.square().sum(), small, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), small)
    # The pipe is linear in the image up to a shift, so 2nd derivatives are finite differences.
    step = 1e-2 * torch.randn(small.shape, generator=torch_generator(1))
    moved = (small.detach() + step).requires_grad_()
    z = pipe(moved, 1.0, generator=torch_generator(5))
    (grad_moved,) = torch.autograd.grad(z.square().sum(), moved)
    change = grad_moved.square().sum() - grad.square().sum()
    expected = (second * step).sum() + (grad_moved - grad).square().sum()
    assert change.item() == pytest.approx(expected.item(), rel=1e-2, abs=1e-2)


def test_freeze_counts_layers_from_the_image_side():
    trainer = tiny_trainer(config=tiny_config(freezed=4))
    before = {k: v.clone() for k, v in trainer.d.state_dict().items()}
    trainer.step()
    moved = {k for k, v in trainer.d.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and not any(k.startswith(('convs.0.', 'convs.1.')) for k in moved)
    assert len(freeze_discriminator(trainer.d, 0)) == len(list(trainer.d.parameters()))


def test_published_presets():
    auto = make_config('auto', 512, 1)
    assert (auto.batch, auto.gamma, auto.ema_kimg, auto.lr) == (8, 6.5536, 2.5, 0.0025)
    assert auto.channels[512] == 64 and auto.n_mlp == 2
    paper = make_config('paper256', 256, 8)
    assert (paper.batch, paper.batch_gpu, paper.mbstd_group, paper.channels[256]) == (64, 8, 8, 64)
    assert make_config('stylegan2', 256, 1).batch_gpu == 4
    wide = make_config('small', 64, 1, cbase=4096)
    assert wide.channels == {4: 128, 8: 128, 16: 128, 32: 128, 64: 64}
    same = make_config('auto', 512, 1, cbase=32768, cmax=512)
    assert same == auto
    with pytest.raises(ValueError, match='no channel'):
        make_config('small', 64, 1, cbase=32)
    with pytest.raises(ValueError, match='not a multiple'):
        make_config('auto', 64, 2, batch=9, batch_gpu=4)
