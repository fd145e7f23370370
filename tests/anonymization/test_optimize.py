"""The group optimisation: golden numbers, independence of the batch, schedule, ragged groups."""

import pytest
import torch
import torchvision
from conftest import relative_error
from golden_fill import fill_image, fill_state_dict, fill_tensor
from small_engine import small_engine, small_groups

from anonymization.optimize import (
    Group,
    GroupOptimizer,
    OptimizeConfig,
    Result,
    equal_shares,
    learning_rate,
)
from models.encoders import build_encoder
from models.features.content import content_network_from_state
from models.features.style import VGGStyle
from models.psp import PSP, invert
from models.stylegan2 import Generator
from models.stylegan2.sampling import leading_directions, seed_latents
from utils.errors import UserError


def filled(net, equalized):
    net.load_state_dict(fill_state_dict(net.state_dict(), equalized=equalized))
    return net


def golden_content():
    state = torchvision.models.resnet50(weights=None).state_dict()
    return content_network_from_state(fill_state_dict(state, equalized=False), source='golden')


def golden_style():
    net = VGGStyle()
    names = {
        f'features.{i}.{p}': getattr(net, f'features_{i}').get_parameter(p)
        for i in (0, 2)
        for p in ('weight', 'bias')
    }
    full = fill_state_dict(names, equalized=False)
    net.load_state_dict({k.replace('.', '_', 1): v for k, v in full.items()})
    return net


@pytest.fixture(scope='module')
def golden_engine():
    decoder = filled(Generator(64, n_mlp=2), True)
    encoder = filled(build_encoder('ResNetBackboneEncoder', n_styles=10), False)
    psp = PSP(encoder, decoder, fill_tensor('latent_avg', (10, 512), 0.1)).eval()
    return GroupOptimizer(
        psp,
        golden_content(),
        golden_style(),
        device='cpu',
        config=OptimizeConfig(n_steps=12, content_weight=1e4, style_weight=1e-5),
    )


@pytest.fixture(scope='module')
def golden_groups(golden_engine):
    x = fill_image('psp/source', (5, 3, 256, 256))
    inverted = invert(golden_engine.psp, x, n_iters=5)
    content = golden_engine.content_net.features(inverted.recon)
    photos = (x + 1) * 127.5
    return {k: Group(inverted.ws[:k], photos[:k], content[:k]) for k in (5, 3)}


def test_golden_optimisation(golden_engine, golden_groups, golden):
    """Both golden groups in one batch: their sizes differ, so one is padded."""
    data = golden('project64')
    groups = [golden_groups[5], golden_groups[3]]
    targets = golden_engine.targets(groups)
    ws = torch.stack([g.ws.mean(0) for g in groups]).requires_grad_(True)
    _, style, _ = golden_engine.losses(ws, targets)
    (grad,) = torch.autograd.grad(style.sum(), ws)
    result = golden_engine.run(groups)
    for i, k in enumerate((5, 3)):
        assert relative_error(grad[i], data[f'k{k}_style_grad0'][0]) < 1e-3
        want = data[f'k{k}_losses']
        # The reference rounds 1 - cosine to whole units of 2^-24.
        torch.testing.assert_close(
            result.losses[:3, i, 0].double(), want[:3, 0], rtol=1e-3, atol=2**-23
        )
        torch.testing.assert_close(result.losses[:3, i, 1].double(), want[:3, 1], rtol=1e-3, atol=0)
        # Rounding grows from step to step; the trend must agree.
        error = (result.losses[:, i].double() - want[:, :2]).abs() / want[:, :2]
        assert error.max() < 0.1
        assert relative_error(result.ws[i], data[f'k{k}_w_final'][0]) < 0.1
    rates = torch.tensor([learning_rate(s, 12) for s in range(12)], dtype=torch.float64)
    assert torch.allclose(rates, data['k5_losses'][:, 2], atol=1e-7)


def test_published_schedule():
    got = [learning_rate(s, 100) for s in (0, 1, 4, 5, 75, 80, 90, 95, 99)]
    assert got == pytest.approx([0, 0.02, 0.08, 0.1, 0.1, 0.0905, 0.0345, 0.0096, 0.0004], abs=6e-5)


def test_result_does_not_depend_on_the_batch():
    engine = small_engine()
    groups = small_groups(engine, (2, 4, 3))
    together = engine.run(groups)
    for i, group in enumerate(groups):
        alone = engine.run([group])
        # float32 sums in another order, over 6 steps.
        assert relative_error(together.ws[i], alone.ws[0]) < 1e-4
        assert relative_error(together.losses[:, i], alone.losses[:, 0]) < 1e-4
        assert relative_error(together.centroid[i], alone.centroid[0]) < 1e-4


def test_optimisation_lowers_the_loss_and_bf16_agrees():
    groups = small_groups(small_engine(), (3,))
    full = small_engine().run(groups)
    low = small_engine(precision='bf16').run(groups)
    total = [1e2 * r.losses[:, 0, 0] + 1e-2 * r.losses[:, 0, 1] for r in (full, low)]
    assert total[0][-1] < total[0][0]
    # bfloat16 keeps 8 bits: a few percent on the losses.
    assert relative_error(total[1][0], total[0][0]) < 0.05
    assert low.ws.dtype == torch.float32


def test_shares_of_people():
    """Two copies of a member at half its share change nothing."""
    engine = small_engine()
    (group,) = small_groups(engine, (3,))
    twice = Group(*(torch.cat([t, t[:1]]) for t in group[:3]), equal_shares(['a', 'b', 'c', 'a']))
    want, got = engine.run([group]), engine.run([twice])
    assert equal_shares(['a', 'b']) is None
    assert relative_error(got.ws, want.ws) < 1e-4
    assert relative_error(got.losses, want.losses) < 1e-4


def test_zero_steps_give_the_centroid():
    engine = small_engine()
    engine.config = OptimizeConfig(n_steps=0)
    (group,) = small_groups(engine, (3,))
    result = engine.run([group])
    assert torch.equal(result.ws[0], group.ws.mean(0))
    assert torch.equal(result.image, result.centroid)


def test_latent_rank_keeps_the_leading_directions_of_the_generator():
    engine = small_engine()
    groups = small_groups(engine, (3, 4))

    def made(rank: int) -> Result:
        engine.config, engine._leading = OptimizeConfig(n_steps=0, latent_rank=rank), None
        return engine.run(groups)

    def centroids(rank: int) -> torch.Tensor:
        return made(rank).ws

    decoder = engine.psp.decoder
    middle, directions, *_ = leading_directions(decoder, 2)
    assert torch.allclose(directions @ directions.T, torch.eye(2, dtype=torch.float64))
    full, kept = centroids(0), centroids(2)
    away = kept - middle
    along = (away.double() @ directions.T @ directions).float()
    assert torch.allclose(away, along, atol=1e-5)  # nothing else is left
    lost = (full - kept).double() @ directions.T
    assert float(lost.abs().max()) < 1e-5  # and nothing of these is lost
    assert torch.allclose(centroids(decoder.style_dim), full, atol=1e-4)
    # The baseline beside it is the picture of the whole mean.
    assert torch.equal(made(2).centroid, made(0).image)
    assert not torch.equal(made(2).centroid, made(2).image)
    # The directions of most variance, in that order.
    w = decoder.mapping(seed_latents(range(4000), decoder.style_dim))
    shares = ((w - middle).double() @ directions.T).var(0)
    assert shares[0] > shares[1] > w.var(0).mean()
    with pytest.raises(UserError, match='latent_rank'):
        GroupOptimizer(
            engine.psp,
            engine.content_net,
            None,
            config=OptimizeConfig(latent_rank=decoder.style_dim + 1),
            device='cpu',
        )
