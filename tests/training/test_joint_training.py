"""Joint training: bands, one step by hand, exact resume, processes, the commands."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_fill import fill_image
from PIL import Image
from test_restyle_training import Pictures, photographs
from two_processes import run_in_one_and_two

from criteria.laplacian import (
    band_errors,
    band_variances,
    bands,
    fine_bands,
    fine_deviations,
    rest,
    texture,
)
from criteria.ridges import ridge_share
from models.encoders import build_encoder
from models.features.guide import Guide
from models.features.pretrained import load_feature_network
from models.psp import PSP, load_psp
from models.stylegan2 import Generator
from scripts import new_generator, train_restyle_joint
from training.coach_config import CoachConfig
from training.coach_restyle_e4e import E4EConfig
from training.coach_restyle_joint import JointCoach, JointConfig
from training.coach_restyle_psp import encoder_run
from training.picture_game import GameConfig, PictureGame
from training.reconstruction import BandTerm
from utils.errors import UserError
from utils.io import load_weights
from utils.logs import read_jsonl
from utils.seeds import torch_generator

CHANNELS = {4: 8, 8: 8, 16: 8, 32: 8, 64: 4}
JOINT = JointConfig(
    decoder_lr=2e-3, mean_of=3, n_means=2, mean_start=1, average=2.0, game=GameConfig(0.3, 2, 1)
)
WEIGHTS = {'heads': 0.02, 'patches': 0.01}
BANDS = [1.0, 1.0, 1.0, 1.0, 2.0]
VARIANCES = [0.1, 0.1, 0.2, 0.2, 0.4]
DEVIATIONS = [0.05, 0.04]


def make_joint_psp() -> PSP:
    torch.manual_seed(0)
    decoder = Generator(64, style_dim=16, n_mlp=2, channels=CHANNELS)
    encoder = build_encoder(
        'LightProgressiveEncoder', n_styles=10, input_size=64, style_dim=16, width=8
    )
    return PSP(encoder, decoder, torch.zeros(10, 16), 64)


def make_coach(
    psp: PSP | None = None, joint: JointConfig = JOINT, guide: Guide | None = None, **settings
) -> JointCoach:
    settings = {
        'batch_size': 4,
        'test_batch_size': 3,
        'max_steps': 4,
        'val_interval': 2,
        'board_interval': 1,
        'image_interval': 2,
        'n_iters': 1,
        'optim_name': 'adam',
        'train_decoder': True,
        'learning_rate': 1e-3,
        **settings,
    }
    return JointCoach(
        psp or make_joint_psp(),
        Pictures(photographs(8, 64)),
        Pictures(photographs(3, 64)),
        CoachConfig(**settings),
        losses={'bands': (BandTerm(BANDS, VARIANCES), 1.0)},
        device='cpu',
        e4e=E4EConfig(progressive_steps=(0, *[10**9] * 9)),
        joint=joint,
        features=load_feature_network('lite0'),
        deviations=DEVIATIONS,
        guide=guide,
    )


def test_bands_add_up_and_their_errors_are_shares_of_the_variance() -> None:
    x = torch.rand(6, 3, 64, 64, generator=torch_generator(0)) * 2 - 1
    parts = bands(x)
    assert [p.shape[-1] for p in parts] == [64, 32, 16, 8, 4]
    assert torch.equal(parts[-1], rest(x))
    whole = parts[-1]
    for part in reversed(parts[:-1]):
        whole = part + F.interpolate(whole, scale_factor=2, mode='bilinear', align_corners=False)
    assert torch.allclose(whole, x, atol=1e-5)
    # Who answers every photograph with the mean one misses all of the variance, of every band.
    variances = band_variances(x)
    for error in band_errors(x.mean(0, keepdim=True).expand_as(x), parts, variances):
        assert float(error.mean()) == pytest.approx(1, rel=1e-4)
    assert all(float(e.max()) < 1e-10 for e in band_errors(x, parts, variances))
    # A line of one pixel is missed by the finest bands most of all.
    line = torch.zeros(1, 3, 64, 64)
    line[:, :, 32] = 1
    found = [float(e) for e in band_errors(torch.zeros_like(line), bands(line), [1.0] * 5)]
    assert found[0] > found[1] > found[2] > max(found[3:])


def test_fine_bands_are_told_from_the_rim_and_from_shades() -> None:
    x = torch.rand(4, 3, 64, 64, generator=torch_generator(1)) * 2 - 1
    fine, coarse = fine_bands(x).chunk(2, 1)
    # The first is the finest band of all; both and what is smoother add up.
    assert torch.allclose(fine, bands(x)[0], atol=1e-6)
    assert float(fine.square().mean()) > 2 * float(coarse.square().mean())
    flat = torch.full_like(x, 0.3)
    assert float(fine_bands(flat).abs().max()) < 1e-6
    # A bright frame is strong, and neither measure sees it.
    framed = 0.1 * x
    framed[..., :3, :] = 5.0
    found = zip(fine_deviations(framed), fine_deviations(0.1 * x))
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in found)
    assert torch.allclose(texture(framed)[:, 1:8:2], texture(0.1 * x)[:, 1:8:2])
    # Twice the contrast is four times the energy, of the green channel.
    double = x.clone()
    double[:, 1] *= 2
    assert torch.allclose(texture(double), 4 * texture(x), rtol=1e-4)


def make_guide() -> Guide:
    net = load_feature_network('lite0')
    return Guide(torch.randn(net.n_features, 2, generator=torch_generator(3)), 'digest')


def patch_input(x: torch.Tensor) -> torch.Tensor:
    fine, coarse = fine_bands(x).chunk(2, 1)
    return torch.cat([2 * x, (fine / 0.05).clamp(-6, 6), (coarse / 0.04).clamp(-6, 6)], 1)


def by_hand(x: torch.Tensor, psp: PSP, game: PictureGame) -> tuple[torch.Tensor, dict]:
    """Loss of step 50, when means and opponents are there, and values of its parts."""
    net = load_feature_network('lite0')
    psp.encoder.stage = 0
    start = psp.decoder.synthesis(psp.latent_avg[None], noise='none').detach()
    w = psp.encoder(torch.cat([x, start.expand_as(x)], 1))
    assert torch.equal(w[:, 0], w[:, 9])
    draw = torch_generator(0, 'means', 50, 0)
    groups = [torch.randperm(4, generator=draw)[:3] for _ in range(2)]
    y = psp.decoder.synthesis(w, noise='none')
    means = torch.cat([w[g].mean(0, keepdim=True) for g in groups])
    shown = torch.cat([y, psp.decoder.synthesis(means, noise='none')])
    maps = net.maps(shown, (2, 4, 8, 16, 32))
    real = net.maps(x, (2, 4, 8, 16, 32))
    bands_missed = sum(
        c * (a - b).square().mean() / v for c, a, b, v in zip(BANDS, bands(y), bands(x), VARIANCES)
    )
    features = sum(
        1 - F.cosine_similarity(maps[s][:4], real[s], dim=1).mean() for s in (2, 4, 8, 16)
    )
    ours, theirs = net.pooled(shown), net.pooled(x)
    content = 1 - F.cosine_similarity(ours[:4], theirs).mean()
    mean_content = sum(
        1 - F.cosine_similarity(ours[4 + i], theirs[g].mean(0), dim=0) for i, g in enumerate(groups)
    )
    colour = sum(
        (rest(shown[4 + i : 5 + i]) - rest(x[g].mean(0)[None])).square().mean()
        for i, g in enumerate(groups)
    )
    spread = (w[:, 0].std(0) - 1).square().mean()
    apart, wanted = (p - p.mean(0) for p in (ours[:4], theirs))
    contrast = (apart - wanted).square().mean() / wanted.square().mean()
    members = torch.stack(groups)
    energies = torch.cat([texture(x), texture(x)[members].mean(1)])
    grain = (texture(shown) / energies).log().square().mean()
    directions = make_guide().directions
    along = ours @ directions, theirs @ directions
    guide = (along[0][:4] - along[1]).square().mean()
    guide = guide + (along[0][4:] - along[1][members].mean(1)).square().mean()
    scores = torch.cat([along[1], along[1][members].mean(1)])
    ridges = torch.cat([ridge_share(x), ridge_share(x)[members].mean(1)])
    vessels = (ridge_share(shown) / ridges).log().square().mean()
    total = contrast + 1.5 * grain + 1.5 * vessels + 0.1 * guide
    total = (
        total
        + (
            bands_missed
            + 2 * features / 4
            + 10 * content
            + 10 * mean_content / 2
            + 0.5 * colour / 2
        )
        + 0.5 * spread
    )
    ratios = {}
    (wanted,) = torch.autograd.grad(total, shown, retain_graph=True)
    for name, logits in (
        ('heads', game.nets['heads'](shown)),
        ('patches', game.nets['patches'](patch_input(shown), scores)),
    ):
        loss = -logits.mean()
        (slope,) = torch.autograd.grad(loss, shown, retain_graph=True)
        ratios[name] = float(wanted.norm() / slope.norm())
        total = total + 0.3 * WEIGHTS[name] * loss
    found = {'shown': shown, 'scores': scores, 'mean_content': mean_content / 2}
    return total, {**{k: v.detach() for k, v in found.items()}, 'ratios': ratios}


def test_one_step_by_hand() -> None:
    x = fill_image('psp/source', (4, 3, 64, 64))
    coach = make_coach(guide=make_guide())
    coach.step_count = 50
    coach.opponents.weights = dict(WEIGHTS)
    psp, game = (
        make_joint_psp(),
        PictureGame(
            load_feature_network('lite0'),
            JOINT.game,
            deviations=DEVIATIONS,
            n_scores=2,
            seed=0,
            device=torch.device('cpu'),
        ),
    )
    values, _ = coach.step(x)
    total, found = by_hand(x, psp, game)
    assert float(values['loss']) == pytest.approx(float(total.detach()), rel=1e-3)
    for name, ratio in found['ratios'].items():  # measured every 50 steps, for the next
        want = 0.8 * WEIGHTS[name] + 0.2 * ratio
        assert coach.opponents.weights[name] == pytest.approx(want, rel=1e-2)
    assert float(values['mean_content']) == pytest.approx(float(found['mean_content']), rel=1e-3)
    parts = {'encoder': 1e-3, 'decoder': 2e-3}
    adam = torch.optim.Adam(
        [{'params': getattr(psp, k).parameters(), 'lr': v} for k, v in parts.items()],
        betas=(0.5, 0.99),
    )
    total.backward()
    adam.step()
    for name in parts:
        pairs = list(zip(getattr(coach.psp, name).parameters(), getattr(psp, name).parameters()))
        apart = sum(float((a - b).detach().abs().sum()) for a, b in pairs)
        assert apart / sum(b.numel() for _, b in pairs) < 1e-5, name
    # The opponents: hinge loss of the same pictures against the photographs.
    game._set_trained(True)
    heads, patches = game.nets.values()
    shown, scores = found['shown'], found['scores']
    pairs = (
        (heads(shown), heads(x)),
        (patches(patch_input(shown), scores), patches(patch_input(x), scores[:4])),
    )
    loss = sum(F.relu(1 + a).mean() + F.relu(1 - b).mean() for a, b in pairs)
    loss.backward()
    game.optimizer.step()
    lost = values['heads_lose'] + values['patches_lose']
    assert float(lost) == pytest.approx(float(loss.detach()), rel=1e-3)
    for ours, theirs in zip(coach.opponents.parameters, game.parameters):
        assert float((ours - theirs).detach().abs().mean()) < 1e-5
    # The averages: half-life of two steps.
    start = make_joint_psp().decoder.input.input
    want = start.lerp(coach.psp.decoder.input.input, 1 - 0.5 ** (1 / 2))
    assert torch.allclose(coach.mean_psp.decoder.input.input, want, atol=1e-6)


def test_means_and_opponents_come_in_at_their_steps() -> None:
    coach = make_coach(joint=JointConfig(mean_of=2, mean_start=2, game=GameConfig(0.3, 10, 4)))
    x = fill_image('psp/source', (4, 3, 64, 64))
    for step, has in (
        (1, set()),
        (2, {'mean_content'}),
        (9, {'mean_content', 'heads_lose', 'heads'}),  # the first time, their weight is measured
        (9, {'mean_content', 'heads_lose'}),
        (12, {'mean_content', 'heads_lose', 'heads'}),
    ):
        coach.step_count = step
        values, _ = coach.step(x)
        assert {'mean_content', 'heads_lose', 'heads'} & set(values) == has
    assert GameConfig(0.3, 10, 4).strength(12) == pytest.approx(0.15)
    assert GameConfig(0.3, 10, 4).strength(99) == 0.3
    assert not any(
        float(m.weight.detach())
        for n, m in coach.psp.decoder.named_modules()
        if n.endswith('noise') and hasattr(m, 'weight')
    )


def test_long_gradients_are_shortened() -> None:
    coach = make_coach()
    (weight,) = coach.psp.decoder.input.parameters()
    for p in coach.parameters:
        p.grad = torch.zeros_like(p)
    long = torch.ones_like(weight)
    usual = float(long.norm()) / 10
    coach.norms = {'encoder': 1.0, 'decoder': usual}
    weight.grad = long.clone()
    coach._shorten()
    assert float(weight.grad.norm()) == pytest.approx(1.5 * usual, rel=1e-4)
    assert coach.norms['decoder'] == pytest.approx((0.98 + 0.06) * usual)
    weight.grad = long * 0.01
    coach._shorten()
    assert torch.equal(weight.grad, long * 0.01)


def test_what_does_not_go_together_is_refused() -> None:
    for wrong in ({'n_iters': 2}, {'train_decoder': False}, {'synthetic': 0.5}):
        with pytest.raises(UserError, match='joint training'):
            make_coach(**wrong)
    coach = make_coach(accumulate=2)
    coach.step_count = 1
    with pytest.raises(UserError, match='means of 3 photographs'):
        coach.step(fill_image('psp/source', (4, 3, 64, 64)))
    plain = make_coach(joint=JointConfig(game=None))
    with pytest.raises(UserError, match='not of a joint training'):
        make_coach().load_state(plain.state(), source='x.pt')


def test_resume_is_exact(tmp_path: Path) -> None:
    straight = make_coach()
    encoder_run(straight, tmp_path / 'straight').to_the_end()
    encoder_run(make_coach(max_steps=3), tmp_path / 'parts').to_the_end()
    second = make_coach()
    run = encoder_run(second, tmp_path / 'parts')
    assert run.resume() and run.to_the_end()
    one, two = straight.state(), second.state()
    for part in ('weights', 'averaged'):
        assert all(torch.equal(v, two[part][k]) for k, v in one[part].items()), part
    for name, state in one['opponents'].items():
        assert all(torch.equal(v, two['opponents'][name][k]) for k, v in state.items()), name
    assert one['opponents_weights'] == two['opponents_weights']


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    """Same global batch in the same passes, under torchrun with gloo."""
    code = """
from pathlib import Path
from test_joint_training import encoder_run, make_coach
from utils import distributed
distributed.init('cpu')
coach = make_coach(batch_size=6, accumulate=2 // distributed.world_size())
encoder_run(coach, Path(sys.argv[1])).to_the_end()
distributed.shutdown()
"""
    run_in_one_and_two(code, tmp_path)
    one, two = (load_weights(tmp_path / n / 'checkpoints' / 'state_4.pt') for n in '12')
    start = make_coach().state()
    parts = [(s['weights'], s['averaged'], *s['opponents'].values()) for s in (one, two, start)]
    for ours, theirs, before in zip(*parts):
        names = [k for k, v in ours.items() if v.is_floating_point()]
        moved = sum(float((ours[k] - before[k]).square().sum()) for k in names)
        apart = sum(float((ours[k] - theirs[k]).square().sum()) for k in names)
        assert moved > 0 and apart < 1e-4 * moved
    assert one['opponents_weights'] == pytest.approx(two['opponents_weights'], rel=1e-3)


def test_commands(tmp_path: Path) -> None:
    for part, n in (('train', 6), ('test', 3)):
        (tmp_path / part).mkdir()
        for i, picture in enumerate(photographs(n, 64)):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / part / f'{i}.png')
    generator, run = tmp_path / 'new.pt', tmp_path / 'run'
    new_generator.main(
        ['--channels', '8', '8', '8', '8', '4', '--style_dim=16', '--dest', str(generator)]
    )
    with pytest.raises(UserError, match='--channels'):
        new_generator.main(['--channels', '8', '8', '--dest', str(tmp_path / 'x.pt')])
    flags = [
        *('--train_path', str(tmp_path / 'train'), '--test_path', str(tmp_path / 'test')),
        *('--stylegan_weights', str(generator), '--exp_dir', str(run)),
        *[
            '--encoder_size=64',
            '--light_width=8',
            '--batch_size=4',
            '--mean_of=2',
            '--mean_start=1',
        ],
        *['--adv_start=1', '--adv_ramp=1', '--device=cpu', '--progressive_start=1000'],
    ]
    train_restyle_joint.main([*flags, '--max_steps=2'])
    train_restyle_joint.main([*flags, '--max_steps=3', '--resume'])
    psp = load_psp(run / 'checkpoints' / 'iteration_3.pt')
    untrained = load_weights(generator)['g_ema']
    moved = psp.decoder.input.input - untrained['input.input']
    assert float(moved.abs().max()) > 0
    rows = read_jsonl(run / 'stats.jsonl')
    assert {'train/bands', 'train/mean_content', 'train/heads_lose', 'test/bands_1'} <= {
        k for r in rows for k in r
    }
